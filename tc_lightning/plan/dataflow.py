"""What a plan reads from and writes to the cache, step by step: plain data, no torch.

An *entry* is one cached quantity. It is written at every step that computes it for all tokens; a read takes its last `order + 1`
writes, weighted by constants. Keys and values are also *updated*: a partial step reads them, puts those of its tokens in place,
and what it leaves is a write like any other. Where a plan has steps that compute only the conditional half of a guided batch, each
half has entries of its own, which differ in when they were last written. From this follow which writes are live, how many copies of
an entry must be kept, and where each is kept (a *slot*): the reference sampler and the compiler both go by it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from tc_lightning.errors import PlanError
from tc_lightning.plan.guidance import BOTH, GuidanceMode
from tc_lightning.plan.segments import DIT, Branches, Segment
from tc_lightning.plan.signature import ModelSignature


class ScheduledSteps(Protocol):
    """What dataflow looks at of a plan (`tc_lightning.plan.cache_plan.CachePlan`)."""

    @property
    def model(self) -> ModelSignature:
        """What it was made for."""

    @property
    def steps(self) -> tuple[tuple[Segment, ...], ...]:
        """The segments of each step."""

    @property
    def guidance_modes(self) -> tuple[GuidanceMode, ...]:
        """Which halves of the guided batch each step computes; empty: both at every step."""


class Entry(NamedTuple):
    """A cached quantity of blocks [start, stop).

    Kinds: `span`, the summed residual; a branch's name, for example `attn`: that branch of one block before its gate; `k` and `v`,
    keys and values of one block, heads side by side. Each is [B, N, D]. `guidance`, of all blocks: the difference cond - uncond of eps
    on the guided channels, [B, guided channels, H, W]. Halves: `cond` and `uncond`; empty for a batch that is never divided (and for
    the difference).
    """

    kind: str
    start: int
    stop: int
    half: str = ""

    @property
    def name(self) -> str:
        """For example `span_3_20`, `k_5`, `k_5_cond`, `guidance`."""
        if self.kind == "guidance":
            return self.kind
        return f"{self.kind}_{self.start}" + (f"_{self.stop}" if self.kind == "span" else "") + (f"_{self.half}" if self.half else "")

    @property
    def whole(self) -> Entry:
        """The entry of both halves, which is what blocks know."""
        return self._replace(half="")


@dataclasses.dataclass(frozen=True)
class Read:
    """A read of an entry: its value is sum_j weights[j] * (value written at step sources[j]); the latest source comes first."""

    entry: Entry
    sources: tuple[int, ...]
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class StepFlow:
    """Reads of one step, and its writes: those that a later step reads, and all updates, which happen in place."""

    reads: tuple[Read, ...]
    writes: tuple[Entry, ...]

    def updates(self, entry: Entry) -> bool:
        """Whether the step reads the entry and leaves it changed."""
        return entry in self.writes and any(read.entry == entry for read in self.reads)


def lagrange_weights(sources: Sequence[int], at: int) -> tuple[float, ...]:
    """Weights that extrapolate the polynomial through values at steps `sources` to step `at`; one source repeats its value."""
    weights = []
    for j, s in enumerate(sources):
        weight = 1.0
        for k, other in enumerate(sources):
            if k != j:
                weight *= (at - other) / (s - other)
        weights.append(weight)
    return tuple(weights)


def entries_read(segment: Segment, num_tokens: int, block: Branches = DIT) -> dict[Entry, int]:
    """Entries that a segment reads, with the forecast order of each."""
    start, stop, order = segment.start, segment.stop, segment.order
    if segment.mode == "skip":
        return {Entry("span", start, stop): order}
    if segment.mode == "reuse":
        return {Entry(branch, b, b + 1): order for b in segment.blocks for branch in segment.branches}
    if segment.mode == "compute":
        return {}
    reads = {} if segment.keep == num_tokens else {Entry("span", start, stop): order}
    for b in segment.blocks:
        reads |= {Entry(branch, b, b + 1): order for branch in block.names if not segment.computes(branch)}
        if segment.keep < num_tokens and any(segment.computes(branch) for branch in block.attending):
            reads |= {Entry("k", b, b + 1): 0, Entry("v", b, b + 1): 0}
    return reads


def halves(plan: ScheduledSteps, step: int) -> tuple[str, ...]:
    """The halves that a step computes, as entries name them."""
    if not plan.guidance_modes:
        return ("",)
    return ("cond",) if plan.guidance_modes[step].single else ("cond", "uncond")


def step_reads(plan: ScheduledSteps, step: int) -> dict[Entry, int]:
    """Entries that a step reads, with the forecast order of each."""
    found = {e: order for s in plan.steps[step] for e, order in entries_read(s, plan.model.tokens, plan.model.block).items()}
    reads = {e._replace(half=half): order for e, order in found.items() for half in halves(plan, step)}
    mode = plan.guidance_modes[step] if plan.guidance_modes else BOTH
    return reads | ({Entry("guidance", 0, plan.model.depth): mode.order} if mode.mode == "forecast" else {})


def step_writes(plan: ScheduledSteps, step: int, entry: Entry) -> bool:
    """Whether a step computes the entry as a whole."""
    if entry.kind == "guidance":
        return not (plan.guidance_modes and plan.guidance_modes[step].single)
    return entry.half in halves(plan, step) and is_written(entry, plan.steps[step], plan.model.block)


def is_written(entry: Entry, segments: Iterable[Segment], block: Branches = DIT) -> bool:
    """Whether a step with these segments computes the entry for all tokens."""
    modes = {b: s for s in segments for b in s.blocks}
    covering = [modes[b] for b in range(entry.start, entry.stop)]
    if entry.kind == "span":
        return all(s.mode == "compute" for s in covering)
    makers = block.attending if entry.kind in ("k", "v") else (entry.kind,)
    return covering[0].mode in ("compute", "reuse") and all(map(covering[0].computes, makers))


def is_updated(entry: Entry, segments: Iterable[Segment], num_tokens: int, block: Branches = DIT) -> bool:
    """Whether a step with these segments puts the keys or values of some tokens in place."""
    placing = (s for s in segments if s.mode == "partial")
    return entry.kind in ("k", "v") and any(entry.whole in entries_read(s, num_tokens, block) for s in placing)


def trace(plan: ScheduledSteps) -> tuple[StepFlow, ...]:
    """Reads and writes of every step: what `plan.flows` holds.

    Raises:
        PlanError: if a step reads what no step before it computed.
    """
    wanted = [step_reads(plan, i) for i in range(len(plan.steps))]
    universe = {entry for reads in wanted for entry in reads}
    written: dict[Entry, list[int]] = defaultdict(list)
    live: set[tuple[Entry, int]] = set()
    reads: list[tuple[Read, ...]] = []
    for i, segments in enumerate(plan.steps):
        reads.append(tuple(_resolve(entry, order, written[entry], i) for entry, order in sorted(wanted[i].items())))
        live |= {(read.entry, source) for read in reads[-1] for source in read.sources}
        updated = {entry for entry in wanted[i] if is_updated(entry, segments, plan.model.tokens, plan.model.block)}
        live |= {(entry, i) for entry in updated}
        for entry in universe:
            if entry in updated or step_writes(plan, i, entry):
                written[entry].append(i)
    return tuple(StepFlow(r, tuple(sorted(e for e in universe if (e, i) in live))) for i, r in enumerate(reads))


def _resolve(entry: Entry, order: int, written: list[int], step: int) -> Read:
    if not written and entry.kind == "guidance":
        raise PlanError(
            f"step {step} forecasts guidance from the difference of the two halves, which no earlier step has computed: "
            "put a step of guidance mode both before it, or give it that mode."
        )
    if not written:
        half = {"": "", "cond": " in the conditional half", "uncond": " in the unconditional half"}[entry.half]
        span = f"blocks [{entry.start}, {entry.stop}){half}"
        raise PlanError(
            f"step {step} reads the cached {entry.kind} of {span}, which no earlier step has computed as a whole: "
            "put a step that computes these blocks before it."
        )
    sources = tuple(reversed(written[-order - 1 :]))
    return Read(entry, sources, lagrange_weights(sources, step))


def assign_slots(flows: Sequence[StepFlow]) -> tuple[dict[tuple[Entry, int], int], dict[Entry, int]]:
    """Place every write in a slot of its entry, reusing slots whose value is not read any more; an update stays where it was.

    Returns:
        The slot of (entry, step of the write), and the number of slots of each entry.
    """
    last_read: dict[tuple[Entry, int], int] = {}
    for i, flow in enumerate(flows):
        last_read |= {(read.entry, source): i for read in flow.reads for source in read.sources}
    slots: dict[tuple[Entry, int], int] = {}
    depth: dict[Entry, int] = {}
    held: dict[Entry, list[int]] = defaultdict(list)  # steps whose values may still be read
    for i, flow in enumerate(flows):
        sources = {read.entry: read.sources[0] for read in flow.reads}
        for entry in flow.writes:
            held[entry] = [step for step in held[entry] if last_read.get((entry, step), -1) >= i]
            if flow.updates(entry):
                slots[entry, i] = slots[entry, sources[entry]]
            else:
                busy = {slots[entry, step] for step in held[entry]}
                slots[entry, i] = next(s for s in range(len(busy) + 1) if s not in busy)
                depth[entry] = max(depth.get(entry, 0), slots[entry, i] + 1)
            held[entry].append(i)
    return slots, depth
