"""Published forecasts as weights: by hand, and what each does to a constant and to a linear series."""

from __future__ import annotations

import math

import numpy as np
import pytest
from recipes import XL, published, xl_context

from tc_lightning.measure.residuals import Residuals
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.policies.foca import FoCaPolicy
from tc_lightning.policies.hicache import HiCachePolicy
from tc_lightning.policies.published_forecasts import foca_weights, hermite_weights, spectrum_weights, taylor_weights
from tc_lightning.policies.spectrum import SpectrumPolicy, growing_steps
from tc_lightning.policies.weighed_steps import weighed_steps

EVEN, UNEVEN = (9, 6, 3, 0), (9, 7, 2, 0)  # full steps, latest first


def linear(weights: tuple[float, ...], sources: tuple[int, ...]) -> float:
    """What weights make of the series F_s = s."""
    return float(np.dot(weights, sources[: len(weights)]))


# TaylorSeer, as DPCache has it


def test_taylor_by_hand() -> None:
    """2 steps on: F_9 + 2 (F_9 - F_6) / 3; at order 2 and (F_9 - 2 F_6 + F_3) / 9 * 4 / 2."""
    assert taylor_weights(EVEN, 11, 1) == pytest.approx([5 / 3, -2 / 3])
    assert taylor_weights(EVEN, 11, 2) == pytest.approx([5 / 3 + 2 / 9, -2 / 3 - 4 / 9, 2 / 9])
    assert taylor_weights((9,), 11, 2) == (1.0,)
    for sources in (EVEN, UNEVEN):
        for order in (1, 2):
            assert sum(taylor_weights(sources, 11, order)) == pytest.approx(1.0)
            assert linear(taylor_weights(sources, 11, order), sources) == pytest.approx(11)


# HiCache


def test_hermite_by_hand() -> None:
    """Order 1, sigma 1/2, 2 steps on, distance 3: F_9 + (F_9 - F_6) / 3 * 1/2 * 2 (1/2) 2."""
    assert hermite_weights(EVEN, 11, 1, 0.5) == pytest.approx([1 + 1 / 3, -1 / 3])
    # Order 2: and (F_9 - 2 F_6 + F_3) / 9 / 2 * 1/4 * (4 * 1 - 2), since sigma k = 1.
    assert hermite_weights(EVEN, 11, 2, 0.5) == pytest.approx([1 + 1 / 3 + 1 / 36, -1 / 3 - 2 / 36, 1 / 36])
    assert hermite_weights((9,), 11, 2, 0.5) == (1.0,)
    assert hermite_weights((9, 6), 11, 2, 0.5) == pytest.approx([1 + 1 / 3, -1 / 3])


def test_hermite_divides_by_the_last_distance() -> None:
    """Full steps 9, 7, 2: slopes (F_9 - F_7) / 2 and (F_7 - F_2) / 5, their difference over 2; sigma k = 1/2, H_2(1/2) = -1."""
    first, second = np.array([0.5, -0.5, 0.0]), np.array([0.5 / 2, -0.5 / 2 - 0.2 / 2, 0.2 / 2])
    expected = np.array([1.0, 0, 0]) + first * 0.5 * 2 * 0.5 + second / 2 * 0.25 * -1.0
    assert hermite_weights(UNEVEN, 10, 2, 0.5) == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("sources", [EVEN, UNEVEN, (9, 6), (9,)])
def test_hermite_keeps_constants_and_a_share_of_slopes(sources: tuple[int, ...], order: int) -> None:
    for sigma in (0.3, 0.5, math.sqrt(0.5)):
        weights = hermite_weights(sources, 11, order, sigma)
        assert sum(weights) == pytest.approx(1.0)
        assert linear(weights, sources) == pytest.approx(9 + 2 * (2 * sigma**2 if len(sources) > 1 else 0))
    assert hermite_weights(sources, 11, order, 0.5)[0] >= 1.0  # forwards, not back


# FoCa


def test_foca_by_hand() -> None:
    """Full steps 6 and 9: the slope is (F_9 - F_6) / 3 on both sides, and stays. With 3 as well, 7 and 8 are forecast first."""
    assert foca_weights((9, 6), 10) == pytest.approx([4 / 3, -1 / 3])
    assert foca_weights((9, 6), 12) == pytest.approx([2.0, -1.0])
    assert foca_weights((9,), 12) == (1.0,)
    e9, e6, e3 = np.eye(3)
    old, new = (e6 - e3) / 3, (e9 - e6) / 3
    eight = e6 + 2 * old  # the recursion begins on the line through 3 and 6
    ten = e9 + 0.5 * (new + (e9 - eight))
    assert foca_weights((9, 6, 3), 10) == pytest.approx(ten)
    assert foca_weights((9, 6, 3), 11) == pytest.approx(ten + 0.5 * (new + (ten - e9)))


