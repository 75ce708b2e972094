from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from conftest import EVERY_MODE, FULL, SIGNATURE, make_plan, random_modes, random_steps, vp_sampler

from export.runtime.programs import FULL as STEP_FULL
from export.runtime.programs import computed_tokens, lower, merge
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.dataflow import Entry, is_updated, is_written
from tc_lightning.plan.segments import Segment, compute, content, partial, reuse, skip

SPAN = Entry("span", 0, 4)
SKIP = (skip(0, 4, 1),)


def test_equal_steps_share_a_program():
    plan = make_plan(SIGNATURE, (FULL, SKIP, SKIP, FULL, SKIP, FULL))
    programs = {p.name: p for p in lower(plan, "cpu").programs}
    assert set(programs) == {"step_00", "step_01", STEP_FULL}
    assert programs["step_00"].steps == (0, 3, 5)  # full, and writes the span, although nobody reads that of the last one
    assert programs["step_00"].writes == (SPAN,)
    assert programs["step_01"].steps == (1, 2, 4)
    assert programs["step_01"].reads == ((SPAN, 2),)
    assert programs[STEP_FULL].steps == ()


def test_which_tokens_and_how_compute_is_cut_make_no_program():
    a = (partial(0, 2, (1, 5)), compute(2, 4))
    b = (partial(0, 2, (0, 9)), compute(2, 3), compute(3, 4))
    more = (partial(0, 2, (0, 9, 11)), compute(2, 4))
    programs = lower(make_plan(SIGNATURE, (FULL, a, b, more)), "cpu").programs
    assert [p.steps for p in programs] == [(0,), (1, 2), (3,), ()]
    assert programs[1].segments == a


@pytest.mark.parametrize(
    "other",
    [
        (skip(0, 4, 0),),
        (skip(0, 2, 1), skip(2, 4, 1)),
        (reuse(0, 4, ("attn",), 1),),
        (reuse(0, 4, ("mlp",), 1),),
        (partial(0, 4, (1,), 1),),
        (partial(0, 4, (1,), 1, ("mlp",)),),
        (compute(0, 1), skip(1, 4, 1)),
    ],
)
def test_steps_that_differ_have_their_own(other):
    lowered = lower(make_plan(SIGNATURE, (FULL, FULL, SKIP, other)), "cpu")
    assert lowered.bindings[2].program != lowered.bindings[3].program


def graphs(*steps: tuple[Segment, ...], provider: str = "cpu") -> list[list[tuple[int, ...]]]:
    """The steps of each program of each graph, without those of `step_full`."""
    lowered = lower(make_plan(SIGNATURE, steps), provider)
    return [[p.steps for p in programs] for name, programs in lowered.graphs.items() if name != STEP_FULL]


def test_programs_that_differ_in_the_number_of_tokens_share_a_graph():
    two, three = (partial(0, 2, (1, 5)), compute(2, 4)), (partial(0, 2, (0, 9, 11)), compute(2, 4))
    assert graphs(FULL, two, three, FULL, two) == [[(0, 3), (1, 4), (2,)]]
    assert graphs(FULL, two, three, FULL, two, provider="cuda") == [[(0, 3)], [(1, 4)], [(2,)]]
    more = (partial(0, 2, (1, 5), 1), compute(2, 4))  # another order: another graph; full compute shares that of most steps
    assert graphs(FULL, two, more, more) == [[(0,), (2, 3)], [(1,)]]


@pytest.mark.parametrize(
    "pruned",
    [
        (partial(0, 4, (1, 5), 1, ("mlp",)),),  # needs the outputs of attention
        (partial(0, 2, (1, 5)), skip(2, 4)),  # does not read all weights
        (partial(0, 4, tuple(range(16))),),  # reads no cache
        (compute(0, 2), reuse(2, 4, ("attn",))),
    ],
)
def test_full_compute_shares_no_graph_with_what_is_not_a_case_of_it(pruned):
    assert graphs(FULL, pruned) in ([[(0,)], [(1,)]], [[(1,)]])


def test_tokens_chosen_by_content_are_of_a_fixed_number():
    steps = (FULL, (content(0, 4, 3),), (content(0, 4, 2),))
    lowered = lower(dataclasses.replace(make_plan(SIGNATURE, (FULL,) * 3), steps=steps, selector="0" * 64), "cpu")
    assert [p.graph for p in lowered.programs] == ["step_00", "step_01", "step_02", STEP_FULL]


@pytest.mark.parametrize("other", [(skip(0, 2), skip(2, 4)), (reuse(0, 4, ("attn",)),)])
def test_full_compute_shares_no_graph_that_leaves_less_in_the_cache(other):
    """A partial segment leaves no residual of a part of it, and no output of a branch."""
    whole, halved = (partial(0, 4, (1, 5)),), (partial(0, 2, (1, 5)), partial(2, 4, (3,)))
    assert graphs(FULL, whole, other) == [[(0,)], [(1,)], [(2,)]]
    assert graphs(FULL, halved, (skip(0, 2), skip(2, 4))) == [[(0,), (1,)], [(2,)]]


