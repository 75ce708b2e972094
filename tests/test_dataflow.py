from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import EVERY_MODE, FULL, SIGNATURE, make_plan, random_modes, random_steps, signature_for, vp_sampler

from tc_lightning.models.dit import preset
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import (
    block_macs,
    cache_bytes_per_image,
    entry_shape,
    full_step_macs,
    macs_speedup,
    plan_macs,
    segment_macs,
    step_macs,
)
from tc_lightning.plan.dataflow import Entry, Read, StepFlow, assign_slots
from tc_lightning.plan.forecasts import lagrange_weights
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, partial, reuse, skip

XL = signature_for(preset("DiT-XL/2"))
SPAN = Entry("span", 0, 4)


def skipping(full: set[int], num_steps: int, order: int, guidance: Guidance | None = None) -> CachePlan:
    """Whole-step skipping with the given full steps."""
    return make_plan(SIGNATURE, tuple(FULL if i in full else (skip(0, 4, order),) for i in range(num_steps)), guidance)


# Forecast weights


@pytest.mark.parametrize(
    ("sources", "at", "weights"),
    [
        ((4,), 9, (1,)),
        ((1, 0), 2, (2, -1)),
        ((6, 3), 9, (2, -1)),
        ((6, 3), 7, (4 / 3, -1 / 3)),
        ((2, 1, 0), 3, (3, -3, 1)),
        ((8, 4, 0), 12, (3, -3, 1)),
        ((5, 3, 0), 6, (9 / 5, -1, 1 / 5)),  # by hand: (3*6)/(2*5), (1*6)/(-2*3), (1*3)/(-5*-3)
    ],
)
def test_lagrange_weights(sources, at, weights):
    assert lagrange_weights(sources, at) == pytest.approx(weights, abs=1e-14)


def test_order_two_is_exact_for_quadratics_and_order_one_is_not():
    def f(s: float) -> float:
        return 3 * s**2 - 5 * s + 7

    three, two = (9, 4, 2), (9, 4)
    assert np.dot(lagrange_weights(three, 11), [f(s) for s in three]) == pytest.approx(f(11))
    assert np.dot(lagrange_weights(two, 11), [f(s) for s in two]) != pytest.approx(f(11))
    assert np.dot(lagrange_weights(two, 11), [2 * s + 1 for s in two]) == pytest.approx(23)


# Reads and writes


def test_reads_and_writes_of_whole_step_skipping():
    flows = skipping({0, 1, 3}, 6, 2).flows
    assert flows[0] == StepFlow((), (SPAN,))
    assert flows[1] == StepFlow((), (SPAN,))
    assert flows[2] == StepFlow((Read(SPAN, (1, 0), (2.0, -1.0)),), ())  # two values so far: order 1
    assert flows[3] == StepFlow((), (SPAN,))
    assert flows[4].reads[0].sources == (3, 1, 0)
    assert flows[4].reads[0].weights == lagrange_weights((3, 1, 0), 4)
    assert flows[5].reads[0].sources == (3, 1, 0)
    assert flows[5].writes == ()


@pytest.mark.parametrize(
    ("segment", "entries"),
    [
        (compute(1, 3), {}),
        (skip(1, 3, 1), {"span_1_3": 2}),
        (reuse(1, 3, ("attn",), 1), {"attn_1": 2, "attn_2": 2}),
        (reuse(1, 3, ("attn", "mlp")), {"attn_1": 1, "attn_2": 1, "mlp_1": 1, "mlp_2": 1}),
        (partial(1, 3, (0, 5), 1), {"span_1_3": 2, "k_1": 1, "v_1": 1, "k_2": 1, "v_2": 1}),  # keys and values are repeated
        (partial(1, 3, (0, 5), 0, kv_order=1), {"span_1_3": 1, "k_1": 2, "v_1": 2, "k_2": 2, "v_2": 2}),
        (partial(1, 3, (0, 5), 1, ("mlp",)), {"span_1_3": 2, "attn_1": 2, "attn_2": 2}),
        (partial(1, 3, tuple(range(16)), 1), {}),
        (partial(1, 3, tuple(range(16)), 1, ("mlp",)), {"attn_1": 2, "attn_2": 2}),
    ],
)
def test_entries_that_each_mode_reads(segment, entries):
    flows = make_plan(SIGNATURE, (FULL, FULL, (compute(0, 1), segment, compute(3, 4)))).flows
    assert {read.entry.name: len(read.sources) for read in flows[2].reads} == entries
    assert {entry.name for entry in flows[1].writes} == set(entries)
    assert {entry.name for entry in flows[0].writes} == {name for name, count in entries.items() if count == 2}
    updated = {name for name, count in entries.items() if name[0] in "kv" and count == 1}  # read again or not
    assert {entry.name for entry in flows[2].writes} == updated


