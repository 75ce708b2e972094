"""Gradients of a run: step by step as by the graph of all steps, and what both take; fits of a few images at a time."""

from __future__ import annotations

import pytest
import torch
from conftest import CONFIG, EVERY_MODE, FULL, make_plan, make_teacher, vp_sampler
from content_plans import STEPS as CONTENT
from content_plans import content_plan, make_selector
from torch import Tensor

from tc_lightning.models.companions import Companions
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import partial, reuse, skip
from tc_lightning.planner import fit, memory
from tc_lightning.planner.fit import fit_sampler
from tc_lightning.planner.gradients import advance_with, own_theta, stepwise, tensors, whole
from tc_lightning.planner.graph_size import graph_size, graph_size_on_paper
from tc_lightning.planner.refine import _Refiner
from tc_lightning.planner.target import run_target
from tc_lightning.planner.theta import Places
from tc_lightning.rollout.ranks import ALONE
from tc_lightning.rollout.sampling import Rollout, noise_for

GUIDANCE = Guidance(1.5, 3)
LABELS = torch.tensor([0, 3])
SELECTOR = make_selector(make_teacher())
SKIPS = (FULL, FULL, (skip(0, 4, 2),), FULL, (skip(0, 2, 1), skip(2, 4, 1)), FULL)
PARTIAL = (FULL, (partial(0, 4, (0, 3, 7), 1),), (partial(0, 4, (1, 2), 1),), FULL, (partial(0, 4, (5,), 1),))
REUSE = (FULL, FULL, (reuse(0, 4, ("attn",), 1),), (reuse(0, 4, ("mlp",), 0),), (reuse(0, 4, ("attn", "mlp"), 1),))


def plan_of(model: DiT, name: str) -> CachePlan:
    plans = {
        "no cache": lambda: make_plan(model, (FULL,) * 4, sampler="dpmpp_2m"),
        "no guidance": lambda: make_plan(model, SKIPS, Guidance()),
        "skip": lambda: make_plan(model, SKIPS, sampler="dpmpp_2m"),
        "partial": lambda: make_plan(model, PARTIAL),
        "reuse": lambda: make_plan(model, REUSE),
        "every mode": lambda: make_plan(model, EVERY_MODE, sampler="dpmpp_2m"),
        "content": lambda: content_plan(model, SELECTOR, CONTENT),
        "guidance forecasts": lambda: make_plan(model, EVERY_MODE, modes="bb1bc201"),
    }
    return plans[name]()


NAMES = ("no cache", "no guidance", "skip", "partial", "reuse", "every mode", "content", "guidance forecasts")


def vectors(like: Tensor) -> list[Tensor]:
    return [torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like) for seed in range(3)]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_step_by_step_gives_the_gradients_of_the_whole_graph(teacher: DiT, name: str, weights: bool) -> None:
    plan = plan_of(teacher, name)
    run, x_T = Rollout(teacher, plan, LABELS, Companions(SELECTOR)), noise_for(0, range(2), teacher)
    places = Places.of(plan, weights)
    (end, pull), (end_of_steps, pull_steps) = whole(run, x_T, places), stepwise(run, x_T, places)
    assert torch.equal(end, end_of_steps)
    for one, other in zip(pull(vectors(end)), pull_steps(vectors(end)), strict=True):
        assert one.shape == (2, places.size)
        assert torch.linalg.vector_norm(one - other) < 1e-6 * torch.linalg.vector_norm(one)
        count = 4 * plan.num_steps
        assert (one[:, :count] != 0).any(0).view(plan.num_steps, 4)[:, :2].all()
        assert (one[:, count:] != 0).any(0).all()