def test_step_full_always_exists():
    for steps in ((FULL,), (FULL, FULL), (FULL, SKIP), EVERY_MODE):
        full = lower(make_plan(SIGNATURE, steps), "cpu").programs[-1]
        assert (full.name, full.segments, full.reads, full.writes) == (STEP_FULL, FULL, (), ())


def test_plan_and_reference_share_step_full_if_their_coefficients_are_equal():
    renamed = dataclasses.replace(vp_sampler("ddim", 3), name="other")
    for reference in (None, renamed):
        lowered = lower(make_plan(SIGNATURE, (FULL,) * 3, reference=reference), "cpu")
        assert [(p.name, p.steps) for p in lowered.programs] == [(STEP_FULL, (0, 1, 2))]
    assert lower(make_plan(SIGNATURE, (FULL,) * 3, eps_scale=(1.0,) * 3), "cpu") == lowered
    for change in ({"reference": vp_sampler("ddim", 5)}, {"eps_scale": (1.0, 1.0, 0.9)}):
        lowered = lower(make_plan(SIGNATURE, (FULL,) * 3, **change), "cpu")
        assert [(p.name, p.steps) for p in lowered.programs] == [("step_00", (0, 1, 2)), (STEP_FULL, ())]
        assert [b.program for b in lowered.bindings] == ["step_00"] * 3


def test_missing_past_values_are_padded():
    """An order-2 program runs at steps that have one, two and three past values; it always takes three."""
    order2 = (skip(0, 4, 2),)
    lowered = lower(make_plan(SIGNATURE, (FULL, order2, FULL, order2, FULL, order2)), "cpu")
    assert [p.steps for p in lowered.programs] == [(0, 2, 4), (1, 3, 5), ()]
    assert lowered.programs[1].reads == ((SPAN, 3),)
    assert [lowered.bindings[i].reads["span_0_4"] for i in (1, 3, 5)] == [[0, 0, 0], [1, 0, 0], [2, 1, 0]]


def writes_or_updates(plan: CachePlan, i: int, entry: Entry, updates: bool) -> bool:
    """By the definition: the difference of the halves is computed with both, and the unconditional half then alone."""
    both = not plan.guidance_mode(i).single
    if entry.kind == "guidance":
        return both
    segments = plan.steps[i]
    updated = updates and is_updated(entry, segments, SIGNATURE.tokens)
    return (both or entry.half == "cond") and (is_written(entry, segments) or updated)


@pytest.mark.parametrize("modes", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_schedule_delivers_the_values_that_the_plan_defines(seed, modes):
    """Run the schedule on buffers of plain labels: every read must find what the definition of a cache says it finds."""
    steps = EVERY_MODE if seed == 0 else random_steps(seed, num_steps=12)
    plan = make_plan(SIGNATURE, steps, modes=random_modes(seed, len(steps)) if modes else "")
    lowered, flows = lower(plan, "cpu"), plan.flows
    buffers = {e.name: [None] * n for e, n in lowered.slots.items()}
    programs = {p.name: p for p in lowered.programs}
    assert len(lowered.bindings) == plan.num_steps
    for i, bound in enumerate(lowered.bindings):
        program = programs[bound.program]
        assert i in program.steps
        assert set(bound.reads) == {e.name for e, _ in program.reads}
        assert set(bound.writes) == {e.name for e in program.writes}
        for entry, count in program.reads:
            read = next(r for r in flows[i].reads if r.entry == entry)
            written = [j for j in reversed(range(i)) if writes_or_updates(plan, j, entry, updates=count == 1)][:count]
            expected = written + written[-1:] * (count - len(written))
            found = [buffers[entry.name][slot] for slot in bound.reads[entry.name]]
            assert found == [(entry.name, j) for j in expected]  # no write that nobody reads has overwritten one
            assert read.sources == tuple(written)
        assert all(name[0] in "kv" for name in set(bound.reads) & set(bound.writes))  # updates
        for name, slot in bound.writes.items():
            buffers[name][slot] = (name, i)


def test_slots_of_a_small_schedule_by_hand():
    bindings = lower(make_plan(SIGNATURE, (FULL, FULL, SKIP, FULL, SKIP)), "cpu").bindings
    assert bindings[2].reads["span_0_4"] == [1, 0]  # latest first
    assert bindings[3].writes == {"span_0_4": 0}  # the value of step 0 is dead
    assert bindings[4].reads["span_0_4"] == [0, 1]


def test_merge():
    assert merge((compute(0, 1), compute(1, 3), skip(3, 4))) == (compute(0, 3), skip(3, 4))
    assert merge((skip(0, 2), skip(2, 4))) == (skip(0, 2), skip(2, 4))  # two entries


def test_computed_tokens():
    cases = {
        compute(0, 2): 32,
        skip(0, 2): 0,
        reuse(0, 2, ("attn",)): 32,
        reuse(0, 2, ("attn", "mlp")): 0,
        partial(0, 2, (1, 2, 3)): 6,
    }
    assert {segment: computed_tokens(segment, 16) for segment in cases} == cases


def test_lowering_needs_no_torch():
    script = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'onnx', 'onnxruntime', 'lightning'))\n"
        "import export.runtime.programs, export.compiler.explain, export.bench.plans, tc_lightning.plan.costs; print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr
