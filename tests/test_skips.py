"""Long skips: what plans say and refuse of them, what they cost, and that every form of a run leads them from source to target."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import SIGNATURE as DIT
from conftest import Steps, make_plan
from mdt_models import batch, make_mdt

from tc_lightning.cache.semantics import Step, run_blocks
from tc_lightning.cache.soft_network import full_eps, mixed_branches_eps, mixed_eps, reused_eps
from tc_lightning.errors import PlanError
from tc_lightning.measure.sensitivity import branch_sensitivity, probes_for
from tc_lightning.measure.step_effect import step_effect
from tc_lightning.models.network import Taps
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import block_macs, full_step_macs, segment_macs, step_macs
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import Segment, compute, partial, reuse, skip
from tc_lightning.plan.skips import EMBEDDING, LongSkips, Skip
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample, sample_steps

MDT = make_mdt()
SIGNATURE = model_signature(MDT)
FULL = (compute(0, 6),)
ALL = tuple(range(16))
NONE, GUIDED = Guidance(), Guidance(1.5, 3)
PAIRS = ((1, 2), (0, 3), (EMBEDDING, 4), (EMBEDDING, 5))
KEEP_ALL: tuple[Segment, ...] = (partial(0, 3, ALL), partial(3, 6, ALL, 0, ("mlp",)))
EVERY_MODE: Steps = (
    FULL,
    FULL,
    (skip(0, 6, 1),),
    (compute(0, 1), skip(1, 3, 1), compute(3, 6)),
    (compute(0, 1), partial(1, 3, (0, 3, 7)), reuse(3, 4, ("attn",), 1), partial(4, 6, (2, 9), 0, ("mlp",))),
    (partial(0, 4, (1, 5, 6, 9, 15), 1), partial(4, 6, (0, 3, 4), 1)),
    (partial(0, 6, (2, 3, 8), 1),),
    KEEP_ALL,
    (reuse(0, 6, ("attn", "mlp")),),
    (compute(0, 1), skip(1, 3), compute(3, 4), skip(4, 6)),
)


# Plans


def test_a_signature_names_the_pairs_and_their_cost() -> None:
    assert LongSkips(tuple(Skip(*pair) for pair in PAIRS), 2 * 32**2) == SIGNATURE.skips
    raw = SIGNATURE.to_json()
    assert raw["skips"] == {"pairs": [[1, 2], [0, 3], [-1, 4], [-1, 5]], "macs": 2048}
    assert type(SIGNATURE).from_json(raw, "model") == SIGNATURE


def test_models_without_skips_say_nothing_of_them() -> None:
    assert "skips" not in DIT.to_json()
    assert type(DIT).from_json(DIT.to_json(), "model") == DIT


def test_a_plan_goes_to_json_and_back() -> None:
    plan = make_plan(SIGNATURE, EVERY_MODE)
    loaded = CachePlan.from_json(plan.to_json())
    assert loaded == plan
    assert loaded.digest == plan.digest


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"pairs": [[1, 2]]}, "model.skips"),
        ({"pairs": [[1, 2, 3]], "macs": 1}, "expected pairs of source and target"),
        ({"pairs": [[1, 2.0]], "macs": 1}, "expected pairs of source and target"),
        ({"pairs": [[1, 2]], "macs": "many"}, "expected pairs of source and target"),
        ({"pairs": [[2, 2]], "macs": 1}, "from block 2 to block 2 of 6: it must lead from an earlier"),
        ({"pairs": [[-2, 2]], "macs": 1}, "from block -2 to block 2"),
        ({"pairs": [[1, 6]], "macs": 1}, "from block 1 to block 6"),
        ({"pairs": [[0, 2], [1, 2]], "macs": 1}, "one for each target"),
        ({"pairs": [[1, 2]], "macs": -1}, "macs are negative"),
    ],
)
def test_skips_that_no_model_has(raw: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        type(SIGNATURE).from_json(SIGNATURE.to_json() | {"skips": raw}, "model")


@pytest.mark.parametrize(
    ("cut", "source", "target"),
    [
        ((skip(0, 2), compute(2, 6)), 1, 2),
        ((compute(0, 2), skip(2, 6)), 1, 2),
        ((compute(0, 1), skip(1, 4), compute(4, 6)), 0, 3),
        ((partial(0, 3, (1, 4)), compute(3, 6)), 0, 3),
        ((compute(0, 3), partial(3, 4, (1, 4)), compute(4, 6)), 0, 3),
        ((compute(0, 2), partial(2, 6, (1, 4), 0, ("mlp",))), 1, 2),
        ((skip(0, 1), compute(1, 6)), 0, 3),
    ],
)
def test_a_segment_that_cuts_a_skip_in_two_is_refused_in_words(cut: tuple[Segment, ...], source: int, target: int) -> None:
    segment = next(s for s in cut if s.mode in ("skip", "partial"))
    where = rf"step 1, blocks \[{segment.start}, {segment.stop}\): a {segment.mode} segment cuts the long skip "
    with pytest.raises(PlanError, match=where + rf"from block {source} to block {target} in two\. Let it hold both"):
        make_plan(SIGNATURE, (FULL, cut))


def test_every_span_that_is_accepted_holds_both_ends_or_none() -> None:
    pairs = [pair for pair in PAIRS if pair[0] != EMBEDDING]
    for start, stop in itertools.combinations(range(7), 2):
        whole = all((start <= a < stop) == (start <= b < stop) for a, b in pairs)
        steps = (FULL, tuple(s for s in (compute(0, start), skip(start, stop), compute(stop, 6)) if s.start < s.stop))
        if whole:
            make_plan(SIGNATURE, steps)
        else:
            with pytest.raises(PlanError, match="cuts the long skip"):
                make_plan(SIGNATURE, steps)


def test_taking_in_is_counted_where_it_is_computed() -> None:
    D, N = 32, 16
    block = block_macs(SIGNATURE, N)
    assert full_step_macs(SIGNATURE) == SIGNATURE.fixed_macs + 6 * block + 4 * N * 2 * D**2
    assert segment_macs(SIGNATURE, skip(0, 6)) == 0
    assert segment_macs(SIGNATURE, reuse(0, 6, ("attn", "mlp"))) == 4 * N * 2 * D**2
    assert segment_macs(SIGNATURE, partial(2, 5, (1, 2, 3))) == 3 * block_macs(SIGNATURE, 3) + 3 * 3 * 2 * D**2
    assert step_macs(SIGNATURE, (compute(0, 2), skip(2, 6))) == SIGNATURE.fixed_macs + 2 * block


# Runs


def test_streams_are_held_until_they_are_taken_in_for_the_last_time() -> None:
    taps = Taps(list(MDT.blocks), torch.tensor(-1.0))
    for b in range(6):
        taken = taps.enter(b)
        assert (None if taken is None else int(taken)) == {target: source for source, target in PAIRS}.get(b)
        taps.leave(b, torch.tensor(float(b)))
    assert not taps._held


def test_a_block_that_takes_in_tokens_does_not_run_without_them() -> None:
    mods, _ = MDT.modulations(torch.zeros(1, 32))
    with pytest.raises(AssertionError, match="the tokens of its source reach"):
        MDT.blocks[2](torch.zeros(1, 16, 32), mods[2])


def test_full_compute_is_the_network_bit_for_bit() -> None:
    x, labels = noise_for(5, range(2), MDT), torch.tensor([1, 4])
    full = full_plan(SIGNATURE, make_plan(SIGNATURE, (FULL,) * 3).sampler, NONE)
    for state in sample_steps(MDT, full, x, labels):
        t = torch.full((2,), full.sampler.steps[state.step].t)
        assert torch.equal(state.eps, MDT(state.x, t, labels)[:, :4])
    apart = dataclasses.replace(full, steps=((compute(0, 1), compute(1, 4), compute(4, 6)),) * 3)
    assert torch.equal(sample(MDT, apart, x, labels), sample(MDT, full, x, labels))


def test_keeping_every_token_is_full_compute() -> None:
    x, labels = noise_for(5, range(2), MDT), torch.tensor([1, 4])
    for kept in ((partial(0, 6, ALL),), (partial(0, 3, ALL), partial(3, 6, ALL))):
        plan = make_plan(SIGNATURE, (FULL, kept, kept), GUIDED)
        full = full_plan(SIGNATURE, plan.sampler, GUIDED)
        torch.testing.assert_close(sample(MDT, plan, x, labels), sample(MDT, full, x, labels), atol=1e-5, rtol=1e-5)


def test_a_partial_segment_that_gathers_every_token_is_full_compute() -> None:
    """The path of kept tokens itself: rows of biases, positions and skips gathered and put back, in another order for each image."""
    x, t, y = batch()
    mods, _ = MDT.modulations(MDT.condition(t, y))
    z, blocks = MDT.embed(x), list(MDT.blocks)
    entries = [Entry("span", 0, 6), *(Entry(kind, b, b + 1) for b in range(6) for kind in "kv")]
    _, cached = run_blocks(Step(FULL, (None,), {}, entries), z + 1, blocks, mods)
    expected, _ = run_blocks(Step(FULL, (None,), {}, ()), z, blocks, mods)
    for kept in (torch.randperm(16), torch.stack([torch.randperm(16) for _ in range(3)])):
        segments = (partial(0, 6, ALL[:-1]),)  # a list that is not whole takes the gathering path
        found, _ = run_blocks(Step(segments, (kept,), cached, ()), z, blocks, mods)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_kept_tokens_take_in_their_own_rows_and_others_stand_on_the_cache() -> None:
    """By hand, block by block: what the segment's kept tokens see is what one writes down for them."""
    x, t, y = batch()
    mods, _ = MDT.modulations(MDT.condition(t, y))
    z, blocks, kept = MDT.embed(x), list(MDT.blocks), torch.tensor([2, 5, 11])
    entries = [Entry("span", 0, 6), *(Entry(kind, b, b + 1) for b in range(6) for kind in "kv")]
    _, cached = run_blocks(Step(FULL, (None,), {}, entries), z + 1, blocks, mods)
    found, _ = run_blocks(Step((partial(0, 6, (2, 5, 11)),), (kept,), cached, ()), z, blocks, mods)
    rows, after = z[:, kept], {EMBEDDING: z[:, kept]}
    for b, (block, mod) in enumerate(zip(blocks, mods, strict=True)):
        if block.source is not None:
            rows = block.merge(rows, after[block.source], kept)
        q, k, v = block.qkv(rows, mod)
        k, v = cached[Entry("k", b, b + 1)].index_copy(1, kept, k), cached[Entry("v", b, b + 1)].index_copy(1, kept, v)
        split = [a.unflatten(2, (2, 16)).transpose(1, 2) for a in (q, k, v)]
        weights = (split[0] @ split[1].transpose(2, 3) / 4 + block.position_bias(z)[:, :, kept]).softmax(-1)
        rows = rows + mod.gate_attn * block.attn.proj((weights @ split[2]).transpose(1, 2).flatten(2))
        rows = rows + mod.gate_mlp * block.mlp_branch(rows, mod)
        after[b] = rows
    torch.testing.assert_close(found[:, kept], rows, atol=1e-5, rtol=1e-5)
    others = torch.tensor([i for i in ALL if i not in kept.tolist()])
    torch.testing.assert_close(found[:, others], (z + cached[Entry("span", 0, 6)])[:, others])


