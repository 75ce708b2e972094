"""What the compiler makes of a plan, for a person to read: a listing, and a picture. No torch, no onnx."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from export.programs import FULL, LoweredPlan
from tc_lightning.costs import cache_bytes_per_image, entry_shape, full_step_macs, macs_speedup, step_macs
from tc_lightning.dataflow import Entry, trace
from tc_lightning.plan import MODES, CachePlan, Segment

COLOURS = {"compute": "#1b4965", "partial": "#5fa8d3", "reuse": "#f2b880", "skip": "#f4f1ea"}


def explain(plan: CachePlan, lowered: LoweredPlan, bytes_per_value: int = 4) -> str:
    """The programs of a plan: what each computes, reads and writes, when it runs, and what the cache holds after each step."""
    full, cache = full_step_macs(plan.model), cache_bytes_per_image(plan, bytes_per_value)
    instead = "" if plan.reference is None else f" in place of {len(plan.reference)} of {plan.reference.name}"
    lines = [
        f"{plan.summary}: {plan.num_steps} steps{instead}, {len(lowered.programs)} programs, {macs_speedup(plan):.2f}x fewer MACs, "
        f"cache {cache / 1e6:.2f} MB an image"
    ]
    for program in lowered.programs:
        macs = step_macs(plan.model, program.segments)
        lines.append(f"  {program.name}: {len(program.steps)} steps, {macs / 1e6:.1f} MMACs a sample, {macs / full:.3f} of a full step")
        lines.append("    runs   " + ", ".join(_describe(s) for s in program.segments))
        if program.reads:
            lines.append("    reads  " + _listing(dict(program.reads)))
        if program.writes:
            lines.append("    writes " + _listing(dict.fromkeys(program.writes, 1)))
    names = {p.name: ("F" if p.name == FULL else str(j)) for j, p in enumerate(lowered.programs)}
    held = values_held(plan)
    each = math.prod(entry_shape(plan.model)) * bytes_per_value
    lines.append("  program of each step, noisiest first (F = step_full): " + " ".join(names[b.program] for b in lowered.bindings))
    lines.append("  values that the cache holds after it:                 " + " ".join(map(str, held)))
    lines.append(f"  at most {max(held)} at a time, in {sum(lowered.slots.values())} places of {each / 1e3:.0f} kB a sample")
    return "\n".join(lines)


def values_held(plan: CachePlan) -> list[int]:
    """After each step, how many cached values a later step will read."""
    flows = trace(plan)
    last_read: dict[tuple[Entry, int], int] = {}
    for i, flow in enumerate(flows):
        last_read |= {(read.entry, source): i for read in flow.reads for source in read.sources}
    return [sum(written <= i < last for (_, written), last in last_read.items()) for i in range(plan.num_steps)]


def plan_figure(plan: CachePlan, lowered: LoweredPlan, path: Path) -> None:
    """Draw the plan: what happens to every block at every step, which program the step runs, and what the cache holds after it."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    blocks = [[MODES.index(mode) for mode in _modes(segments)] for segments in plan.steps]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    grid, strip, cache = figure.subplots(3, 1, sharex=True, height_ratios=[6, 0.7, 2])
    colours = ListedColormap([COLOURS[mode] for mode in MODES])
    grid.imshow(
        [list(row) for row in zip(*blocks, strict=True)], aspect="auto", origin="lower", cmap=colours, vmin=0, vmax=len(MODES) - 1
    )
    used = {mode for row in blocks for mode in row}
    grid.legend(
        handles=[Patch(facecolor=COLOURS[m], edgecolor="grey", label=m) for k, m in enumerate(MODES) if k in used], loc="upper right"
    )
    grid.set(ylabel="block", title=f"{plan.summary}: {macs_speedup(plan):.2f}x fewer MACs")
    order = [p.name for p in lowered.programs]
    strip.imshow([[order.index(b.program) % 10 for b in lowered.bindings]], aspect="auto", cmap="tab10", vmin=0, vmax=9)
    for i, bound in enumerate(lowered.bindings):
        label = "F" if bound.program == FULL else str(order.index(bound.program))
        strip.text(i, 0, label, ha="center", va="center", fontsize=7, color="white")
    strip.set(yticks=[], ylabel="program")
    cache.bar(range(plan.num_steps), values_held(plan), color=COLOURS["partial"], width=0.9)
    cache.set(xlabel="sampling step, noisiest first", ylabel="values held")
    figure.savefig(path, dpi=110)


def _modes(segments: Sequence[Segment]) -> list[str]:
    return [segment.mode for segment in segments for _ in segment.blocks]


def _listing(counts: dict[Entry, int]) -> str:
    """Entries in short: `k 0-11, span 0-12 x3`; a run of blocks with the same number of past values is one item."""
    by_kind: dict[tuple[str, int], list[int]] = defaultdict(list)
    items = []
    for entry, count in sorted(counts.items()):
        if entry.kind == "span":
            items.append(f"span [{entry.start},{entry.stop})" + (f" x{count}" if count > 1 else ""))
        else:
            by_kind[entry.kind, count].append(entry.start)
    for (kind, count), numbers in by_kind.items():
        for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
            members = [number for _, number in run]
            blocks = f"{members[0]}" if len(members) == 1 else f"{members[0]}-{members[-1]}"
            items.append(f"{kind} {blocks}" + (f" x{count}" if count > 1 else ""))
    return ", ".join(items)


def _describe(s: Segment) -> str:
    what = {"partial": f"partial {len(s.tokens)} tokens", "reuse": f"reuse {'+'.join(s.branches)}"}.get(s.mode, s.mode)
    return f"[{s.start},{s.stop}) {what}" + (f" order {s.order}" if s.mode != "compute" else "")
