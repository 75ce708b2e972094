"""Theta: what its places mean, gradients of forecast weights against finite differences, and forecasts that are refined."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FULL, make_plan, make_teacher
from exporting import export, torch_latents, worst_error

from export.runtime.sampler import CachedSampler
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.forecasts import lagrange_weights
from tc_lightning.plan.guidance import Guidance, GuidanceMode
from tc_lightning.plan.segments import compute, partial, reuse, skip
from tc_lightning.planner import refine
from tc_lightning.planner.gradients import stepwise, whole
from tc_lightning.planner.image_choice import images
from tc_lightning.planner.refine import refine_sampler
from tc_lightning.planner.target import TargetRun
from tc_lightning.planner.theta import Places
from tc_lightning.rollout.sampling import Rollout, noise_for, sample

LABELS = torch.tensor([0, 3])
GUIDANCE = Guidance(1.5, 3)


# A span, of one value at first, then of two; branches; tokens with keys and values forecast, then repeated.
STEPS = (
    FULL,
    (skip(0, 4, 2),),
    FULL,
    FULL,
    (reuse(0, 1, ("attn",), 1), skip(1, 4, 1)),
    (partial(0, 4, (0, 3, 7), 1, kv_order=1),),
    (partial(0, 4, (1, 2), 0),),
    FULL,
)
MODES = "bb11bbb1"  # guidance's difference is forecast at steps 2, 3 and 7


def free_places(plan: CachePlan) -> list[tuple[int, int | None, str, int]]:
    """Step, segment, field and number of weights of each free forecast."""
    forecasts = Places.of(plan, weights=True).forecasts
    return [(one.step, one.segment, one.field, one.places.stop - one.places.start) for one in forecasts]


# What the places mean


def test_free_forecasts_by_hand(teacher: DiT) -> None:
    """Without halves of guidance; the keys and values of step 6 are repeated, its residual is free all the same."""
    assert free_places(make_plan(teacher, STEPS)) == [
        (1, 0, "weights", 1),
        (4, 0, "weights", 2),
        (4, 1, "weights", 2),
        (5, 0, "weights", 2),
        (5, 0, "kv_weights", 2),
        (6, 0, "weights", 1),
    ]


def test_halves_that_were_last_computed_at_different_steps_keep_their_order(teacher: DiT) -> None:
    """From step 4 on the conditional half goes by steps 3 and 2, the other repeats step 0; at step 6 both repeat one value."""
    assert free_places(make_plan(teacher, STEPS, modes=MODES)) == [
        (1, 0, "weights", 1),
        (2, None, "weights", 2),
        (3, None, "weights", 2),
        (6, 0, "weights", 1),
        (7, None, "weights", 2),
    ]


def test_blocks_that_were_last_computed_at_different_steps_keep_their_order(teacher: DiT) -> None:
    steps = (FULL, FULL, (reuse(0, 2, ("attn",), 1), compute(2, 4)), (reuse(0, 4, ("attn",), 1),))
    assert free_places(make_plan(teacher, steps)) == [(2, 0, "weights", 2)]


def test_keys_and_values_that_repeat_one_value_do_so_still(teacher: DiT) -> None:
    """A weight of 1 would say that they are updated in place, which a forecast of order 2 never does."""
    plan = make_plan(teacher, (FULL, (partial(0, 4, (1,), 2, kv_order=2),), (partial(0, 4, (2,), 0),)))
    assert free_places(plan) == [(1, 0, "weights", 1), (2, 0, "weights", 1)]
    places = Places.of(plan, weights=True)
    assert places.moved(plan, torch.zeros(places.size)).flows == plan.flows


def test_full_compute_has_no_place_for_a_forecast(teacher: DiT) -> None:
    plan = make_plan(teacher, (FULL,) * 3)
    assert Places.of(plan, weights=True) == Places.of(plan, weights=False)
    assert Places.of(plan, weights=True).size == 12


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("modes", ["", MODES])
def test_packing_and_unpacking_are_inverse(teacher: DiT, modes: str, weights: bool) -> None:
    plan = make_plan(teacher, STEPS, sampler="dpmpp_2m", modes=modes)
    places = Places.of(plan, weights)
    theta = torch.randn(places.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta[[2, 3, 7]] = 0  # outputs that do not exist
    moved = places.unpack(plan, theta)
    assert torch.equal(places.pack(moved), theta)
    assert Places.of(moved, weights) == places
    assert places.unpack(moved, places.pack(plan)).sampler == plan.sampler
    assert places.moved(moved, torch.zeros(places.size)) == moved
    assert CachePlan.from_json(moved.to_json()) == moved


def test_theta_starts_from_the_polynomials_weights(teacher: DiT) -> None:
    """Stated, they make the same images, to the bit, and the plan caches and costs the same."""
    plan = make_plan(teacher, STEPS, sampler="dpmpp_2m", modes=MODES)
    places = Places.of(plan, weights=True)
    stated = places.moved(plan, torch.zeros(places.size))
    assert stated.guidance_modes[7] == GuidanceMode("forecast", weights=lagrange_weights((6, 5), 7))
    assert stated.steps[1] == (dataclasses.replace(skip(0, 4), weights=(1.0,)),)
    assert stated.flows == plan.flows
    x = noise_for(3, range(2), teacher)
    assert torch.equal(sample(teacher, stated, x, LABELS), sample(teacher, plan, x, LABELS))


def test_a_fitted_sampler_alone_leaves_every_forecast(teacher: DiT) -> None:
    plan = make_plan(teacher, STEPS, modes=MODES)
    places = Places.of(plan, weights=False)
    moved = places.moved(plan, torch.full((places.size,), 0.0) + torch.eye(places.size)[0])
    assert (moved.steps, moved.guidance_modes) == (plan.steps, plan.guidance_modes)
    assert moved.sampler.steps[0].next_x == plan.sampler.steps[0].next_x + 1


# Gradients


@pytest.mark.parametrize("gradients", [whole, stepwise])
@pytest.mark.parametrize("modes", ["", MODES])
def test_gradients_of_weights_are_those_of_finite_differences(gradients, modes: str) -> None:
    """Of every free weight, of each of two images, in double precision."""
    teacher = make_teacher().double()
    plan = make_plan(teacher, STEPS, GUIDANCE, sampler="dpmpp_2m", modes=modes)
    x, places, by = noise_for(5, range(2), teacher).double(), Places.of(plan, weights=True), 1e-4
    end, pull = gradients(Rollout(teacher, plan, LABELS), x, places)
    vector = torch.randn(end.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found_BP,) = pull([vector])
    assert places.size > 4 * plan.num_steps
    for place in range(4 * plan.num_steps, places.size):
        unit = torch.eye(places.size, dtype=torch.float64)[place] * by
        above, below = (sample(teacher, places.moved(plan, sign * unit), x, LABELS) for sign in (1, -1))
        expected = ((above - below) / (2 * by) * vector).flatten(1).sum(1)
        assert expected.abs().min() > 0
        assert found_BP[:, place].tolist() == pytest.approx(expected.tolist(), rel=1e-3)


# Refining


@pytest.fixture(scope="module")
def digits() -> DiT:
    """The shipped one: random weights do not denoise, and what they make has no paths to keep to."""
    return load_teacher(TeacherSpec(str(Path(__file__).parents[1] / "data" / "digits_dit.safetensors")))


@pytest.fixture(scope="module")
def weighed(digits: DiT) -> CachePlan:
    """Two steps of five cache: a span; then a branch, a span, and guidance's difference."""
    full = (compute(0, 12),)
    steps = (full, full, (skip(0, 12, 1),), full, (reuse(0, 1, ("attn",), 1), skip(1, 12, 1)))
    return make_plan(digits, steps, Guidance(1.5, 1), sampler="dpmpp_2m", spacing="mix:0.5", modes="bbbb1")