def test_soft_forms_with_weights_of_one_and_zero() -> None:
    x_prev, x = noise_for(0, range(2), MDT), noise_for(1, range(2), MDT)
    t_prev, t, labels = torch.tensor([600.0, 300.0]), torch.tensor([560.0, 250.0]), torch.tensor([1, 4])
    _, caches = full_eps(MDT, GUIDED, x_prev, t_prev, labels)
    eps, _ = full_eps(MDT, GUIDED, x, t, labels)
    torch.testing.assert_close(full_eps(MDT, NONE, x, t, labels)[0], MDT(x, t, labels)[:, :4])
    ones = mixed_eps(MDT, GUIDED, caches.blocks, x, t, labels, torch.ones(2, 6, 16))
    torch.testing.assert_close(ones, eps, rtol=1e-4, atol=1e-4)
    nothing = mixed_eps(MDT, GUIDED, caches.blocks, x, t, labels, torch.zeros(2, 6, 16))
    torch.testing.assert_close(nothing, reused_eps(MDT, GUIDED, caches.blocks, x, t, labels), rtol=1e-4, atol=1e-4)
    branches, _ = mixed_branches_eps(MDT, GUIDED, caches.branches, x, t, labels, torch.ones(2, 6, 2))
    assert torch.equal(branches, eps)
    table = make_plan(SIGNATURE, (FULL, (reuse(0, 6, ("attn", "mlp")),)), GUIDED)
    states = list(sample_steps(MDT, table, x, labels))
    first, second = (torch.full((2,), step.t) for step in table.sampler.steps)
    _, before = full_eps(MDT, GUIDED, states[0].x, first, labels)
    reused, _ = mixed_branches_eps(MDT, GUIDED, before.branches, states[1].x, second, labels, torch.zeros(2, 6, 2))
    torch.testing.assert_close(reused, states[1].eps, rtol=1e-5, atol=1e-5)


