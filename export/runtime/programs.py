"""Lowering: equal steps of a plan share one step program. Plain data, no torch, no onnx.

A program is a step with its constants taken out: the modes, depths and numbers of tokens, which cache entries it reads and writes.
Which step it is, hence which tokens, forecast weights and sampler coefficients, is looked up by step index inside the graph.

Programs that read the same weights and differ in how many tokens they compute can share a *graph*, in which that number is looked up,
too: full compute is a partial step that keeps every token. One repacked copy of the weights then serves them all.
"""

from __future__ import annotations

import dataclasses

from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.dataflow import Entry, StepFlow, assign_slots
from tc_lightning.plan.forecasts import Forecast
from tc_lightning.plan.guidance import BOTH, GuidanceMode
from tc_lightning.plan.segments import DIT, Branches, Segment


@dataclasses.dataclass(frozen=True)
class Program:
    """One step program.

    Args:
        name: its name.
        segments: segments of a representative step (its token indices are only an example).
        reads: entries read, with the number of past values of each.
        writes: entries written.
        steps: the steps that run it.
        graph: file stem of its graph: its own name, or that of the program whose graph it shares.
        guidance: which halves of a guided batch it computes.
    """

    name: str
    segments: tuple[Segment, ...]
    reads: tuple[tuple[Entry, int], ...]
    writes: tuple[Entry, ...]
    steps: tuple[int, ...]
    graph: str
    guidance: GuidanceMode = BOTH


@dataclasses.dataclass(frozen=True)
class Binding:
    """What one step runs and where its cache values are: slots of each entry, latest value first for a read."""

    program: str
    reads: dict[str, list[int]]
    writes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class LoweredPlan:
    """All programs, the binding of each step, and the number of slots of each entry."""

    programs: tuple[Program, ...]
    bindings: tuple[Binding, ...]
    slots: dict[Entry, int]

    @property
    def graphs(self) -> dict[str, tuple[Program, ...]]:
        """The programs of each graph."""
        return {p.graph: tuple(q for q in self.programs if q.graph == p.graph) for p in self.programs}


FULL = "step_full"  # full compute that keeps no cache, with the reference's coefficients: the baseline


def lower(plan: CachePlan, provider: str) -> LoweredPlan:
    """Group the steps of a plan into programs; the program `step_full` always exists, and runs the reference.

    Steps of the plan that keep no cache of what they compute in full run it, too, if the reference's coefficients are theirs.

    Args:
        plan: the plan.
        provider: what the programs are to run on. On `cpu` they share graphs where they can, which saves memory; elsewhere each has
            one of its own, since CUDA graphs need static shapes.

    Steps that compute the same share a program even if less is read of what some of them write: a second program would need its
    weights in memory once more, and writing into a slot costs next to nothing.
    """
    flows = plan.flows
    slot_of, depth = assign_slots(flows)
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, segments in enumerate(plan.steps):
        groups.setdefault((tuple(s.outline for s in merge(segments)), plan.guidance_mode(i).outline), []).append(i)
    full_steps: tuple[int, ...] = ()
    programs: list[Program] = []
    for steps in groups.values():
        segments, flow, mode = merge(plan.steps[steps[0]]), flows[steps[0]], plan.guidance_mode(steps[0])
        writes = tuple(sorted({entry for i in steps for entry in flows[i].writes}))
        if shares_reference(plan) and not writes and not mode.single and all(s.mode == "compute" for s in segments):
            full_steps = tuple(steps)
            continue
        reads, name = _read_counts(segments, flow, mode), f"step_{len(programs):02d}"
        programs.append(Program(name, segments, reads, writes, tuple(steps), name, mode))
    everything = (Segment(0, plan.model.depth, "compute"),)
    if provider == "cpu":
        programs = _share_graphs(programs, everything, plan.model.block)
    programs.append(Program(FULL, everything, (), (), full_steps, FULL))
    by_step = {i: program for program in programs for i in program.steps}
    bindings = tuple(_bind(by_step[i], flow, i, slot_of) for i, flow in enumerate(flows))
    return LoweredPlan(tuple(programs), bindings, depth)


def shares_reference(plan: CachePlan) -> bool:
    """Whether the plan's steps have the coefficients of the reference's."""
    return plan.scaled_sampler.steps == plan.reference.steps


