"""Methods that cache whole steps and decide by measured residuals or by searches: what papers and code state, by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tc_lightning.errors import PlanError
from tc_lightning.measure.residuals import Residuals
from tc_lightning.policies.budcache import Placement, search
from tc_lightning.policies.dpcache import cheapest_path, path_costs
from tc_lightning.policies.ertacache import nearness_schedule
from tc_lightning.policies.magcache import magnitude_schedule, row_errors
from tc_lightning.policies.published_forecasts import taylor_weights
from tc_lightning.policies.residual_steps import threshold_for

# MagCache


def test_magnitudes_by_hand() -> None:
    """Up to 0.5: steps 1 to 3 have 0.1, 0.29 and 0.48, step 4 would be the row's 0.67; then 5 and 6 have 0.2 and 0.4."""
    ratio = np.array([1.0, 0.9, 0.9, 1.0, 1.0, 1.2, 1.0])
    assert row_errors(ratio[1:4]) == pytest.approx([0.1, 0.29, 0.48])
    assert magnitude_schedule(ratio, 0.5, 5, 1) == [0, 4]
    assert magnitude_schedule(ratio, 0.2, 5, 1) == [0, 2, 6]  # of the row 3 to 5 the last has 0.2, which is within
    assert magnitude_schedule(ratio, 9.0, 2, 1) == [0, 3, 6]
    assert magnitude_schedule(ratio, 0.0, 5, 1) == [0, 1, 2, 5]
    assert magnitude_schedule(ratio, 9.0, 9, 3) == [0, 1, 2]


def test_errors_of_a_row_add_up_whatever_their_sign() -> None:
    """Ratios 1.5 and 2/3 bring the magnitude back, and the error of the first stays in the sum."""
    assert row_errors([1.5, 2 / 3]) == pytest.approx([0.5, 0.5])


def test_the_lowest_threshold_of_the_most_full_steps() -> None:
    full = {0.1: 5, 0.2: 3, 0.3: 3, 0.4: 2}
    schedule = lambda t: range(full.get(t, 1))  # noqa: E731
    assert threshold_for(4, full, schedule) == 0.2
    assert threshold_for(2, full, schedule) == 0.4
    assert threshold_for(0, full, schedule) is None


# ERTACache


def test_a_residual_is_repeated_while_it_is_near_the_last_computed() -> None:
    change = np.array([[0.0, 0.0], [0.1, 0.0], [0.1, 0.3], [0.1, 0.15], [0.5, 0.6], [0.1, 0.1]])
    assert nearness_schedule(change, 0.2) == [0, 2, 4]  # 3 is one step from 2; 4 is 0.6 from 2; 5 one from 4
    assert nearness_schedule(change, 0.1) == [0, 1, 2, 3, 4, 5]  # a distance of the threshold itself is not below it
    assert nearness_schedule(change, 9.0) == [0, 3]  # two steps are the furthest that is measured


# DPCache


def random_residuals(seed: int, T: int = 9, width: int = 5) -> tuple[Residuals, np.ndarray]:
    r = np.random.default_rng(seed).standard_normal((T, width))
    return Residuals(r @ r.T / width, np.ones(T), np.zeros((T, 2))), r


@pytest.mark.parametrize("order", [1, 2])
def test_costs_are_errors_of_forecasts_summed_up_to_the_next_full_step(order: int) -> None:
    residuals, r = random_residuals(0)
    T, costs = len(r), path_costs(residuals, order, 4)
    last = list(range(T - 1, T - 2 - order, -1))
    known = np.vstack([r, np.dot(taylor_weights(last, T, order), r[last])])  # and the end, which the last steps forecast
    for a, i, j in ((2, 4, 6), (0, 1, 3), (5, 8, 9), (3, 4, 5)):
        sources = [i, a, a - 1][: min(order, a + 1) + 1]
        forecasts = {at: np.dot(taylor_weights(sources, at, order), r[sources]) for at in range(i + 1, j + 1)}
        expected = sum(np.sqrt(np.mean((value - known[at]) ** 2)) for at, value in forecasts.items())
        assert costs[a, i, j] == pytest.approx(expected)
    assert costs[T - 2, T - 1, T] == pytest.approx(0.0, abs=1e-6)  # the end follows from the last steps
    assert np.isinf(costs[0, 6, 7])  # further apart than may be
    assert np.isinf(costs[4, 4, 5])