@pytest.fixture(scope="module")
def target(digits: DiT, weighed: CachePlan) -> TargetRun:
    """The plan's own images: for it there is a perfect answer."""
    noise, given = images(digits, list(range(2)))
    times = np.array([row.t for row in weighed.sampler.steps])
    return TargetRun(digits.schedule, times, noise[None], given, sample(digits, weighed, noise, given))


@pytest.fixture
def many_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows of two images as theta has places."""
    monkeypatch.setattr(refine, "PROBES", 16)


def error(model: DiT, plan: CachePlan, target: TargetRun) -> float:
    return float((sample(model, plan, target.x_T, target.given) - target.x_0).square().mean())


def spoilt(plan: CachePlan) -> CachePlan:
    """All forecast weights are a little too large."""
    places = Places.of(plan, weights=True)
    theta = places.pack(plan)
    theta[4 * plan.num_steps :] *= 1.03
    return places.unpack(plan, theta)


@pytest.mark.usefixtures("many_probes")
def test_spoilt_weights_are_brought_back(digits: DiT, weighed: CachePlan, target: TargetRun) -> None:
    """Sampler and weights share in mending what the weights alone have spoilt."""
    worse = spoilt(weighed)
    both, sampler = refine_sampler(digits, worse, target, 2, weights=True), refine_sampler(digits, worse, target, 1)
    assert error(digits, both, target) < 0.2 * error(digits, worse, target)
    assert (both.steps[2], both.guidance_modes[4]) != (worse.steps[2], worse.guidance_modes[4])
    assert (sampler.steps, sampler.guidance_modes) == (worse.steps, worse.guidance_modes)


@pytest.mark.usefixtures("many_probes")
def test_plans_of_full_compute_are_refined_alike_to_the_bit(digits: DiT, target: TargetRun) -> None:
    plan = make_plan(digits, ((compute(0, 12),),) * 4, Guidance(1.5, 1), sampler="dpmpp_2m", spacing="mix:0.5")
    first, second = (refine_sampler(digits, plan, target, 1, weights=weights) for weights in (True, False))
    assert first == second
    assert first.sampler != plan.sampler


@pytest.mark.usefixtures("many_probes")
def test_one_step_after_the_other_leads_to_the_same_weights(
    digits: DiT, weighed: CachePlan, target: TargetRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse, places = spoilt(weighed), Places.of(weighed, weights=True)
    together = refine_sampler(digits, worse, target, 1, weights=True)
    monkeypatch.setattr(refine, "free_bytes", lambda device: 1000)
    by_step = refine_sampler(digits, worse, target, 1, weights=True)
    assert torch.allclose(places.pack(together), places.pack(by_step), atol=1e-4)
    assert together.steps != worse.steps


@pytest.mark.parametrize("modes", ["", MODES])
def test_a_plan_whose_weights_have_moved_has_parity(tmp_path: Path, teacher: DiT, modes: str) -> None:
    plan = make_plan(teacher, STEPS, sampler="dpmpp_2m", modes=modes)
    moved = spoilt(plan)
    manifest = export(teacher, moved, tmp_path / "artefact")
    assert max(row["rel_l2"] for row in manifest["parity"]["programs"]) < 1e-5
    found = CachedSampler(tmp_path / "artefact", max_batch=3).sample([2, 0, 4], seed=11).latents
    assert worst_error(found, torch_latents(teacher, moved, [2, 0, 4], 11)) < 1e-5
    assert worst_error(found, torch_latents(teacher, plan, [2, 0, 4], 11)) > 1e-4