def test_updates_stay_in_their_slot_and_are_what_is_read_next():
    """Full, two partial steps, full, one partial step: one slot each for keys and values, and each read finds the step before."""
    p = (partial(0, 4, (1, 2)),)
    flows = make_plan(SIGNATURE, (FULL, p, p, FULL, p)).flows
    key = Entry("k", 2, 3)
    assert [next(r.sources for r in flows[i].reads if r.entry == key) for i in (1, 2, 4)] == [(0,), (1,), (3,)]
    assert [flow.updates(key) for flow in flows] == [False, True, True, False, True]
    slots, depth = assign_slots(flows)
    assert {slots[key, i] for i in range(5)} == {0}
    assert depth[key] == 1
    assert depth[SPAN] == 1
    every = (partial(0, 4, tuple(range(16))),)  # neither reads nor updates
    assert [flow.writes for flow in make_plan(SIGNATURE, (FULL, every)).flows] == [(), ()]


def test_nothing_is_written_that_nobody_reads():
    flows = skipping({0, 1, 2, 4, 5}, 6, 0).flows
    assert [flow.writes for flow in flows] == [(), (), (SPAN,), (), (), ()]
    assert all(not flow.writes and not flow.reads for flow in make_plan(SIGNATURE, (FULL,) * 4).flows)


def test_entries_are_written_where_they_are_computed_for_all_tokens():
    """attn_0 is computed by compute and by reuse of mlp, not by a partial step, and not by its own reuse."""
    middle = [
        (partial(0, 1, (1,)), compute(1, 4)),
        (reuse(0, 1, ("mlp",)), compute(1, 4)),
        (reuse(0, 1, ("attn",)), compute(1, 4)),
        (compute(0, 1), skip(1, 4)),
    ]
    last = (reuse(0, 1, ("attn",), 2), compute(1, 4))
    flows = make_plan(SIGNATURE, (FULL, *middle, last)).flows
    assert next(r for r in flows[5].reads if r.entry.kind == "attn").sources == (4, 2, 0)
    assert next(r for r in flows[3].reads if r.entry.kind == "attn").sources == (2,)


def test_a_span_is_written_only_as_a_whole():
    steps = (FULL, (compute(0, 2), skip(2, 4)), (compute(0, 1), compute(1, 4)), (skip(0, 4, 1),))
    flows = make_plan(SIGNATURE, steps).flows
    assert flows[3].reads == (Read(SPAN, (2, 0), lagrange_weights((2, 0), 3)),)


# Slots


def test_eighteen_full_of_fifty_need_three_slots():
    plan = skipping({round(i * 49 / 17) for i in range(18)}, 50, 2)
    assert len(plan.full_steps) == 18
    assert assign_slots(plan.flows)[1] == {SPAN: 3}


@pytest.mark.parametrize(("order", "slots"), [(0, 1), (1, 2), (2, 3)])
def test_whole_step_skipping_needs_order_plus_one_slots(order, slots):
    assert assign_slots(skipping(set(range(0, 20, 3)), 20, order).flows)[1] == {SPAN: slots}


def test_slots_of_a_small_plan_by_hand():
    slots, depth = assign_slots(skipping({0, 2, 4}, 6, 1).flows)
    # step 1 reads 0; step 3 reads (2, 0), after which 0 is dead; step 5 reads (4, 2)
    assert slots == {(SPAN, 0): 0, (SPAN, 2): 1, (SPAN, 4): 0}
    assert depth == {SPAN: 2}


def test_a_slot_is_free_after_the_last_read():
    reads, writes = (reuse(0, 1, ("attn",)), compute(1, 4)), (reuse(0, 1, ("mlp",)), compute(1, 4))
    slots, depth = assign_slots(make_plan(SIGNATURE, (FULL, reads, writes, reads)).flows)
    attn = Entry("attn", 0, 1)
    assert (slots[attn, 0], slots[attn, 2], depth[attn]) == (0, 0, 1)  # step 1 was the last to read the value of step 0


