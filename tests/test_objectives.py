from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_teacher, vp_sampler
from torch import Tensor

from data.rollouts import RolloutDataset
from tc_lightning.cache.soft_network import full_eps, mixed_branches_eps
from tc_lightning.errors import RunError
from tc_lightning.learn.objectives.base import Batch, Task
from tc_lightning.learn.objectives.rollout import RouterRollout
from tc_lightning.learn.objectives.routers import CAP, MEASURE_SEED, WEIGHTINGS, RouterObjective, reuse_damage, step_weights
from tc_lightning.learn.objectives.superposition import RouterSuperposition
from tc_lightning.measure.step_effect import step_effect
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.policies.routers import router_steps
from tc_lightning.rollout.sampling import full_plan, labels_for, model_signature, noise_for, sample_steps

TEACHER = make_teacher(0, depth=3, in_channels=2, hidden_size=16)
T, L, GUIDANCE = 5, 3, Guidance(1.5, 1)
SHAPE = (2, 8, 8)


def make_task(sampler: str = "ddim") -> Task:
    return Task(TEACHER, model_signature(TEACHER), vp_sampler(sampler, T), GUIDANCE)


def rollouts(task: Task, indices: range = range(10, 13)) -> list[Batch]:
    """All batches of one group."""
    data = RolloutDataset(indices, len(indices), T, 0, SHAPE, TEACHER.conditions)
    batches = [[data[i + j] for j in range(len(indices))] for i in range(0, len(data), len(indices))]
    return [Batch(task, torch.utils.data.default_collate(items)) for items in batches]


def pairs(task: Task, steps: list[int]) -> Batch:
    x, label = noise_for(3, range(len(steps)), TEACHER), torch.arange(len(steps)) % 5
    states = list(sample_steps(TEACHER, full_plan(task.signature, task.sampler, GUIDANCE), x, label))

    def at(name: str, shift: int) -> Tensor:
        return torch.stack([getattr(states[i + shift], name)[row] for row, i in enumerate(steps)])

    names = {"label": label, "step": torch.tensor(steps), "index": torch.arange(len(steps))}
    return Batch(task, {"x_prev": at("x", -1)[:, None], "x": at("x", 0), "eps": at("eps", 0), **names})


def prepared(objective: RouterObjective, task: Task, router: Tensor | None = None) -> Any:
    """Started; with the weights given, if any (a logit that is bounded: 0.02 to 0.98)."""
    torch.manual_seed(0)
    objective.prepare(task)
    objective.start(torch.device("cpu"))
    if router is not None:
        with torch.no_grad():
            if isinstance(objective, RouterSuperposition):
                objective.predictor.bias_LN.zero_()
            objective.predictor.table_TL2.copy_(torch.where(router, 6.0, -6.0))
    return objective