def test_sensitivity_is_the_slope_of_an_intervention() -> None:
    """One branch of one block is reused and the rest computed: the estimate's v J delta against that difference, in float64."""
    mdt = make_mdt().double()
    x, labels, t = noise_for(1, range(1), mdt).double(), torch.tensor([3]), torch.tensor([500.0])
    x_prev = x + 1e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    probes = probes_for(mdt, 0, [1], 1).double()
    _, caches = full_eps(mdt, NONE, x_prev, t, labels)
    found = branch_sensitivity(mdt, NONE, caches.branches, x, t, labels, probes)
    eps, _ = full_eps(mdt, NONE, x, t, labels)
    expected = np.zeros((6, 2))
    for b, branch in itertools.product(range(6), range(2)):
        w = torch.ones(1, 6, 2, dtype=torch.float64)
        w[0, b, branch] = 0.0
        moved, _ = mixed_branches_eps(mdt, NONE, caches.branches, x, t, labels, w)
        expected[b, branch] = ((probes[0] * (moved - eps)).sum() ** 2 / x.numel()).item()
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-2)


def test_the_effect_of_a_step_is_measured_through_skips() -> None:
    plan = make_plan(SIGNATURE, (FULL,) * 3, GUIDED)
    effect = step_effect(MDT, plan, noise_for(1, range(2), MDT), torch.tensor([0, 2]))
    assert effect.shape == (3,)
    assert (effect > 0).all()
