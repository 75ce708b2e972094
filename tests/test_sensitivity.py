from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import vp_sampler
from torch import Tensor

from tc_lightning.cache.semantics import Step, run_blocks
from tc_lightning.cache.soft_forecast import forecast_caches
from tc_lightning.cache.soft_network import enter, full_eps, guided_eps
from tc_lightning.learn.planning import trajectory_sensitivity
from tc_lightning.measure.cache_cases import CacheCases, Case
from tc_lightning.measure.sensitivity import branch_sensitivity, probes_for, token_sensitivity
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import BRANCHES, Segment, compute, reuse, skip
from tc_lightning.rollout.sampling import SamplingStep, full_plan, model_signature, noise_for, sample_steps

CONFIG = DiTConfig(input_size=8, in_channels=2, hidden_size=24, depth=3, num_heads=2, num_classes=5, learn_sigma=True)
GUIDANCES = [Guidance(1.0, 2), Guidance(1.5, 2), Guidance(4.0, 1)]


@pytest.fixture(scope="module")
def model() -> DiT:
    return randomise_(DiT(CONFIG), 0, 0.15).double().eval().requires_grad_(False)


def inputs(scale: float, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_prev, x, t_prev, t, labels; a small scale puts the steps close together."""
    generator = torch.Generator().manual_seed(1)
    x, move = torch.randn(2, batch, 2, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([400.0, 700.0], dtype=torch.float64)[:batch]
    return x + scale * move, x, t + 20 * scale, t, torch.tensor([3, 0])[:batch]


def estimate(
    model: DiT, guidance: Guidance, args: tuple[Tensor, ...], probes: Tensor, measure: Callable = branch_sensitivity
) -> Tensor:
    """Of reuse from the step before."""
    x_prev, x, t_prev, t, labels = args
    return measure(model, guidance, full_eps(model, guidance, x_prev, t_prev, labels)[1].branches, x, t, labels, probes)


def intervene(model: DiT, guidance: Guidance, x_prev: Tensor, x: Tensor, t_prev: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Mean squared change of guided eps, [B, L, 2], reusing one branch of one block at a time with the semantics of a plan."""
    L, blocks = CONFIG.depth, list(model.blocks)

    def run(x: Tensor, t: Tensor, segments: tuple[Segment, ...], cached: dict, wanted: list) -> tuple[Tensor, dict]:
        z, mods, final = enter(model, guidance, x, t, y)
        z, writes = run_blocks(Step(segments, (None,) * len(segments), cached, wanted), z, blocks, mods)
        return guided_eps(model, guidance, z, final), writes

    entries = [Entry(branch, b, b + 1) for b in range(L) for branch in BRANCHES]
    _, cached = run(x_prev, t_prev, (compute(0, L),), {}, entries)
    eps, _ = run(x, t, (compute(0, L),), {}, [])
    changes = []
    for entry in entries:
        b = entry.start
        parts = (compute(0, b), reuse(b, b + 1, (entry.kind,)), compute(b + 1, L))
        changed, _ = run(x, t, tuple(s for s in parts if s.start < s.stop), cached, [])
        changes.append((changed - eps).square().flatten(1).mean(1))
    return torch.stack(changes, 1).unflatten(1, (L, 2))


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_agrees_with_intervention_within_sampling_error(model: DiT, guidance: Guidance) -> None:
    args, probes = inputs(1e-4), 1000
    v = torch.randn(probes, 2, 2, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ratio = estimate(model, guidance, args, v) / intervene(model, guidance, *args)
    assert (ratio - 1).abs().max() < 4.5 * (2 / probes) ** 0.5
    assert abs(ratio.mean() - 1) < 0.1


def test_ranks_like_intervention_for_realistic_steps(model: DiT) -> None:
    args, guidance = inputs(0.1), Guidance(1.5, 2)
    v = torch.randn(200, 2, 2, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    estimated = estimate(model, guidance, args, v).mean(0).flatten()
    measured = intervene(model, guidance, *args).mean(0).flatten()
    ranks = [np.argsort(np.argsort(values.numpy())) for values in (estimated, measured)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9


def test_does_not_depend_on_the_batch(model: DiT) -> None:
    args, guidance = inputs(0.1), Guidance(1.5, 2)
    v = probes_for(model, sample=7, steps=[3, 4], count=2).double()
    together = estimate(model, guidance, args, v)
    alone = estimate(model, guidance, tuple(a[1:] for a in args), probes_for(model, 7, [4], 2).double())
    assert torch.allclose(together[1:], alone, rtol=1e-9)
    assert not torch.equal(probes_for(model, 7, [3], 1), probes_for(model, 8, [3], 1))


def test_unchanged_latents_cost_nothing_to_reuse(model: DiT) -> None:
    args, v = inputs(0.0), probes_for(model, 0, [1, 2], 1).double()
    assert not estimate(model, Guidance(1.5, 2), args, v).any()


def test_a_branch_is_bounded_by_its_tokens(model: DiT) -> None:
    args, v = inputs(1e-3), probes_for(model, 0, [1, 2], 3).double()
    tokens = estimate(model, Guidance(1.5, 2), args, v, token_sensitivity)
    branch = estimate(model, Guidance(1.5, 2), args, v)
    assert tokens.shape == (*branch.shape, CONFIG.num_tokens)
    assert (branch <= CONFIG.num_tokens * tokens.sum(-1) * (1 + 1e-9)).all()  # Cauchy-Schwarz


LABELS = torch.tensor([3, 0])
FINE = dataclasses.replace(FINEST := vp_sampler("ddim", 1000), steps=FINEST.steps[:12])


def interrupted(model: DiT, order: int, gap: int, step: int, part: tuple[Segment, ...]) -> list[SamplingStep]:
    """A run up to `step`, at which it does `part`; before that, steps at multiples of `gap` are full, and the others forecast all."""
    full, skipped = (compute(0, CONFIG.depth),), (skip(0, CONFIG.depth, order),)
    steps = [full if i % gap == 0 else skipped for i in range(len(FINE))]
    steps[step] = tuple(s for s in part if s.start < s.stop)
    plan = CachePlan(model_signature(model), FINE, Guidance(1.5, 2), tuple(steps), FINE)
    return list(itertools.islice(sample_steps(model, plan, noise_for(0, range(2), model).double(), LABELS), step + 1))


@pytest.mark.parametrize(("order", "gap", "age"), [(0, 2, 1), (1, 2, 1), (1, 3, 2), (2, 2, 1)])
def test_is_what_replacing_a_branch_by_its_forecast_does_in_a_run(model: DiT, order: int, gap: int, age: int) -> None:
    """With the axes of the output for probes the estimate is exact but for second order, which the finest steps make small."""
    step, L, guidance, times = 6 + age, CONFIG.depth, Guidance(1.5, 2), [row.t for row in FINE.steps]
    states = interrupted(model, order, gap, step, (compute(0, L),))
    axes = torch.eye(128, dtype=torch.float64).mul(128**0.5).reshape(128, 1, 2, 8, 8).expand(-1, 2, -1, -1, -1)

    read = Case(order, gap, age).reads(step)
    of = [(row, source) for row in range(2) for source in read.sources]
    x, t = torch.stack([states[source].x[row] for row, source in of]), torch.tensor([times[source] for _, source in of])
    labels, weights = LABELS[[row for row, _ in of]], [read.weights] * 2
    cached = forecast_caches(model, guidance, x, t, labels, weights, weights).branches
    found = branch_sensitivity(model, guidance, cached, states[step].x, torch.full((2,), times[step]), LABELS, axes)

    for b, (place, branch) in itertools.product(range(L), enumerate(BRANCHES)):
        run = interrupted(model, order, gap, step, (compute(0, b), reuse(b, b + 1, (branch,), order), compute(b + 1, L)))
        changed = (run[step].eps - states[step].eps).square().flatten(1).mean(1)
        torch.testing.assert_close(found[:, b, place], changed, rtol=0.15, atol=0.0)


def test_a_trajectory_is_measured_case_by_case(model: DiT) -> None:
    """Row i of sample s is what its own case says, whatever steps share a pass with it."""
    cases, sample, steps = CacheCases((0, 2), (2, 3)), 5, 14
    plan = full_plan(model_signature(model), vp_sampler("ddim", steps), Guidance(1.5, 2))
    x_1CHW, label = noise_for(1, [0], model).double(), torch.tensor([2])
    rows = trajectory_sensitivity(model, plan, x_1CHW, label, sample, 2, cases)
    states = list(sample_steps(model, plan, x_1CHW, label))
    for step in (1, 6, 7, 13):
        read = cases.reads(sample, step)
        x = torch.cat([states[source].x for source in read.sources])
        t = torch.tensor([plan.sampler.steps[source].t for source in read.sources])
        weights = [read.weights], [read.kv_weights]
        cached = forecast_caches(model, plan.guidance, x, t, label.expand(len(x)), *weights).branches
        now = states[step].x, torch.tensor([plan.sampler.steps[step].t]), label
        alone = branch_sensitivity(model, plan.guidance, cached, *now, probes_for(model, sample, [step], 2).double())
        torch.testing.assert_close(rows[step], alone[0], rtol=1e-6, atol=0.0)
