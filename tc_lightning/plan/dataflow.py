"""What a plan reads from and writes to the cache, step by step: plain data, no torch.

An *entry* is one cached quantity. It is written at every step that computes it for all tokens; a read takes its last writes, as
many as its forecast weighs. Keys and values that are repeated are also *updated*: a partial step reads what was written or updated
last, and puts those of its tokens in place. Other forecasts do not look at updates, which are of some tokens alone. Where a plan has
steps that compute only the conditional half of a guided batch, each half has entries of its own, which differ in when they were last
written. From this follow which writes are live, how many copies of an entry must be kept, and where each is kept (a *slot*): the
reference sampler and the compiler both go by it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from tc_lightning.errors import PlanError
from tc_lightning.plan.forecasts import Forecast
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

    @property
    def repeats(self) -> bool:
        """Whether its value is the latest source's as it is."""
        return self.weights == (1.0,)


@dataclasses.dataclass(frozen=True)
class StepFlow:
    """Reads of one step, and its writes: those that a later step reads, and all updates, which happen in place."""

    reads: tuple[Read, ...]
    writes: tuple[Entry, ...]

    def updates(self, entry: Entry) -> bool:
        """Whether the step reads the entry and leaves it changed."""
        return entry in self.writes and any(read.entry == entry for read in self.reads)


def entries_read(segment: Segment, num_tokens: int, block: Branches = DIT) -> dict[Entry, Forecast]:
    """Entries that a segment reads, with the forecast of each."""
    start, stop, own, kv = segment.start, segment.stop, segment.forecast, segment.kv_forecast
    if segment.mode == "skip":
        return {Entry("span", start, stop): own}
    if segment.mode == "reuse":
        return {Entry(branch, b, b + 1): own for b in segment.blocks for branch in segment.branches}
    if segment.mode == "compute":
        return {}
    reads = {} if segment.keep == num_tokens else {Entry("span", start, stop): own}
    for b in segment.blocks:
        reads |= {Entry(branch, b, b + 1): own for branch in block.names if not segment.computes(branch)}
        if segment.keep < num_tokens and any(segment.computes(branch) for branch in block.attending):
            reads |= {Entry("k", b, b + 1): kv, Entry("v", b, b + 1): kv}
    return reads


def halves(plan: ScheduledSteps, step: int) -> tuple[str, ...]:
    """The halves that a step computes, as entries name them."""
    if not plan.guidance_modes:
        return ("",)
    return ("cond",) if plan.guidance_modes[step].single else ("cond", "uncond")


def step_reads(plan: ScheduledSteps, step: int) -> dict[Entry, Forecast]:
    """Entries that a step reads, with the forecast of each."""
    found = {e: how for s in plan.steps[step] for e, how in entries_read(s, plan.model.tokens, plan.model.block).items()}
    reads = {e._replace(half=half): how for e, how in found.items() for half in halves(plan, step)}
    mode = plan.guidance_modes[step] if plan.guidance_modes else BOTH
    return reads | ({Entry("guidance", 0, plan.model.depth): mode.forecast} if mode.mode == "forecast" else {})


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
    """Whether a step with these segments puts the keys or values of some tokens in place, in the cache."""
    if entry.kind not in ("k", "v"):
        return False
    reads = (entries_read(s, num_tokens, block).get(entry.whole) for s in segments if s.mode == "partial")
    return any(how is not None and how.repeats for how in reads)


def trace(plan: ScheduledSteps) -> tuple[StepFlow, ...]:
    """Reads and writes of every step: what `plan.flows` holds.

    Raises:
        PlanError: if a step reads what no step before it computed.
    """
    wanted = [step_reads(plan, i) for i in range(len(plan.steps))]
    universe = {entry for reads in wanted for entry in reads}
    written: dict[Entry, list[int]] = defaultdict(list)
    latest: dict[Entry, int] = {}  # the last write or update
    live: set[tuple[Entry, int]] = set()
    reads: list[tuple[Read, ...]] = []
    for i, segments in enumerate(plan.steps):
        reads.append(tuple(_resolve(e, how, written[e], latest.get(e), i) for e, how in sorted(wanted[i].items())))
        live |= {(read.entry, source) for read in reads[-1] for source in read.sources}
        updated = {entry for entry in wanted[i] if is_updated(entry, segments, plan.model.tokens, plan.model.block)}
        live |= {(entry, i) for entry in updated}
        for entry in universe:
            if step_writes(plan, i, entry):
                written[entry].append(i)
                latest[entry] = i
            elif entry in updated:
                latest[entry] = i
    return tuple(StepFlow(r, tuple(sorted(e for e in universe if (e, i) in live))) for i, r in enumerate(reads))


def _resolve(entry: Entry, how: Forecast, written: list[int], latest: int | None, step: int) -> Read:
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
    sources = (latest,) if how.repeats and latest is not None else tuple(reversed(written[-how.history :]))
    if len(sources) < len(how.weights):
        raise PlanError(
            f"step {step} weighs the last {len(how.weights)} values of {entry.name}, of which {len(sources)} have been computed: give "
            "fewer weights there, or an order in their place."
        )
    return Read(entry, sources, how.weigh(sources, step))


def assign_slots(flows: Sequence[StepFlow]) -> tuple[dict[tuple[Entry, int], int], dict[Entry, int]]:
    """Place every write in a slot of its entry, reusing slots whose value is not read any more.

    So an update stays where it was, unless what was there is still to be forecast from.

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
            updated = sources.get(entry)
            held[entry] = [step for step in held[entry] if last_read.get((entry, step), -1) >= i]
            if updated is not None and last_read[entry, updated] == i:
                slots[entry, i] = slots[entry, updated]
            else:
                busy = {slots[entry, step] for step in held[entry]}
                slots[entry, i] = next(s for s in range(len(busy) + 1) if s not in busy)
                depth[entry] = max(depth.get(entry, 0), slots[entry, i] + 1)
            held[entry].append(i)
    return slots, depth
