"""Sampling with a cache: nothing cached is the teacher, skip and reuse by hand, requests that leave nothing behind."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from caching import EVERYTHING, LABELS, tokens_of
from conftest import FULL, make_plan, make_teacher
from torch import Tensor

from tc_lightning.cache.semantics import Step, forecast, run_blocks
from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.models.dit import DiT
from tc_lightning.models.network import KeyValue
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, partial, reuse, skip
from tc_lightning.rollout.sampling import full_plan, kept_tokens, model_signature, noise_for, sample, sample_steps


def by_hand(model: DiT, plan: CachePlan, x: Tensor, labels: Tensor) -> Tensor:
    """Guidance and sampler over the teacher's own forward; no caching code is involved."""
    scale, guided = plan.guidance.scale, plan.guidance.channels
    past: list[Tensor] = []
    for row in plan.sampler.steps:
        t = torch.full((len(labels),), row.t)
        if scale == 1.0:
            eps = model.eps(x, t, labels)
        else:
            null = torch.full_like(labels, model.config.num_classes)
            both = model.eps(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null]))
            cond, uncond = both[: len(x)], both[len(x) :]
            eps = cond.clone()
            eps[:, :guided] = uncond[:, :guided] + (cond[:, :guided] - uncond[:, :guided]) * scale
        m = x * row.m_x + eps * row.m_eps
        x = x * row.next_x + m * row.next_m
        if row.next_m_prev:
            x = x + past[-1] * row.next_m_prev
        if row.next_m_prev2:
            x = x + past[-2] * row.next_m_prev2
        past.append(m)
    return x


