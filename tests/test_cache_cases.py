"""Scores of what forecasts get wrong: cases by hand, forecasts as a plan's run makes them, and the step before as one of them."""

from __future__ import annotations

import pytest
import torch
from conftest import make_plan, make_teacher, vp_sampler
from torch import Tensor

from tc_lightning.cache.semantics import forecast
from tc_lightning.cache.soft_forecast import forecast_caches
from tc_lightning.cache.soft_network import StepCaches, full_eps, mixed_branches_eps, mixed_eps, reused_eps
from tc_lightning.errors import RunError
from tc_lightning.learn.objectives.base import Batch, Task
from tc_lightning.measure.cache_cases import REPEATED, CacheCases, Case
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import BRANCHES, compute, partial, reuse, skip
from tc_lightning.rollout.sampling import SamplingStep, full_plan, model_signature, noise_for, sample_steps

DEPTH = 3
TEACHER = make_teacher(0, depth=DEPTH, in_channels=2, hidden_size=16)
GUIDED, PLAIN = Guidance(1.5, 1), Guidance(1.0, 2)
LABELS = torch.tensor([1, 4])
FULL = (compute(0, DEPTH),)


def test_cases_by_hand() -> None:
    assert REPEATED.each == (Case(0, 1, 1),)
    assert REPEATED.reach == 1
    between = CacheCases((2, 1), (3, 2))
    assert (between.orders, between.gaps) == ((1, 2), (2, 3))
    assert between.each == tuple(Case(order, gap, age) for order in (1, 2) for gap, age in ((2, 1), (3, 1), (3, 2)))
    assert between.reach == 8
    assert [Case(2, 3, 2).reads(step).sources for step in (11, 5, 4, 1)] == [(9, 6, 3), (3, 0), (2, 0), (0,)]
    assert Case(0, 4, 3).reads(2).sources == (0,)
    assert REPEATED.reads(5, 7) == ((6,), (1.0,), (1.0,))
    assert CacheCases((1,), (2,), 1).reads(0, 9) == ((8, 6), (1.5, -0.5), (1.5, -0.5))
    assert CacheCases((0,), (2,), 2).reads(0, 9) == ((8, 6, 4), (1.0, 0.0, 0.0), (1.875, -1.25, 0.375))
    assert CacheCases((0,), (2,), 2).reach == 5
    assert CacheCases((1, 2), (2, 3)).in_words == "forecasts at order 1 or 2 (keys and values at order 0) from full steps 2 or 3 apart"
    assert CacheCases((2,), (4,), 2).in_words == "forecasts at order 2 from full steps 4 apart"


def test_every_case_is_met_at_every_step_and_in_every_trajectory() -> None:
    cases = CacheCases((0, 1, 2), (2, 3))
    count = len(cases.each)
    assert {cases.reads(index, 20).sources for index in range(count)} == {case.reads(20).sources for case in cases.each}
    met = [(step, cases.reads(4, step).sources) for step in range(19, 19 + count)]
    met_back = {tuple(step - source for source in sources) for step, sources in met}
    assert met_back == {tuple(20 - source for source in case.reads(20).sources) for case in cases.each}


@pytest.mark.parametrize(("orders", "gaps"), [((), (1,)), ((3,), (1,)), ((-1,), (1,)), ((0,), ()), ((0,), (0,)), ((0,), (101,))])
def test_what_no_plan_could_be_is_refused(orders: tuple[int, ...], gaps: tuple[int, ...]) -> None:
    with pytest.raises(RunError, match="name at least one, each"):
        CacheCases(orders, gaps)
    with pytest.raises(RunError, match="kv_order is 3: choose 0 to 2"):
        CacheCases(kv_order=3)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_polynomial_series_is_forecast_exactly(order: int) -> None:
    for step in range(9, 14):
        read = CacheCases((order,), (2, 3), order).reads(0, step)
        for weights in (read.weights, read.kv_weights):
            forecast_of = sum(w * s**order for s, w in zip(read.sources, weights, strict=True))
            assert forecast_of == pytest.approx(step**order if order else 1)