def test_all_ones_is_full_compute_bit_for_bit() -> None:
    x, t, y = noise_for(0, range(2), TEACHER), torch.tensor([700.0, 20.0]), torch.tensor([1, 4])
    _, old = full_eps(TEACHER, GUIDANCE, noise_for(1, range(2), TEACHER), t + 20, y)
    eps, caches = full_eps(TEACHER, GUIDANCE, x, t, y)
    mixed, left = mixed_branches_eps(TEACHER, GUIDANCE, old.branches, x, t, y, torch.ones(2, L, 2))
    assert torch.equal(mixed, eps)
    for ours, theirs in zip(left, caches.branches, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ("attn", "mlp"))


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_a_student_with_hard_weights_walks_as_its_plan_does(sampler: str) -> None:
    """Training and inference agree: the student that thresholds its router is the plan that the router makes."""
    task = make_task(sampler)
    computed = torch.rand(T, L, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    objective = prepared(RouterRollout(threshold=0.5), task, computed)
    batches = rollouts(task)
    mask = ~computed.numpy()
    mask[0] = False
    plan = CachePlan(task.signature, task.sampler, GUIDANCE, router_steps(mask), task.sampler)
    content = batches[0].content
    for batch, state in zip(batches, list(sample_steps(TEACHER, plan, content["noise"], content["label"]))[1:], strict=True):
        torch.testing.assert_close(objective._before(state.step, batch).x, state.x, rtol=1e-5, atol=1e-5)
        loss = objective.loss(batch, 0)
        t_B = torch.full((3,), task.sampler.steps[state.step].t)
        target, _ = full_eps(TEACHER, GUIDANCE, state.x, t_B, content["label"])
        error = objective.weight_T[state.step] * (state.eps - target).square().mean()
        torch.testing.assert_close(loss.logs["router_error"], error, rtol=1e-3, atol=1e-6)


def test_a_student_is_the_same_when_its_steps_are_run_again() -> None:
    task = make_task()
    walked, resumed = (prepared(RouterRollout(), task) for _ in range(2))
    batches = rollouts(task)
    errors = [walked.loss(batch, 0).logs["router_error"] for batch in batches]

    def error(batch: Batch) -> Tensor:
        return resumed.loss(batch, 0).logs["router_error"]

    torch.testing.assert_close(error(batches[2]), errors[2], rtol=1e-4, atol=0)
    torch.testing.assert_close(error(batches[0]), errors[0], rtol=1e-4, atol=0)  # another step than the student is at
    other = error(rollouts(task, range(20, 23))[1])  # the step that the student is at, of other rollouts
    assert abs(other / errors[1] - 1) > 0.01


@pytest.mark.parametrize("kind", [RouterRollout, RouterSuperposition])
@pytest.mark.parametrize(("price", "rises"), [({"beta": 1e-6}, True), ({"beta": 1e3}, False), ({"target_share": 0.2}, False)])
def test_the_cost_of_computing_decides_which_way_weights_go(kind: type[RouterObjective], price: Any, rises: bool) -> None:
    task = make_task()
    objective = prepared(kind(**price, **{"threshold": None} if kind is RouterRollout else {}), task)
    torch.nn.init.ones_(objective.predictor.table_TL2)
    batches = rollouts(task) if kind is RouterRollout else [pairs(task, [1, 2, 3, 4])] * 4
    before, optimiser = objective.scores(), torch.optim.Adam(objective.parameters(), 1e-3)
    for i, batch in enumerate(batches):
        optimiser.zero_grad()
        objective.loss(batch, i).total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
        objective.before_step()
        optimiser.step()
    change = objective.scores() - before
    assert (change[0] == 0).all()
    assert bool(change[1:].mean() > 0) == rises
    assert bool(objective.multiplier > 0) == ("target_share" in price)


def test_reusing_everything_costs_one_at_the_median_step() -> None:
    task = make_task()
    nothing = torch.zeros(T, L, 2, dtype=torch.bool)
    for weighting in WEIGHTINGS:
        weight_T = prepared(RouterSuperposition(weighting=weighting, samples=4), task).weight_T
        damage_T = _damage(task, 4)
        cost_T = weight_T.double() * damage_T
        assert cost_T[1:].median() == pytest.approx(1.0, rel=1e-5)
        assert cost_T.max() <= CAP * (1 + 1e-5)
        assert weight_T[0] == 0
    relative = prepared(RouterSuperposition(weighting="relative"), task, nothing)
    x, y = noise_for(5, range(6), TEACHER), torch.arange(6) % 5
    mask = np.zeros((T, L, 2), dtype=bool)
    mask[2] = True
    plans = (
        full_plan(task.signature, task.sampler, GUIDANCE),
        CachePlan(task.signature, task.sampler, GUIDANCE, router_steps(mask), task.sampler),
    )
    full, cached = (list(sample_steps(TEACHER, plan, x, y))[2].eps for plan in plans)
    assert float((cached - full).square().mean()) == pytest.approx(float(reuse_damage(task, x, y)[2]), rel=1e-4)
    assert float(relative.weight_T[2] / relative.weight_T[3]) == pytest.approx(float(1 / _damage(task)[2] * _damage(task)[3]), rel=1e-4)


def _damage(task: Task, images: int = 2) -> Tensor:
    """On the images that a router's weights are measured on."""
    noise = noise_for(MEASURE_SEED, range(images), TEACHER)
    return reuse_damage(task, noise, labels_for(MEASURE_SEED, range(images), TEACHER.config.num_classes))


@pytest.mark.parametrize(("weighting", "power"), [("effect", 1), ("image_error", 2)])
def test_errors_are_weighed_by_what_they_do_to_the_image(weighting: str, power: int) -> None:
    task, x, y = make_task(), noise_for(5, range(2), TEACHER), torch.arange(2)
    effect_T = step_effect(TEACHER, full_plan(task.signature, task.sampler, GUIDANCE), x, y)
    damage_T = reuse_damage(task, x, y)
    cost_T = (effect_T * damage_T**power)[1:]
    expected_T = (cost_T / cost_T.median()).clamp(max=CAP) / damage_T[1:]
    assert torch.allclose(step_weights(weighting, task, x, y)[1:], expected_T)


def test_on_other_batches_the_router_costs_nothing() -> None:
    task = make_task()
    objective, batch = prepared(RouterSuperposition(every=2), task), pairs(task, [1, 3])
    loss = objective.loss(batch, 1)
    loss.total.backward()
    assert (loss.total.item(), loss.logs, batch._caches) == (0.0, {}, {})
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())
    assert objective.loss(batch, 2).total > 0


def test_measures_take_the_router_as_a_plan_does() -> None:
    task = make_task()
    batch = pairs(task, [1, 2, 4])
    everything = prepared(RouterSuperposition(), task, torch.ones(T, L, 2, dtype=torch.bool)).measure(batch)
    assert float(everything["router_computed"]) == 1.0
    assert float(everything["router_mse"]) < 1e-9
    nothing = prepared(RouterSuperposition(), task, torch.zeros(T, L, 2, dtype=torch.bool)).measure(batch)
    assert float(nothing["router_computed"]) == 0.0
    assert float(nothing["router_mse"]) > 1e-4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.0}, "beta is 0"),
        ({"weighting": "much"}, "unknown weighting 'much', choose one of effect, none"),
        ({"samples": 0}, "samples is 0"),
        ({"threshold": 1.0}, "threshold is 1"),
    ],
)
def test_arguments_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        RouterRollout(**wrong)


def test_what_cannot_be_trained_is_said() -> None:
    with pytest.raises(RunError, match="every is 0 and hidden_size 64"):
        RouterSuperposition(every=0)
    with pytest.raises(RunError, match=r"use data\.rollouts\.RolloutDataModule"):
        prepared(RouterRollout(), make_task()).loss(pairs(make_task(), [1, 2]), 0)
    silent = make_teacher(0, depth=3, in_channels=2, hidden_size=16)
    torch.nn.init.zeros_(silent.final_layer.linear.weight)
    task = Task(silent, model_signature(silent), vp_sampler("ddim", T), GUIDANCE)
    with pytest.raises(RunError, match="the teacher's blocks do nothing"):
        step_weights("none", task, noise_for(0, range(1), silent), torch.zeros(1, dtype=torch.long))
