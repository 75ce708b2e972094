"""Lowering: equal steps of a plan share one step program. Plain data, no torch, no onnx.

A program is a step with its constants taken out: the modes, depths and numbers of tokens, which cache entries it reads and writes.
Which step it is, hence which tokens, forecast weights and sampler coefficients, is looked up by step index inside the graph.
"""

from __future__ import annotations

import dataclasses

from tc_lightning.dataflow import Entry, StepFlow, assign_slots, trace
from tc_lightning.guidance import BOTH, GuidanceMode
from tc_lightning.plan import CachePlan, Segment


@dataclasses.dataclass(frozen=True)
class Program:
    """One step program.

    Args:
        name: file stem of its graph.
        segments: segments of a representative step (its token indices are only an example).
        reads: entries read, with the number of past values of each.
        writes: entries written.
        steps: the steps that run it.
        guidance: which halves of a guided batch it computes.
    """

    name: str
    segments: tuple[Segment, ...]
    reads: tuple[tuple[Entry, int], ...]
    writes: tuple[Entry, ...]
    steps: tuple[int, ...]
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


FULL = "step_full"  # full compute that keeps no cache, with the reference's coefficients: the baseline


def lower(plan: CachePlan) -> LoweredPlan:
    """Group the steps of a plan into programs; the program `step_full` always exists, and runs the reference.

    Steps of the plan that keep no cache of what they compute in full run it, too, if the reference's coefficients are theirs.

    Steps that compute the same share a program even if less is read of what some of them write: a second program would need its
    weights in memory once more, and writing into a slot costs next to nothing.
    """
    flows = trace(plan)
    slot_of, depth = assign_slots(flows)
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, segments in enumerate(plan.steps):
        groups.setdefault((_shapes(merge(segments)), plan.guidance_mode(i)), []).append(i)
    full_steps: tuple[int, ...] = ()
    programs: list[Program] = []
    for steps in groups.values():
        segments, flow, mode = merge(plan.steps[steps[0]]), flows[steps[0]], plan.guidance_mode(steps[0])
        writes = tuple(sorted({entry for i in steps for entry in flows[i].writes}))
        if shares_reference(plan) and not writes and not mode.single and all(s.mode == "compute" for s in segments):
            full_steps = tuple(steps)
            continue
        reads = _read_counts(segments, flow, mode)
        programs.append(Program(f"step_{len(programs):02d}", segments, reads, writes, tuple(steps), mode))
    everything = (Segment(0, plan.model.depth, "compute"),)
    programs.append(Program(FULL, everything, (), (), full_steps))
    by_step = {i: program for program in programs for i in program.steps}
    bindings = tuple(_bind(by_step[i], flow, i, slot_of) for i, flow in enumerate(flows))
    return LoweredPlan(tuple(programs), bindings, depth)


def shares_reference(plan: CachePlan) -> bool:
    """Whether the plan's steps have the coefficients of the reference's."""
    return plan.scaled_sampler.steps == plan.baseline.steps


def computed_tokens(segment: Segment, num_tokens: int) -> int:
    """Blocks x tokens in which a segment computes a branch at least."""
    if segment.mode == "compute" or (segment.mode == "reuse" and len(segment.branches) < 2):
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


def _shapes(segments: tuple[Segment, ...]) -> tuple[object, ...]:
    """What two steps must have in common to share a program: all but which tokens."""
    return tuple((s.start, s.stop, s.mode, s.order, s.branches, s.choice, s.keep) for s in segments)


def _read_counts(segments: tuple[Segment, ...], flow: StepFlow, mode: GuidanceMode) -> tuple[tuple[Entry, int], ...]:
    """Past values of each entry that the program takes: order + 1, even at early steps that have fewer."""
    of_block = {b: s.order for s in segments for b in s.blocks}

    def order(entry: Entry) -> int:
        if entry.kind == "guidance":
            return mode.order
        return 0 if entry.kind in ("k", "v") else of_block[entry.start]

    return tuple((r.entry, order(r.entry) + 1) for r in flow.reads)


def _bind(program: Program, flow: StepFlow, step: int, slot_of: dict[tuple[Entry, int], int]) -> Binding:
    reads = {}
    for read, (_, count) in zip(flow.reads, program.reads, strict=True):
        slots = [slot_of[read.entry, source] for source in read.sources]
        reads[read.entry.name] = slots + slots[-1:] * (count - len(slots))  # absent past values carry weight 0
    # What nobody will read goes into slot 0: it is free, since whoever reads an older value later reads this one too.
    return Binding(program.name, reads, {entry.name: slot_of.get((entry, step), 0) for entry in program.writes})