def run(plan_steps: tuple, guidance: Guidance = GUIDED) -> list[SamplingStep]:
    plan = make_plan(TEACHER, plan_steps, guidance)
    return list(sample_steps(TEACHER, plan, noise_for(3, range(2), TEACHER), LABELS))


def time(step: int, num_steps: int) -> float:
    return vp_sampler("ddim", num_steps).steps[step].t


def cached(states: list[SamplingStep], case: Case, step: int, guidance: Guidance = GUIDED) -> StepCaches:
    """What the soft forms take at a step of a run whose full steps are those of the case."""
    read = case.reads(step)
    both = [(row, source) for row in range(2) for source in read.sources]
    x = torch.stack([states[source].x[row] for row, source in both])
    t = torch.tensor([time(source, len(states)) for _, source in both])
    return forecast_caches(TEACHER, guidance, x, t, LABELS[[row for row, _ in both]], [read.weights] * 2, [read.kv_weights] * 2)


def soft_args(states: list[SamplingStep], step: int) -> tuple[Tensor, Tensor, Tensor]:
    return states[step].x, torch.full((2,), time(step, len(states))), LABELS


@pytest.mark.parametrize("guidance", [GUIDED, PLAIN])
@pytest.mark.parametrize("gap", [2, 3])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_weights_of_0_are_the_plan_that_skips_everything(order: int, gap: int, guidance: Guidance) -> None:
    states = run(tuple(FULL if i % gap == 0 else (skip(0, DEPTH, order),) for i in range(9)), guidance)
    for step in (i for i in range(9) if i % gap):
        caches = cached(states, Case(order, gap, step % gap), step, guidance)
        eps = reused_eps(TEACHER, guidance, caches.blocks, *soft_args(states, step))
        torch.testing.assert_close(eps, states[step].eps, rtol=1e-4, atol=1e-4)
        mixed = mixed_eps(TEACHER, guidance, caches.blocks, *soft_args(states, step), torch.zeros(2, DEPTH, 16))
        torch.testing.assert_close(mixed, states[step].eps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_branches_of_weight_0_are_the_plan_that_reuses_them(order: int) -> None:
    light = (reuse(0, 1, ("mlp",), order), reuse(1, 2, BRANCHES, order), compute(2, 3))
    states = run(tuple(light if i % 3 else FULL for i in range(9)))
    w = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]).expand(2, -1, -1)
    for step in (i for i in range(9) if i % 3):
        caches = cached(states, Case(order, 3, step % 3), step)
        eps, _ = mixed_branches_eps(TEACHER, GUIDED, caches.branches, *soft_args(states, step), w)
        torch.testing.assert_close(eps, states[step].eps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("order", "kv_order", "gap"), [(0, 0, 2), (0, 2, 3), (1, 1, 3), (1, 2, 3), (2, 1, 2), (2, 2, 3)])
def test_tokens_of_weight_1_are_the_plan_that_recomputes_them(order: int, kv_order: int, gap: int) -> None:
    """Keys and values are forecast at an order of their own. (Where they are repeated, steps that follow one another update them.)"""
    kept = ((0, 3, 7), (2,), (1, 5, 9, 15))
    light = tuple(partial(b, b + 1, tokens, order, kv_order=kv_order) for b, tokens in enumerate(kept))
    states = run(tuple(light if i % gap else FULL for i in range(9)))
    w = torch.zeros(2, DEPTH, 16)
    for b, tokens in enumerate(kept):
        w[:, b, list(tokens)] = 1.0
    for step in (i for i in range(9) if i % gap):
        caches = cached(states, Case(order, gap, step % gap, kv_order), step)
        eps = mixed_eps(TEACHER, GUIDED, caches.blocks, *soft_args(states, step), w)
        torch.testing.assert_close(eps, states[step].eps, rtol=1e-4, atol=1e-4)


def test_images_of_different_cases_share_a_batch() -> None:
    """Each gets what it would get alone: one from a single full step, one from three, for both halves of guidance."""
    x, t, labels = noise_for(3, range(4), TEACHER), torch.tensor([400.0, 500.0, 600.0, 700.0]), torch.tensor([1, 4, 4, 4])
    together = forecast_caches(TEACHER, GUIDED, x, t, labels, [(1.0,), (3.0, -3.0, 1.0)], [(1.0,), (2.0, -1.0, 0.0)])
    alone = [full_eps(TEACHER, GUIDED, x[i : i + 1], t[i : i + 1], labels[i : i + 1])[1] for i in range(4)]
    for b in range(DEPTH):
        of = [[*caches.blocks[b].kv, caches.blocks[b].residual, *caches.branches[b].values()] for caches in alone]
        found = together.blocks[b]
        for j, value in enumerate([*found.kv, found.residual, *together.branches[b].values()]):
            weights = (2.0, -1.0, 0.0) if j < 2 else (3.0, -3.0, 1.0)
            expected = torch.cat([of[0][j], forecast([of[i][j] for i in (1, 2, 3)], weights)]).unflatten(0, (2, 2))
            torch.testing.assert_close(value, expected.transpose(0, 1).flatten(0, 1), rtol=1e-4, atol=1e-4)


def make_batch(cases: CacheCases, steps: list[int]) -> Batch:
    """Pairs of a recorded trajectory each, the latents of the steps before as far as forecasts reach."""
    signature, sampler = model_signature(TEACHER), vp_sampler("ddim", 12)
    labels = torch.arange(len(steps)) % 5
    states = list(sample_steps(TEACHER, full_plan(signature, sampler, GUIDED), noise_for(3, range(len(steps)), TEACHER), labels))

    def at(row: int, back: int) -> Tensor:
        return states[max(steps[row] - back, 0)].x[row]

    rows = range(len(steps))
    content = {
        "x_prev": torch.stack([torch.stack([at(row, 1 + r) for r in range(cases.reach)]) for row in rows]),
        "x": torch.stack([at(row, 0) for row in rows]),
        "eps": torch.stack([states[steps[row]].eps[row] for row in rows]),
        "label": labels,
        "step": torch.tensor(steps),
        "index": torch.arange(len(steps)),
    }
    return Batch(Task(TEACHER, signature, sampler, GUIDED, cases), content)


def test_order_0_and_gap_1_are_the_step_before_bit_for_bit() -> None:
    batch = make_batch(CacheCases((1, 2), (2, 3)), [1, 4, 5, 11])
    b = batch.content
    _, before = full_eps(TEACHER, GUIDED, b["x_prev"][:, 0], batch.times(batch.step - 1), b["label"])
    found = batch.caches(REPEATED)
    for ours, theirs in zip(found.blocks, before.blocks, strict=True):
        assert torch.equal(ours.residual, theirs.residual)
        assert all(torch.equal(a, c) for a, c in zip(ours.kv, theirs.kv, strict=True))
    for ours, theirs in zip(found.branches, before.branches, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in BRANCHES)
    again = batch.error_B(reused_eps(TEACHER, GUIDED, before.blocks, b["x"], batch.times(batch.step), b["label"]))
    assert torch.equal(batch.reuse_error_B(REPEATED), again)
    assert batch.caches(REPEATED) is found  # shared by all objectives


def test_a_batch_forecasts_each_pair_from_its_own_full_steps() -> None:
    cases, steps = CacheCases((0, 1, 2), (2, 3), 1), [1, 4, 7, 11, 2, 9]
    batch = make_batch(cases, steps)
    found = batch.caches(cases)
    for row, step in enumerate(steps):
        read = cases.reads(row, step)
        x = torch.stack([batch.content["x_prev"][row, step - 1 - source] for source in read.sources])
        t = torch.tensor([time(source, 12) for source in read.sources])
        label = batch.content["label"][row].expand(len(x))
        own = forecast_caches(TEACHER, GUIDED, x, t, label, [read.weights], [read.kv_weights])
        for b in range(DEPTH):
            for value, expected in ((found.blocks[b].residual, own.blocks[b].residual), (found.blocks[b].kv.k, own.blocks[b].kv.k)):
                torch.testing.assert_close(value.unflatten(0, (2, -1))[:, row], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batch.reuse_error_B(cases), batch.reuse_error_B(REPEATED), rtol=0.1)