def test_a_linear_series_costs_nothing_and_a_bend_costs_something() -> None:
    line = np.arange(9.0)[:, None] * [[1.0, -2.0]]
    costs = path_costs(Residuals(line @ line.T / 2, np.ones(9), np.zeros((9, 2))), 1, 8)
    assert np.nanmax(costs[np.isfinite(costs)]) == pytest.approx(0.0, abs=1e-6)
    bent = np.abs(np.arange(9.0) - 4.0)[:, None]
    costs = path_costs(Residuals(bent @ bent.T, np.ones(9), np.zeros((9, 2))), 1, 8)
    assert costs[2, 4, 5] == pytest.approx(2.0)  # forecast -1 where 1 is
    assert costs[4, 5, 8] == pytest.approx(0.0, abs=1e-6)


def test_the_path_is_the_best_where_the_one_before_does_not_matter() -> None:
    T, J = 9, 4
    rng = np.random.default_rng(1)
    pair = rng.random((T, T + 1))
    costs = np.broadcast_to(pair, (T, T, T + 1))
    for count in (4, 5, 7):
        paths = [(0, 1, *rest) for rest in itertools.combinations(range(2, T), count - 2)]
        paths = [p for p in paths if max(np.diff([*p, T])) <= J]
        best = min(paths, key=lambda p: sum(pair[a, b] for a, b in itertools.pairwise((*p[1:], T))))
        assert cheapest_path(costs, count, 2, J) == list(best)
    assert cheapest_path(costs, T, 2, J) == list(range(T))


def test_the_path_knows_where_it_came_from_and_keeps_one_way_to_each_step() -> None:
    """By way of 2 it costs nothing to get to 4, and 9 from there to the end; by way of 3 it costs 0.7 in all, which is not kept."""
    costs = np.ones((5, 5, 6))
    costs[0, 1, 2], costs[1, 2, 4], costs[2, 4, 5] = 0.0, 0.0, 9.0
    costs[0, 1, 3], costs[1, 3, 4], costs[3, 4, 5] = 0.5, 0.2, 0.0
    assert cheapest_path(costs, 4, 2, 3) == [0, 1, 2, 3]
    costs[0, 1, 3] = costs[1, 3, 4] = -0.5
    assert cheapest_path(costs, 4, 2, 3) == [0, 1, 3, 4]


def test_too_few_full_steps_are_refused() -> None:
    with pytest.raises(PlanError, match="2 full steps of 9 would be more than 3 apart"):
        cheapest_path(np.zeros((9, 9, 10)), 2, 2, 3)
    with pytest.raises(PlanError, match="fewer than the 3 of the warm-up"):
        cheapest_path(np.zeros((9, 9, 10)), 2, 3, 9)


# BudCache


def far_from(target: Placement, calls: list[Placement]):
    def error(placement: Placement) -> float:
        calls.append(placement)
        return float(sum(abs(a - b) for a, b in zip(placement, target, strict=True)))

    return error


def test_the_search_finds_the_placement_and_keeps_its_budget() -> None:
    target, calls = (0, 1, 4, 9, 10, 11, 12, 13), []
    found = search(14, 8, far_from(target, calls), 300)
    assert found == target
    assert len(calls) == len(set(calls)) <= 300
    assert all(len(p) == 8 and p[:2] == (0, 1) and p == tuple(sorted({*p})) and p[-1] < 14 for p in calls)


def test_a_short_search_is_no_worse_than_what_it_began_with_and_comes_again() -> None:
    for seed in range(5):
        target, calls = (0, 3, 6, 9), []
        error = far_from(target, calls)
        found = search(12, 4, error, 7, seed)
        assert len(calls) <= 7
        assert error(found) <= error(calls[0])
        assert found == search(12, 4, far_from(target, []), 7, seed)


def test_where_nothing_can_move_and_where_everything_diverges() -> None:
    assert search(5, 5, lambda p: 1.0, 10) == (0, 1, 2, 3, 4)
    assert search(5, 1, lambda p: 0.0, 10) == (0,)
    assert len(search(9, 4, lambda p: float("inf"), 10)) == 4


def test_no_torch_state_is_drawn_from() -> None:
    before = torch.random.get_rng_state()
    search(12, 4, lambda p: float(sum(p)), 20)
    assert torch.equal(before, torch.random.get_rng_state())