@pytest.mark.parametrize("sources", [EVEN, UNEVEN, (9, 8, 7, 6), (9, 4, 1), (9, 2)])
def test_foca_keeps_constants_and_lines(sources: tuple[int, ...]) -> None:
    for at in range(10, 16):
        weights = foca_weights(sources, at)
        assert len(weights) == min(4, len(sources))
        assert sum(weights) == pytest.approx(1.0)
        assert linear(weights, sources) == pytest.approx(at)
        assert weights[0] > 1.0


# Spectrum


def test_spectrum_by_hand() -> None:
    """One full step, T_0 alone: 1 / (1 + lambda). With T_1, tau(9) = 0.8 and tau(10) = 1: (1 + 0.8) / (1 + 0.64 + lambda)."""
    assert spectrum_weights((9,), 10, 10, degree=0, ridge=0.25) == pytest.approx([0.8])
    assert spectrum_weights((9,), 10, 10, degree=1, ridge=0.36) == pytest.approx([1.8 / 2.0])
    # Two, T_0 alone: the mean, shrunk.
    assert spectrum_weights((9, 1), 10, 10, degree=0, ridge=0.5) == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("sources", [EVEN, UNEVEN])
def test_spectrum_shrinks_what_it_keeps(sources: tuple[int, ...]) -> None:
    """Without a ridge as many polynomials as full steps go through all values; with one, a constant comes out smaller."""
    for degree in (1, 2, 3):
        exact = spectrum_weights(sources, 11, 20, degree, 1e-10)
        assert sum(exact) == pytest.approx(1.0, abs=1e-4)
        assert linear(exact, sources) == pytest.approx(11, abs=1e-3)
        ridged = [sum(spectrum_weights(sources, 11, 20, degree, ridge)) for ridge in (0.01, 0.1, 1.0)]
        assert ridged == sorted(ridged, reverse=True)
        assert ridged[0] < 1.0
    assert linear(spectrum_weights(sources, 11, 20, 1, 0.001), sources) > 9  # forwards


# Plans


def reads_of(plan: CachePlan) -> dict[int, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Sources and weights of each step that forecasts."""
    return {i: (read.sources, read.weights) for i, flow in enumerate(plan.flows) for read in flow.reads}


def test_plans_weigh_the_steps_that_they_read() -> None:
    plan = published(FoCaPolicy())
    reads = reads_of(plan)
    assert plan.full_steps == [0, *range(1, 50, 5)]
    assert sorted([*reads, *plan.full_steps]) == list(range(50))
    assert reads[3][0] == (1, 0)
    assert reads[20][0] == (16, 11, 6, 1)
    for step, (sources, weights) in reads.items():
        assert weights == pytest.approx(foca_weights(sources, step))
        assert linear(weights, sources) == pytest.approx(step)
    assert CachePlan.from_json(plan.to_json()) == plan


def test_costs_are_those_that_papers_state() -> None:
    assert macs_speedup(published(FoCaPolicy(interval=5))) == pytest.approx(4.53, rel=5e-3)
    assert macs_speedup(published(HiCachePolicy(orders=(2,)))) == pytest.approx(5.55, rel=1e-2)  # of FLUX
    assert len(published(SpectrumPolicy()).full_steps) == 14
    assert len(published(SpectrumPolicy(growth=3.0)).full_steps) == 10


def test_windows_by_hand() -> None:
    """Windows of 2, 2.75, 3.5 and 4.25: 2, 2, 3 and 4 steps."""
    assert growing_steps(13, 2, 2.0, 0.75) == [0, 1, 3, 5, 8, 12]
    assert growing_steps(6, 1, 1.0, 0.0) == list(range(6))
    assert growing_steps(3, 5, 2.0, 0.0) == [0, 1, 2]


def test_a_spectrum_of_a_target_grows_no_more_than_it_must() -> None:
    context = xl_context()
    for target in (1.5, 2.0, 3.0, 4.0, 5.0):
        plan = SpectrumPolicy(target).plan(context).plan
        assert target <= macs_speedup(plan) < target * 1.12
        assert len({len(weights) for _, weights in reads_of(plan).values()}) <= 4


def test_least_squares_are_exact_where_a_residual_is_a_sum_of_those_before() -> None:
    """(1, 1) = (0, 1) + (1, 0); (2, 3) = 2 (1, 2) - (0, 1); (3, 5) = 3 (1, 2) - (0, 1)."""
    r = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 2.0], [2.0, 3.0], [3.0, 5.0]])
    residuals = Residuals(r @ r.T / 2, np.ones(6), np.zeros((6, 1)))
    steps = weighed_steps(XL, xl_context(6).sampler, [0, 1, 3], lambda sources, at: residuals.least_squares(sources[:2], at).tolist())
    assert [steps[i][0].mode for i in range(6)] == ["compute", "compute", "skip", "compute", "skip", "skip"]
    assert steps[2][0].weights == pytest.approx([1.0, 1.0])
    assert steps[4][0].weights == pytest.approx([2.0, -1.0])
    assert steps[5][0].weights == pytest.approx([3.0, -1.0])