# Full compute


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "dpmpp_3m"])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.5, 4), Guidance(2.5, 3), Guidance(0.0, 4)])
@torch.no_grad()
def test_computing_everything_is_the_teacher_bit_for_bit(teacher, guidance, sampler):
    plan = make_plan(teacher, (FULL,) * 6, guidance, sampler, "logsnr")
    x = noise_for(3, range(2), teacher)
    final = sample(teacher, plan, x, LABELS)
    assert torch.equal(final, by_hand(teacher, plan, x, LABELS))
    other = by_hand(teacher, plan, x, torch.tensor([0, 2]))
    assert torch.equal(final, other) == (guidance.scale == 0.0)  # which is unconditional
    assert full_plan(plan.model, plan.sampler, guidance).steps == plan.steps


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@torch.no_grad()
def test_eps_scale_multiplies_the_guided_eps(teacher, sampler):
    """A factor of 1 changes no bit; others do what multiplying the output of the network by them does."""
    factors = (1.0, 0.9, 1.25, 0.5)
    x = noise_for(3, range(2), teacher)
    plain = make_plan(teacher, (FULL,) * 4, sampler=sampler)
    assert torch.equal(sample(teacher, dataclasses.replace(plain, eps_scale=(1.0,) * 4), x, LABELS), sample(teacher, plain, x, LABELS))
    states = list(sample_steps(teacher, dataclasses.replace(plain, eps_scale=factors), x, LABELS))
    m_prev = torch.zeros_like(x)
    for state, row, factor in zip(states, plain.sampler.steps, factors, strict=True):
        m = row.m_x * x + row.m_eps * factor * state.eps
        x, m_prev = row.next_x * x + row.next_m * m + row.next_m_prev * m_prev, m
        torch.testing.assert_close(state.x_next, x, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dividing_the_blocks_changes_nothing(teacher):
    """Writing entries, and cutting compute into segments, leaves the numbers bit for bit."""
    x = noise_for(3, range(2), teacher)
    whole = make_plan(teacher, (FULL,) * 3)
    cut = make_plan(teacher, ((compute(0, 1), compute(1, 4)), (compute(0, 2), compute(2, 4)), FULL))
    assert torch.equal(sample(teacher, whole, x, LABELS), sample(teacher, cut, x, LABELS))
    reading = make_plan(teacher, (FULL, FULL, (skip(0, 4),)))
    states = [list(sample_steps(teacher, p, x, LABELS)) for p in (whole, reading)]
    assert torch.equal(states[0][1].x_next, states[1][1].x_next)
    assert not torch.equal(states[0][2].x_next, states[1][2].x_next)


@torch.no_grad()
def test_keeping_every_token_is_full_compute(teacher):
    x = noise_for(4, range(2), teacher)
    full = sample(teacher, make_plan(teacher, (FULL,) * 5), x, LABELS)
    every = (partial(0, 4, EVERYTHING),)
    kept = sample(teacher, make_plan(teacher, (FULL, *(every,) * 4)), x, LABELS)
    torch.testing.assert_close(kept, full, rtol=1e-5, atol=1e-5)
    fewer = (partial(0, 4, EVERYTHING[:-1]),)
    other = sample(teacher, make_plan(teacher, (FULL, *(fewer,) * 4)), x, LABELS)
    assert (other - full).abs().max() > 1e-3 * full.abs().max()


# Skip and reuse


@torch.no_grad()
def test_skip_is_the_forecast_by_hand(teacher):
    """Full at 0, 1, 3; step 5 forecasts from (3, 1, 0) with weights 20/6 (5*4/(3*2)), -5 (5*2/(1*-2)), 8/3 (4*2/(-1*-3))."""
    steps = (FULL, FULL, (skip(0, 4, 2),), FULL, (skip(0, 4, 0),), (skip(0, 4, 2),))
    plan = make_plan(teacher, steps, Guidance())
    states = list(sample_steps(teacher, plan, noise_for(1, range(2), teacher), LABELS))

    def residual(i: int) -> Tensor:
        t = torch.full((2,), plan.sampler.steps[i].t)
        mods, _ = teacher.modulations(teacher.condition(t, label=LABELS))
        z = start = teacher.embed(states[i].x)
        for block, mod in zip(teacher.blocks, mods, strict=True):
            z = block(z, mod)
        return z - start

    def eps(i: int, r: Tensor) -> Tensor:
        t = torch.full((2,), plan.sampler.steps[i].t)
        _, final = teacher.modulations(teacher.condition(t, label=LABELS))
        return teacher.readout(teacher.embed(states[i].x) + r, final)[:, :4]

    r = {i: residual(i) for i in (0, 1, 3)}
    expected = {2: 2 * r[1] - r[0], 4: r[3], 5: 20 / 6 * r[3] - 5 * r[1] + 8 / 3 * r[0]}
    for i, value in expected.items():
        torch.testing.assert_close(states[i].eps, eps(i, value), rtol=1e-5, atol=1e-5)
    assert (states[5].eps - eps(5, r[3])).abs().max() > 1e-3


def test_forecast_of_one_value_is_that_value():
    x = torch.randn(3)
    assert forecast([x], ()) is x
    torch.testing.assert_close(forecast([x, 2 * x, 3 * x], (3.0, -3.0, 1.0)), 0 * x)


@pytest.mark.parametrize("branches", [("attn",), ("mlp",), ("attn", "mlp")])
@torch.no_grad()
def test_reuse_applies_the_current_gate(teacher, branches):
    """What is cached is the branch before its gate; the branch that is not reused is computed from the current tokens."""
    block, b = teacher.blocks[1], 1
    z_old, mods_old, _ = tokens_of(teacher, t=900.0)
    z, mods, _ = tokens_of(teacher, t=300.0, seed=1)
    assert (mods_old[b].gate_attn - mods[b].gate_attn).abs().max() > 0.01

    a_old, _ = block.attn_branch(z_old, mods_old[b])
    m_old = block.mlp_branch(z_old + mods_old[b].gate_attn * a_old, mods_old[b])
    h = z + mods[b].gate_attn * (a_old if "attn" in branches else block.attn_branch(z, mods[b])[0])
    expected = h + mods[b].gate_mlp * (m_old if "mlp" in branches else block.mlp_branch(h, mods[b]))

    cached = {Entry("attn", b, b + 1): a_old, Entry("mlp", b, b + 1): m_old}
    step = Step((reuse(b, b + 1, branches),), (None,), cached, ())
    out, writes = run_blocks(step, z, list(teacher.blocks), mods)
    assert torch.equal(out, expected)
    assert writes == {}
    assert (out - block(z, mods[b])).abs().max() > 1e-3


@torch.no_grad()
def test_reuse_returns_what_it_computed(teacher):
    z, mods, _ = tokens_of(teacher)
    a, kv = teacher.blocks[0].attn_branch(z, mods[0])
    wanted = [Entry(kind, 0, 1) for kind in ("attn", "k", "v")]
    step = Step((reuse(0, 1, ("mlp",)),), (None,), {Entry("mlp", 0, 1): torch.zeros_like(z)}, wanted)
    _, writes = run_blocks(step, z, list(teacher.blocks), mods)
    assert set(writes) == set(wanted)
    assert all(torch.equal(writes[entry], value) for entry, value in zip(wanted, (a, kv.k, kv.v), strict=True))


# Isolation


@torch.no_grad()
def test_nothing_survives_a_request(teacher, plan):
    first, second = (noise_for(seed, range(2), teacher) for seed in (1, 2))
    fresh = sample(teacher, plan, second, LABELS)
    sample(teacher, plan, first, torch.tensor([4, 4]))
    assert torch.equal(sample(teacher, plan, second, LABELS), fresh)


@torch.no_grad()
def test_an_interrupted_request_leaves_nothing_behind(teacher, plan):
    x = noise_for(2, range(2), teacher)
    fresh = sample(teacher, plan, x, LABELS)
    steps = sample_steps(teacher, plan, noise_for(9, range(2), teacher), LABELS)
    for _ in range(4):
        next(steps)
    assert torch.equal(sample(teacher, plan, x, LABELS), fresh)


@torch.no_grad()
def test_images_of_a_batch_are_independent(teacher, plan):
    x, labels = noise_for(0, range(3), teacher), torch.tensor([0, 3, 3])
    together = sample(teacher, plan, x, labels)
    for i in range(3):
        alone = sample(teacher, plan, x[i : i + 1], labels[i : i + 1])
        assert (together[i] - alone[0]).norm() < 1e-5 * alone.norm()


@torch.no_grad()
def test_halves_of_guidance_have_their_own_cache(teacher):
    plan = make_plan(teacher, (FULL, (skip(0, 4),)), Guidance(2.0, 4))
    states = list(sample_steps(teacher, plan, noise_for(0, range(2), teacher), LABELS))
    span = states[0].writes[Entry("span", 0, 4)]
    eps = []
    for half, labels in ((span[:2], LABELS), (span[2:], torch.full_like(LABELS, 5))):
        z, mods, _ = tokens_of(teacher, plan.sampler.steps[0].t, 0, labels)
        own, _ = run_blocks(Step(FULL, (None,), {}, ()), z, list(teacher.blocks), mods)
        torch.testing.assert_close(half, own - z, rtol=1e-4, atol=1e-4)
        _, _, final = tokens_of(teacher, plan.sampler.steps[1].t, 0, labels)
        eps.append(teacher.readout(teacher.embed(states[1].x) + half, final)[:, :4])
    torch.testing.assert_close(states[1].eps, eps[1] + 2.0 * (eps[0] - eps[1]), rtol=1e-4, atol=1e-4)
    assert (span[:2] - span[2:]).abs().max() > 0.01


@torch.no_grad()
def test_store_holds_what_is_still_read_and_no_more(teacher):
    plan = make_plan(teacher, (FULL, (skip(0, 4),), FULL, FULL, (skip(0, 4, 1),), FULL), Guidance())
    states = list(sample_steps(teacher, plan, noise_for(0, range(2), teacher), LABELS))
    span = Entry("span", 0, 4)
    assert [sorted(step for _, step in s.store) for s in states] == [[], [0], [], [2], [2, 3], []]
    assert [set(s.writes) for s in states] == [{span}, set(), {span}, {span}, set(), set()]


# Blocks that can be run by hand


class Doubling:
    """A block that doubles its input, in its attention; its MLP adds 1."""

    branches, source = ("attn", "mlp"), None

    def __init__(self) -> None:
        self.calls = 0

    def branch(self, name: str, z: float, mod: SimpleNamespace) -> tuple[float, KeyValue | None]:
        self.calls += name == "attn"
        return (z, KeyValue(10 * z, 100 * z)) if name == "attn" else (1.0, None)

    def gated(self, name: str, update: float, mod: SimpleNamespace, at: None) -> float:
        return getattr(mod, f"gate_{name}") * update


OPEN = SimpleNamespace(gate_attn=1.0, gate_mlp=0.0)


def run(segments, cached=None, wanted=(), z=1.0, mods=None):
    blocks = [Doubling() for _ in range(3)]
    step = Step(tuple(segments), (None,) * len(segments), cached or {}, wanted)
    out, writes = run_blocks(step, z, blocks, mods or [OPEN] * 3)
    return out, writes, [block.calls for block in blocks]


def test_doubling_blocks_cached_and_not():
    spans = [Entry("span", 0, 3), Entry("span", 1, 3)]
    out, writes, calls = run([compute(0, 3)], wanted=[*spans, Entry("attn", 1, 2), Entry("k", 2, 3), Entry("v", 0, 1)])
    assert (out, calls) == (8.0, [1, 1, 1])
    assert writes == {spans[0]: 7.0, spans[1]: 6.0, Entry("attn", 1, 2): 2.0, Entry("k", 2, 3): 40.0, Entry("v", 0, 1): 100.0}
    # The next step starts from 10: 80 if computed, 10 + 7 if all is skipped, 2 x 10 + 6 if the last two blocks are.
    assert run([compute(0, 3)], z=10.0)[0] == 80.0
    assert run([skip(0, 3)], writes, z=10.0)[::2] == (17.0, [0, 0, 0])
    assert run([compute(0, 1), skip(1, 3)], writes, z=10.0)[::2] == (26.0, [1, 0, 0])
    # 10 -> 20 -> 20 + 2 (cached attention of block 1) -> 44
    assert run([compute(0, 1), reuse(1, 2, ("attn",)), compute(2, 3)], writes, z=10.0)[::2] == (44.0, [1, 0, 1])


def test_doubling_blocks_with_another_gate():
    half = SimpleNamespace(gate_attn=0.5, gate_mlp=4.0)
    # block 1: 20 + 0.5 * 2 (the cached branch, the current gate) + 4 * 1 = 25
    cached = {Entry("attn", 1, 2): 2.0}
    out, _, _ = run([compute(0, 1), reuse(1, 2, ("attn",)), compute(2, 3)], cached, z=10.0, mods=[OPEN, half, OPEN])
    assert out == 50.0


def test_spans_across_segments():
    spans = [Entry("span", 0, 2), Entry("span", 1, 3), Entry("span", 2, 3)]
    _, writes, _ = run([compute(0, 1), compute(1, 3)], wanted=spans)
    assert writes == {spans[0]: 3.0, spans[1]: 6.0, spans[2]: 4.0}


# What is refused


def test_sampling_checks_labels_and_model(teacher, plan):
    x = noise_for(0, range(2), teacher)
    for label in (5, -1):
        with pytest.raises(TokenCacheError, match=f"label {label} is out of range.*0 to 4"):
            sample(teacher, plan, x, torch.tensor([0, label]))
    with pytest.raises(PlanError, match="depth"):
        sample(make_teacher(depth=3), plan, x, LABELS)


def test_nan_weights_are_named_by_step(plan):
    model = make_teacher()
    model.final_layer.linear.bias[0] = float("nan")
    plan = dataclasses.replace(plan, model=model_signature(model))
    with pytest.raises(TokenCacheError, match=r"NaN or infinite at step 0 \(t = 999\)"):
        sample(model, plan, noise_for(0, range(2), model), LABELS)


def test_kept_tokens():
    assert kept_tokens(partial(0, 1, (3, 1))).tolist() == [1, 3]
    assert kept_tokens(skip(0, 1)) is None