def condition_times(plan: CachePlan) -> tuple[list[float], int]:
    """Times that the condition graph knows, and the place of the reference's first step among them: 0 where it has the plan's."""
    own, reference = ([row.t for row in table.steps] for table in (plan.sampler, plan.reference))
    return (own, 0) if own == reference else (own + reference, len(own))


def computed_tokens(segment: Segment, num_tokens: int, block: Branches = DIT) -> int:
    """Blocks x tokens in which a segment computes a branch at least."""
    if segment.mode in ("compute", "reuse") and any(map(segment.computes, block.names)):
        return len(segment.blocks) * num_tokens
    return len(segment.blocks) * segment.keep


def merge(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """The segments with adjacent compute segments made one."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and segment.mode == merged[-1].mode == "compute":
            merged[-1] = dataclasses.replace(merged[-1], stop=segment.stop)
        else:
            merged.append(segment)
    return tuple(merged)


def kept_tokens(plan: CachePlan, step: int, segment: Segment) -> tuple[int, ...]:
    """Tokens that a step keeps in a segment that is partial in its graph: all of them if the step computes it."""
    kept = {s.start: s.tokens for s in merge(plan.steps[step]) if s.mode == "partial"}
    return kept.get(segment.start, tuple(range(plan.model.tokens)))


def _share_graphs(programs: list[Program], everything: tuple[Segment, ...], block: Branches) -> list[Program]:
    """Give programs that differ in the number of kept tokens alone one graph; full compute joins those that run most often."""
    alike: dict[object, list[Program]] = {}
    for program in programs:
        cuts = tuple((*s.outline[:-1], s.is_content and s.keep) for s in program.segments)
        alike.setdefault((cuts, program.reads, program.guidance.outline), []).append(program)
    for full in (p for p in programs if p.segments == everything):
        if hosts := [group for group in alike.values() if _can_host(group[0], full, block)]:
            max(hosts, key=lambda group: sum(len(p.steps) for p in group)).append(full)
    graph = {p.name: group[0].name for group in alike.values() if len(group) > 1 for p in group}
    return [dataclasses.replace(p, graph=graph.get(p.name, p.name)) for p in programs]


def _can_host(program: Program, full: Program, block: Branches) -> bool:
    """Whether full compute is what a program does if it keeps every token.

    It has to write what only the program reads, so that its buffers are there, and the program's segments must yield all it writes.
    """
    more = {entry for entry, _ in {*program.reads} - {*full.reads}}
    yields = all(_yields(s, entry, block) for s in program.segments for entry in full.writes)
    return yields and program.guidance.outline == full.guidance.outline and bool(more) and more <= {*full.writes}


def _yields(segment: Segment, entry: Entry, block: Branches) -> bool:
    """Whether a segment in which every token is kept leaves what is to be cached: of partial ones keys, values and whole spans."""
    if segment.mode != "partial":
        return segment.mode == "compute"
    if segment.is_content:
        return False
    if entry.kind == "span":
        return not any(segment.start < edge < segment.stop for edge in (entry.start, entry.stop))
    return len(segment.branches) == len(block.names) and (entry.kind not in block.names or entry.start not in segment.blocks)


def _read_counts(segments: tuple[Segment, ...], flow: StepFlow, mode: GuidanceMode) -> tuple[tuple[Entry, int], ...]:
    """Past values of each entry that the program takes: as many as it weighs, even at early steps that have fewer."""
    of_block = {b: s for s in segments for b in s.blocks}

    def forecast(entry: Entry) -> Forecast:
        if entry.kind == "guidance":
            return mode.forecast
        segment = of_block[entry.start]
        return segment.kv_forecast if entry.kind in ("k", "v") else segment.forecast

    return tuple((r.entry, forecast(r.entry).history) for r in flow.reads)


def _bind(program: Program, flow: StepFlow, step: int, slot_of: dict[tuple[Entry, int], int]) -> Binding:
    reads = {}
    for read, (_, count) in zip(flow.reads, program.reads, strict=True):
        slots = [slot_of[read.entry, source] for source in read.sources]
        reads[read.entry.name] = slots + slots[-1:] * (count - len(slots))  # absent past values carry weight 0
    # What nobody will read goes into slot 0: it is free, since whoever reads an older value later reads this one too.
    return Binding(program.name, reads, {entry.name: slot_of.get((entry, step), 0) for entry in program.writes})
