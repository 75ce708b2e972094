"""What the compiler makes of a plan, for a person to read: a listing, and a picture. No torch, no onnx."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.runtime.layout import BYTES
from export.runtime.programs import FULL, LoweredPlan
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import (
    cache_bytes_per_image,
    entry_bytes,
    full_step_macs,
    halves_share,
    macs_speedup,
    selector_runs,
    step_macs,
)
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.forecasts import Forecast
from tc_lightning.plan.segments import MODES, Segment

_GUIDANCE = {
    "both": "",
    "forecast": "; conditional half alone, guided by a forecast of {}",
    "cond": "; conditional half alone, not guided",
}
COLOURS = {"compute": "#1b4965", "partial": "#5fa8d3", "reuse": "#f2b880", "skip": "#f4f1ea"}


def explain(plan: CachePlan, lowered: LoweredPlan, bytes_per_value: int = 4) -> str:
    """The programs of a plan: what each computes, reads and writes, when it runs, and what the cache holds after each step."""
    full, cache = full_step_macs(plan.model), cache_bytes_per_image(plan, bytes_per_value)
    instead = "" if plan.reference == plan.sampler else f" in place of {len(plan.reference)} of {plan.reference.name}"
    lines = [
        f"{plan.summary}: {plan.in_words}{instead}",
        f"  {len(lowered.programs)} programs, {macs_speedup(plan):.2f}x fewer MACs, cache {cache / 1e6:.2f} MB an image",
    ]
    for program in lowered.programs:
        macs = step_macs(plan.model, program.segments, selector_runs(plan.guidance, program.guidance))
        share = halves_share(program.guidance) * macs / full
        lines.append(
            f"  {program.name}: {len(program.steps)} steps, {macs / 1e6:.1f} MMACs a sample, {share:.3f} of a full step"
            + _GUIDANCE[program.guidance.mode].format(program.guidance.forecast.in_words)
        )
        lines.append("    runs   " + ", ".join(_describe(s) for s in program.segments))
        if others := [other.name for other in lowered.graphs[program.graph] if other is not program]:
            lines.append("    graph  shared with " + ", ".join(others))
        if program.reads:
            lines.append("    reads  " + _listing(dict(program.reads)))
        if program.writes:
            lines.append("    writes " + _listing(dict.fromkeys(program.writes, 1)))
    names = {p.name: ("F" if p.name == FULL else str(j)) for j, p in enumerate(lowered.programs)}
    held = values_held(plan)
    lines.append("  program of each step, noisiest first (F = step_full): " + " ".join(names[b.program] for b in lowered.bindings))
    lines.append("  values that the cache holds after it:                 " + " ".join(map(str, held)))
    lines.append(f"  at most {max(held)} at a time, in {_places(plan, lowered, bytes_per_value)}")
    return "\n".join(lines)


def conditioning_in_words(manifest: dict[str, Any]) -> str:
    """What the condition graph writes for each distinct row of a request's conditions, which is held beside the cache."""
    size, constants = BYTES[manifest["precision"]], sum(map(math.prod, manifest["constants"].values()))
    terms = size * manifest["modulations"] * manifest["model"]["width"]
    return f"{size * constants / 1e6:.2f} MB a request and {terms / 1e3:.0f} kB a step for each distinct row of conditions"


def _places(plan: CachePlan, lowered: LoweredPlan, bytes_per_value: int) -> str:
    """How many places of which size the cache has."""
    counts: Counter[int] = Counter()
    for entry, slots in sorted(lowered.slots.items(), key=lambda item: item[0].kind == "guidance"):
        counts[entry_bytes(plan, entry, bytes_per_value)] += slots
    return " and ".join(f"{count} places of {size / 1e3:.0f} kB a sample" for size, count in counts.items()) or "no place"


def values_held(plan: CachePlan) -> list[int]:
    """After each step, how many cached values a later step will read."""
    flows = plan.flows
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
    heights = {"grid": 6, "strip": 0.7} | ({"halves": 0.7} if plan.guidance_modes else {}) | {"cache": 2}
    axes = dict(zip(heights, figure.subplots(len(heights), 1, sharex=True, height_ratios=list(heights.values())), strict=True))
    grid, strip, cache = (axes[name] for name in ("grid", "strip", "cache"))
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
    strip.set_yticks([0], ["program"])
    if plan.guidance_modes:
        _draw_guidance(axes["halves"], plan)
    cache.bar(range(plan.num_steps), values_held(plan), color=COLOURS["partial"], width=0.9)
    cache.set(xlabel="sampling step, noisiest first", ylabel="values held")
    figure.savefig(path, dpi=110)


def _draw_guidance(axes: Any, plan: CachePlan) -> None:
    """Which halves each step computes: 2 both, a digit with a tilde the forecast's order or its weights less one, - no guidance."""
    shades = {"both": 0.8, "forecast": 0.4, "cond": 0.1}
    axes.imshow([[shades[mode.mode] for mode in plan.guidance_modes]], aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for i, mode in enumerate(plan.guidance_modes):
        label = {"both": "2", "forecast": f"~{mode.forecast.history - 1}", "cond": "-"}[mode.mode]
        axes.text(i, 0, label, ha="center", va="center", fontsize=7, color="white" if mode.mode == "both" else "black")
    axes.set_yticks([0], ["halves"])


def _modes(segments: Sequence[Segment]) -> list[str]:
    return [segment.mode for segment in segments for _ in segment.blocks]


def _listing(counts: dict[Entry, int]) -> str:
    """Entries in short: `k 0-11, span 0-12 x3`; a run of blocks with the same number of past values is one item."""
    by_kind: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    items = []
    for entry, count in sorted(counts.items()):
        half, times = f" {entry.half}" if entry.half else "", f" x{count}" if count > 1 else ""
        if entry.kind == "span":
            items.append(f"span [{entry.start},{entry.stop}){half}{times}")
        elif entry.kind == "guidance":
            items.append(f"guidance{times}")
        else:
            by_kind[entry.kind, half, count].append(entry.start)
    for (kind, half, count), numbers in by_kind.items():
        for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
            members = [number for _, number in run]
            blocks = f"{members[0]}" if len(members) == 1 else f"{members[0]}-{members[-1]}"
            items.append(f"{kind} {blocks}{half}" + (f" x{count}" if count > 1 else ""))
    return ", ".join(items)


def _describe(s: Segment) -> str:
    partial = f"partial {s.keep} {'content ' if s.is_content else ''}tokens"
    what = {"partial": partial, "reuse": f"reuse {'+'.join(s.branches)}"}.get(s.mode, s.mode)
    return f"[{s.start},{s.stop}) {what}" + _forecasts(s)


def _forecasts(s: Segment) -> str:
    if s.mode == "compute":
        return ""
    kv = f", keys and values {s.kv_forecast.in_words}" if s.kv_forecast != Forecast() else ""
    return f" {s.forecast.in_words}{kv}"
