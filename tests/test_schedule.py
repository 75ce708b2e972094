from __future__ import annotations

from typing import Any

import pytest
from conftest import SIGNATURE, make_plan, random_steps, signature_for, vp_sampler

from export.bench.plans import benchmark_plans
from export.runtime.buffers import MOST_GRAPHS
from export.runtime.layout import PAST, ProgramRun, Spec, graphed, lay_out, read_first, sampling_runs, split_steps
from export.runtime.programs import lower
from tc_lightning.models.dit import preset
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import entry_rows, entry_shape

COMMON = ["x", "step", "first_bad", "first_step", "mods", "rows", "guidance"]
NEXT = ["x_next", "step_next", "first_bad_next"]


def program(inputs: list[str], outputs: list[str], guidance: str = "both") -> dict[str, Any]:
    return {"inputs": inputs, "outputs": outputs, "guidance": guidance}


LABEL = [{"name": "label", "dtype": "int64", "shape": []}]
# Two full steps that write the span into slots 0 and 1, then two that forecast it; a solver that looks back once.
MANIFEST = {
    "steps": 4,
    "full_steps": 6,
    "precision": "fp16",
    "condition_values": 10**6,
    "modulations": 6 * 1 + 2,
    "constants": {},
    "model": {"depth": 1, "width": 2, "in_channels": 3, "input_size": 8, "conditions": LABEL},
    "guidance": {"scale": 1.5},
    "programs": {
        "step_00": program([*COMMON, "m_prev"], [*NEXT, "m", "span_0_1.new"]),
        "step_01": program([*COMMON, "m_prev", "span_0_1.0", "span_0_1.1"], [*NEXT, "m"]),
        "step_full": program([*COMMON, "m_prev"], [*NEXT, "m"]),
    },
    "schedule": [
        {"program": "step_00", "reads": {}, "writes": {"span_0_1": 0}},
        {"program": "step_00", "reads": {}, "writes": {"span_0_1": 1}},
        {"program": "step_01", "reads": {"span_0_1": [1, 0]}, "writes": {}},
        {"program": "step_01", "reads": {"span_0_1": [1, 0]}, "writes": {}},
    ],
    "entries": {"span_0_1": {"shape": [4, 2], "rows": 2, "dtype": "fp16", "slots": 2}},
}


def manifest_of(plan: CachePlan) -> dict[str, Any]:
    """What a manifest says of a plan's bindings, without graphs."""
    lowered, programs = lower(plan, "cpu"), {}
    for p in lowered.programs:
        history = list(PAST[: plan.sampler.history])
        reads = [f"{entry.name}.{j}" for entry, count in p.reads for j in range(count)]
        writes = [f"{entry.name}.new" for entry in p.writes]
        programs[p.name] = program([*COMMON, *history, *reads], [*NEXT, *(["m"] if history else []), *writes], p.guidance.mode)
    schedule = [{"program": b.program, "reads": b.reads, "writes": b.writes} for b in lowered.bindings]
    slots = lowered.slots.items()
    entries = {e.name: {"shape": entry_shape(plan, e), "rows": entry_rows(plan, e), "dtype": "fp32", "slots": n} for e, n in slots}
    model = {"depth": plan.model.depth, "width": plan.model.width, "in_channels": 4, "input_size": 8, "conditions": LABEL}
    told = {
        "steps": plan.num_steps,
        "full_steps": plan.num_steps,
        "precision": "fp32",
        "condition_values": 10**6,
        "modulations": 6 * plan.model.depth + 2,
        "constants": {},
        "guidance": {"scale": 1.5},
        "model": model,
    }
    return told | {"programs": programs, "schedule": schedule, "entries": entries}


def test_bindings_of_each_step():
    first, second, third, fourth = sampling_runs(MANIFEST)
    constants = {name: name for name in ("first_step", "mods", "guidance")} | {"rows": "rows.both"}
    assert dict(first.inputs) == {"x": "x.0", "step": "step.0", "first_bad": "first_bad.0", "m_prev": "m.1", **constants}
    assert dict(first.outputs) == {
        "x_next": "x.1",
        "step_next": "step.1",
        "first_bad_next": "first_bad.1",
        "m": "m.0",
        "span_0_1.new": "span_0_1@0",
    }
    assert dict(second.inputs) == {"x": "x.1", "step": "step.1", "first_bad": "first_bad.1", "m_prev": "m.0", **constants}
    assert dict(second.outputs)["span_0_1.new"] == "span_0_1@1"
    assert dict(third.inputs)["span_0_1.0"] == "span_0_1@1"
    assert dict(third.inputs)["span_0_1.1"] == "span_0_1@0"
    assert [(run.program, run.step) for run in (first, fourth)] == [("step_00", 0), ("step_01", 3)]
    assert [run.reads_cache for run in (first, second, third, fourth)] == [False, False, True, True]


def test_full_compute_reads_and_writes_no_cache():
    runs = sampling_runs(MANIFEST, full=True)
    assert [run.program for run in runs] == ["step_full"] * 6
    assert len(graphed(runs, 9)) == 2  # the two directions of ping-pong
    assert not any("@" in name for name in lay_out(MANIFEST, 2, 3, full=True).buffers)