@pytest.mark.parametrize("name", sorted({*NAMES} - {"content"}))
def test_a_fit_of_any_number_of_images_at_a_time_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In double precision: how many rows a product has changes its rounding, and random weights make much of that."""
    teacher = make_teacher().double()
    plan, noise = plan_of(teacher, name), noise_for(1, range(5), teacher).double()
    target = run_target(teacher, vp_sampler("ddim", 8), GUIDANCE, noise, torch.arange(5), batch=5)
    together = fit_sampler(teacher, plan, target, 4)
    for batch in (1, 2, 3):
        monkeypatch.setattr(fit, "images_at_a_time", lambda plan, device, batch=batch: batch)
        apart = fit_sampler(teacher, plan, target, 4)
        places = Places.of(plan, weights=False)
        expected = places.pack(together.plan)
        assert torch.linalg.vector_norm(places.pack(apart.plan) - expected) < 1e-6 * torch.linalg.vector_norm(expected)
        assert torch.allclose(apart.mse_B, together.mse_B, rtol=1e-6)


def test_the_network_never_sees_more_images_than_it_is_given_room_for(teacher: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, noise = plan_of(teacher, "every mode"), noise_for(1, range(5), teacher)
    target = run_target(teacher, vp_sampler("ddim", 8), GUIDANCE, noise, torch.arange(5), batch=5)
    seen, embed = [], DiT.embed
    monkeypatch.setattr(DiT, "embed", lambda self, x, start: seen.append(len(x)) or embed(self, x, start))
    monkeypatch.setattr(memory, "CPU_BYTES", 2.5 * memory.forward_bytes(plan))
    fit_sampler(teacher, plan, target, 4)
    _Refiner(teacher, target, ALONE).errors(plan)
    assert seen == [4, 4, 2] * plan.num_steps + [4] * plan.num_steps * 2 + [2] * plan.num_steps  # both halves of guidance


def run_on(teacher: DiT, plan: CachePlan) -> tuple[Rollout, Tensor]:
    return Rollout(teacher, plan, LABELS[:1], Companions(SELECTOR)), noise_for(0, range(1), teacher)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_count_is_what_autograd_holds(teacher: DiT, name: str, weights: bool) -> None:
    """Of the whole graph: each memory block once, weights aside. The count adds states that the graph need not keep, alone."""
    run, x_T = run_on(teacher, plan_of(teacher, name))
    places = Places.of(run.plan, weights)
    model, saved = {p.untyped_storage().data_ptr() for p in [*teacher.parameters(), *SELECTOR.predictor.parameters()]}, {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that its place is not taken by another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        end, pull = whole(run, x_T, places)
    held = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in model)
    states, state = 0, run.start(x_T)
    for _ in range(run.plan.num_steps):
        state = advance_with(run, state, own_theta(run, places, x_T))
        states += sum(tensor.untyped_storage().nbytes() for tensor in tensors(state))
    assert held - 4 * places.size <= graph_size(run, x_T, places).whole <= held + states
    assert pull([end])[0].any()


def test_counts_on_paper_are_those_of_the_model(teacher: DiT) -> None:
    for name in ("no cache", "every mode", "guidance forecasts"):
        plan = plan_of(teacher, name)
        for weights in (False, True):
            assert graph_size_on_paper(CONFIG, plan, weights) == graph_size(*run_on(teacher, plan), Places.of(plan, weights))


def test_step_by_step_a_longer_run_takes_little_more(teacher: DiT) -> None:
    """Each further step adds a graph to the whole run's, and latents to what is kept between steps. The first step has no graph."""
    plans = (make_plan(teacher, (FULL,) * steps) for steps in (4, 12))
    short, long = (graph_size(*run_on(teacher, plan), Places.of(plan, weights=False)) for plan in plans)
    latents = 4 * 4 * 8 * 8
    assert long.stepwise(7) - short.stepwise(7) == 8 * latents
    assert long.whole / short.whole == pytest.approx(11 / 3, rel=0.05)


def test_weights_with_gradients_of_their_own_are_left_alone(teacher: DiT) -> None:
    run, x_T = run_on(make_teacher().requires_grad_(True), plan_of(teacher, "skip"))
    end, pull = stepwise(run, x_T, Places.of(run.plan, weights=True))
    pull([end])
    assert all(p.grad is None for p in run.model.parameters())