@pytest.mark.parametrize("modes", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_live_values_never_share_a_slot(seed, modes):
    flows = make_plan(SIGNATURE, random_steps(seed, num_steps=12), modes=random_modes(seed, 12) if modes else "").flows
    slots, depth = assign_slots(flows)
    last_read = {(r.entry, s): i for i, flow in enumerate(flows) for r in flow.reads for s in r.sources}
    assert set(slots) == {(entry, i) for i, flow in enumerate(flows) for entry in flow.writes}
    assert set(last_read) <= set(slots)
    for (entry, step), slot in slots.items():
        assert slot < depth[entry]
        for (other, later), taken in slots.items():
            if other == entry and later > step and taken == slot:
                updated_in_place = flows[later].updates(entry)
                assert last_read.get((entry, step), -1) < later + updated_in_place


# Costs


def test_full_xl_is_the_published_figure():
    assert full_step_macs(XL) == pytest.approx(118.6e9, rel=0.005)
    attention, mlp = block_macs(XL, 256, ("attn",)), block_macs(XL, 256, ("mlp",))
    assert attention / (attention + mlp) == pytest.approx(0.357, abs=0.001)


def test_tiny_model_by_hand():
    # N 16, D 32, MLP 128, L 4, patches of 4, channels 4 in and 8 out
    qkv_and_proj, scores_and_values, mlp = 16 * 4 * 32 * 32, 2 * 16 * 16 * 32, 16 * 2 * 32 * 128
    assert (qkv_and_proj, scores_and_values, mlp) == (65536, 16384, 131072)
    assert block_macs(SIGNATURE, 16) == 65536 + 16384 + 131072
    assert block_macs(SIGNATURE, 4) * 4 == block_macs(SIGNATURE, 16)
    embed, readout, time = 16 * 16 * 32, 16 * 32 * 32, 256 * 32 + 32 * 32
    adaln = 4 * 6 * 32 * 32 + 2 * 32 * 32
    assert SIGNATURE.fixed_macs == embed + readout + time + adaln
    assert full_step_macs(SIGNATURE) == 4 * 212992 + SIGNATURE.fixed_macs


@pytest.mark.parametrize(
    ("segment", "macs"),
    [
        (compute(0, 2), 2 * 212992),
        (skip(0, 2), 0),
        (reuse(0, 2, ("attn",)), 2 * 131072),
        (reuse(0, 2, ("mlp",)), 2 * 81920),
        (reuse(0, 2, ("attn", "mlp")), 0),
        (partial(0, 2, (1, 2, 3, 4)), 2 * 212992 // 4),
        (partial(0, 2, (1, 2, 3, 4), 0, ("mlp",)), 2 * 131072 // 4),
    ],
)
def test_macs_of_each_mode(segment, macs):
    assert segment_macs(SIGNATURE, segment) == macs
    assert step_macs(SIGNATURE, (segment, compute(2, 4))) == SIGNATURE.fixed_macs + 2 * 212992 + macs


def test_speedup():
    full, fixed = full_step_macs(SIGNATURE), SIGNATURE.fixed_macs
    assert macs_speedup(make_plan(SIGNATURE, (FULL,) * 3)) == 1.0
    assert plan_macs(skipping({0, 3}, 6, 1)) == 2 * full + 4 * fixed
    assert macs_speedup(skipping({0, 3}, 6, 1)) == pytest.approx(6 * full / (2 * full + 4 * fixed))
    assert macs_speedup(make_plan(SIGNATURE, EVERY_MODE)) == macs_speedup(make_plan(SIGNATURE, EVERY_MODE, Guidance()))


def test_speedup_is_against_the_reference():
    full, fixed = full_step_macs(SIGNATURE), SIGNATURE.fixed_macs
    plan = dataclasses.replace(skipping({0, 3}, 6, 1), reference=vp_sampler("ddim", 50))
    assert macs_speedup(plan) == pytest.approx(50 * full / (2 * full + 4 * fixed))


def test_cache_bytes_of_whole_step_skipping():
    plan = skipping({0, 1, 2, 5}, 7, 2)
    assert cache_bytes_per_image(plan) == 3 * 16 * 32 * 4 * 2
    assert cache_bytes_per_image(plan, 2) == 3 * 16 * 32 * 2 * 2
    assert cache_bytes_per_image(dataclasses.replace(plan, guidance=Guidance())) == 3 * 16 * 32 * 4
    assert cache_bytes_per_image(make_plan(SIGNATURE, (FULL, FULL))) == 0


def test_cache_bytes_of_a_partial_step():
    """A span, and keys and values of two blocks, each N x D."""
    plan = make_plan(SIGNATURE, (FULL, (partial(0, 2, (1,)), compute(2, 4))), Guidance())
    assert cache_bytes_per_image(plan) == 5 * 16 * 32 * 4
    assert entry_shape(plan, SPAN) == (16, 32)


def test_names():
    assert Entry("span", 3, 20).name == "span_3_20"
    assert Entry("k", 5, 6).name == "k_5"