def test_a_solver_that_looks_back_twice_has_a_ring_of_three():
    changed = {name: program([*p["inputs"], "m_prev2"], p["outputs"]) for name, p in MANIFEST["programs"].items()}
    runs = sampling_runs(MANIFEST | {"programs": changed})
    past = [(dict(run.inputs)["m_prev"], dict(run.inputs)["m_prev2"], dict(run.outputs)["m"]) for run in runs]
    assert past == [("m.2", "m.1", "m.0"), ("m.0", "m.2", "m.1"), ("m.1", "m.0", "m.2"), ("m.2", "m.1", "m.0")]


def test_buffers_of_a_request():
    layout = lay_out(MANIFEST, images=5, given=4)
    latent = Spec("fp32", (5, 3, 8, 8))
    assert [layout.buffers[name] for name in ("x.0", "x.1", "m.0", "m.1")] == [latent] * 4
    assert layout.buffers["span_0_1@1"] == Spec("fp16", (10, 4, 2))  # guidance doubles the batch
    assert layout.buffers["mods"] == Spec("fp16", (4, 4, 8, 2))
    assert layout.buffers["rows.both"] == Spec("int64", (10,))
    assert layout.buffers["mods"].values == 256
    assert set(layout.buffers) == {buffer for run in layout.runs for buffer in run.reads | run.writes}


def test_a_step_may_compute_one_half_of_guidance():
    """Its program takes the rows of the conditional half, and what it caches has a row for every image."""
    half = program([*COMMON, "numbers", "guidance.0"], NEXT, "forecast")
    changed = MANIFEST | {"programs": MANIFEST["programs"] | {"step_01": half}}
    changed["schedule"] = [*MANIFEST["schedule"][:2], *[{"program": "step_01", "reads": {"guidance": [0]}, "writes": {}}] * 2]
    changed["entries"] = MANIFEST["entries"] | {"guidance": {"shape": [3, 8, 8], "rows": 1, "dtype": "fp32", "slots": 1}}
    layout = lay_out(changed, images=5, given=4)
    assert [dict(run.inputs)["rows"] for run in layout.runs[1:]] == ["rows.both"] * 2 + ["rows.half"] * 2
    assert layout.buffers["rows.half"] == layout.buffers["numbers.half"] == Spec("int64", (5,))
    assert layout.buffers["rows.both"] == Spec("int64", (10,))
    assert layout.buffers["guidance@0"] == Spec("fp32", (5, 3, 8, 8))
    assert dict(layout.runs[-1].inputs)["guidance"] == "guidance"


def test_what_a_request_has_to_fill_in():
    layout = lay_out(MANIFEST, 5, 4)
    given = {"x.0", "step.0", "first_bad.0", "m.1", "rows.both", "guidance", "steps.0", "offset", "given.label"}
    assert read_first(layout.runs) == given


@pytest.mark.parametrize("seed", range(20))
def test_random_plans(seed):
    plan = make_plan(SIGNATURE, random_steps(seed, num_steps=9), sampler=("ddim", "dpmpp_2m", "dpmpp_3m")[seed % 3])
    layout = lay_out(manifest_of(plan), 2, 3)
    assert not any("@" in name for name in read_first(layout.runs))  # nothing that an earlier request left in a cache is read
    assert {buffer for run in layout.runs for buffer in run.reads | run.writes} <= set(layout.buffers)
    for run in layout.runs:
        assert len(run.writes) == len(run.outputs)
        # Capturing a CUDA graph runs it more than once: what it reads must be as it was, but for keys and values put in place.
        assert all(name.startswith(("k_", "v_")) for name in run.reads & run.writes), run


def test_chunks_are_equally_long():
    assert split_steps(8, 100) == (range(8),)
    assert split_steps(8, 3) == (range(3), range(3, 6), range(5, 8))
    assert split_steps(4, 2) == (range(2), range(2, 4))
    assert split_steps(3, 0) == (range(1), range(1, 2), range(2, 3))


def test_each_chunk_is_conditioned_before_its_first_step():
    layout = lay_out(MANIFEST | {"condition_values": 3 * 4 * 8 * 2}, 5, 4)
    assert [(run.program, run.step) for run in layout.runs] == [
        ("condition", None),
        ("step_00", 0),
        ("step_00", 1),
        ("step_01", 2),
        ("condition", None),
        ("step_01", 3),
    ]
    assert [dict(run.inputs)["steps"] for run in layout.runs if run.step is None] == ["steps.0", "steps.1"]
    assert layout.chunks == (range(3), range(1, 4))
    assert {layout.buffers[f"steps.{j}"] for j in range(2)} == {Spec("int64", (3,))}


def test_graphs_go_to_the_bindings_that_occur_most_often():
    once, often = ProgramRun("a", (("x", "x.0"),), ()), ProgramRun("a", (("x", "x.1"),), ())
    runs = [ProgramRun(r.program, r.inputs, r.outputs, step) for step, r in enumerate([once, often, often])]
    assert graphed([ProgramRun("condition", (), ()), *runs], 9) == [often, once]
    assert graphed(runs, 1) == [often]
    assert graphed(runs, 0) == []


def test_the_benchmark_needs_few_graphs():
    """50 steps of DiT-S/2: the slots of a plan come round again, and so do its bindings."""
    signature = signature_for(preset("DiT-S/2"))
    counts = {}
    for name, plan in benchmark_plans(signature, vp_sampler("ddim", 50), 18).items():
        counts[name] = len(graphed(sampling_runs(manifest_of(plan)), 10**6))
    assert max(counts.values()) <= 24 < MOST_GRAPHS, counts
