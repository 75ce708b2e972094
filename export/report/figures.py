"""Drawing: the fronts and the plans as maps, each for light and for dark pages, and images of the same seeds side by side."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from export.grid import difference_pixels, to_pixels
from export.report.contenders import FEWER, PLANNED, PUBLISHED
from export.report.rows import TARGET_NAMES, ReportRow, by_group
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.segments import MODES

GAIN, GAP, SMALLEST = 10.0, 1, 64
MARKERS = "osv^D<>Pphd8"
MOST_MAPS = 6
HALVES = {"both": "both halves", "forecast": "conditional half, guided by a forecast", "cond": "conditional half, not guided"}
KINDS = (*MODES, *HALVES.values())  # what a cell of a map may show
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a page: text, lines, planned artefacts, fewer steps, and what a plan does in a block or with guidance."""

    ink: str
    faint: str
    planned: str
    fewer: str
    kinds: dict[str, str]


LIGHT = Theme(
    "#1d2733",
    "#d5dbe1",
    "#c2410c",
    "#111827",
    dict(zip(KINDS, ("#1b4965", "#5fa8d3", "#f2b880", "#eceae4", "#9aa5b1", "#e9a23b", "#b42318"), strict=True)),
)
DARK = Theme(
    "#e4e8ec",
    "#39434e",
    "#fb923c",
    "#f3f4f6",
    dict(zip(KINDS, ("#7cc0ea", "#3a7ca5", "#c98b4f", "#262d35", "#66717d", "#e9a23b", "#f87171"), strict=True)),
)


def write_both(folder: Path, name: str, draw: Callable[[Theme], Figure]) -> None:
    """Draw a figure for light and for dark pages, as NAME.svg and NAME-dark.svg."""
    for theme, suffix in ((LIGHT, ""), (DARK, "-dark")):
        settings: dict[Any, Any] = dict.fromkeys(INKED, theme.ink)
        with matplotlib.rc_context(settings | {"font.size": 9, "svg.hashsalt": "report", "legend.frameon": False}):
            draw(theme).savefig(folder / f"{name}{suffix}.svg", transparent=True, metadata={"Date": None})


def front(rows: Sequence[ReportRow], reference: ReportRow, target: str, across: str) -> Callable[[Theme], Figure]:
    """Error against a target, logarithmic, over milliseconds an image (`ms`) or the speed-up in MACs (`macs`); log axes."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(8.2, 4.6), layout="constrained")
        ax = figure.subplots()
        ax.set(yscale="log", ylabel=f"mean squared error against the {TARGET_NAMES[target]}")
        ax.grid(color=theme.faint, linewidth=0.6)
        ax.set_axisbelow(True)
        _draw_methods(ax, by_group(rows, PUBLISHED), target, across, theme)
        _draw_fewer(ax, by_group(rows, FEWER), target, across, theme)
        _draw_planned(ax, by_group(rows, PLANNED), target, across, theme)
        if across == "ms":
            ax.set(xlabel=f"milliseconds an image, ONNX Runtime (the reference run takes {reference.ms:.1f})")
        else:
            ax.set(xlabel="multiplications saved: the reference run's over the plan's")
        handles, _ = ax.get_legend_handles_labels()
        figure.legend(handles=handles[::-1], loc="outside right upper", fontsize=8)  # what is drawn last, on top, is named first
        return figure

    return draw


def plan_maps(plans: dict[str, CachePlan]) -> Callable[[Theme], Figure]:
    """What happens to every block at every step, one panel a plan; a row below the blocks tells the halves of guidance, if any plan
    leaves one out."""
    shown = {name: _cells(plan) for name, plan in list(plans.items())[:MOST_MAPS]}
    guided = any(set(cells[0]) != {HALVES["both"]} for cells in shown.values())
    shown = {name: cells if guided else cells[1:] for name, cells in shown.items()}
    used = {kind for cells in shown.values() for row in cells for kind in row}

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(8.2, 1.9 * len(shown) + 0.5), layout="constrained")
        axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        colours = ListedColormap([theme.kinds[kind] for kind in KINDS])
        for ax, (name, cells) in zip(axes, shown.items(), strict=True):
            numbers = np.array([[KINDS.index(kind) for kind in row] for row in cells])
            extent = (-0.5, numbers.shape[1] - 0.5, -0.5 - guided, len(numbers) - 0.5 - guided)
            ax.imshow(numbers, aspect="auto", origin="lower", cmap=colours, vmin=0, vmax=len(KINDS) - 1, extent=extent)
            ax.set(ylabel="block")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_yticks(MaxNLocator(4, integer=True).tick_values(0, len(numbers) - 1 - guided)[:-1])
            ax.set_title(name, fontsize=9, loc="left")
        axes[-1].set(xlabel="sampling step, noisiest first")
        patches = [Patch(facecolor=theme.kinds[k], edgecolor=theme.ink, linewidth=0.4, label=k) for k in KINDS if k in used]
        figure.legend(handles=patches, loc="outside upper right", ncols=4, fontsize=8)
        return figure

    return draw


def _cells(plan: CachePlan) -> list[list[str]]:
    """Rows of kinds by step: the halves of guidance, then every block."""
    steps = plan.to_json()["steps"]
    halves = [HALVES[step.get("guidance", {"mode": "both"})["mode"]] for step in steps]
    modes = [[segment.mode for segment in segments for _ in segment.blocks] for segments in plan.steps]
    return [halves, *(list(row) for row in zip(*modes, strict=True))]


def write_strip(path: Path, latents_BCHW: np.ndarray, reference_BCHW: np.ndarray | None = None) -> None:
    """Images side by side as a PNG; with a reference, the absolute difference to it times ten."""
    pixels = to_pixels(latents_BCHW) if reference_BCHW is None else difference_pixels(latents_BCHW, reference_BCHW, GAIN)
    factor = max(1, -(-SMALLEST // pixels.shape[1]))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    gap = GAP * factor
    strip = np.zeros((pixels.shape[1], len(pixels) * (pixels.shape[2] + gap) - gap, 4), np.uint8)
    for j, image in enumerate(pixels):
        left = j * (pixels.shape[2] + gap)
        strip[:, left : left + pixels.shape[2], :3] = image
        strip[:, left : left + pixels.shape[2], 3] = 255
    Image.fromarray(strip).save(path, format="PNG")


def _draw_methods(ax: Axes, rows: Sequence[ReportRow], target: str, across: str, theme: Theme) -> None:
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for j, (method, points) in enumerate(_by_method(rows, across).items()):
        style: dict[str, Any] = {"color": colours[j % len(colours)], "marker": MARKERS[j % len(MARKERS)]}
        _line(ax, points, target, across, label=method, linewidth=0.7, markersize=4.5, alpha=0.9, **style)


def _draw_fewer(ax: Axes, rows: Sequence[ReportRow], target: str, across: str, theme: Theme) -> None:
    dashes = ("--", ":", "-.")
    by_solver: dict[str, list[ReportRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: _place(row, across)):
        by_solver[row.subject.plan.sampler.name].append(row)
    for j, (solver, points) in enumerate(sorted(by_solver.items())):
        lower = _front(points, target, across)
        _line(ax, points, target, across, color=theme.fewer, linestyle="", marker=".", markersize=4, alpha=0.6)
        _line(ax, lower, target, across, label=f"fewer steps: {solver}", color=theme.fewer, linewidth=1.4, linestyle=dashes[j % 3])


def _draw_planned(ax: Axes, rows: Sequence[ReportRow], target: str, across: str, theme: Theme) -> None:
    if not rows:
        return
    for row in rows:
        stderr = row.figures[f"mse_{target}"]["stderr"]
        ax.errorbar(_place(row, across), _height(row, target), yerr=stderr, fmt="none", ecolor=theme.planned, elinewidth=1)
    points = sorted(rows, key=lambda row: _place(row, across))
    style: dict[str, Any] = {"color": theme.planned, "marker": "o", "markersize": 6}
    _line(ax, points, target, across, linestyle="", **style)
    _line(ax, _front(points, target, across), target, across, label="planned", linewidth=2, **style)


def _front(points: Sequence[ReportRow], target: str, across: str) -> list[ReportRow]:
    """Those points that none beats in both cost and error."""
    cheap_first = sorted(points, key=lambda row: row.ms if across == "ms" else -row.subject.speedup)
    kept: list[ReportRow] = []
    for row in cheap_first:
        if not kept or row.mse(target) < kept[-1].mse(target):
            kept.append(row)
    return kept


def _by_method(rows: Sequence[ReportRow], across: str) -> dict[str, list[ReportRow]]:
    methods: dict[str, list[ReportRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.subject.method, _place(row, across))):
        methods[row.subject.method].append(row)
    return methods


def _line(ax: Axes, points: Sequence[ReportRow], target: str, across: str, **style: Any) -> None:
    ax.plot([_place(row, across) for row in points], [_height(row, target) for row in points], **style)


def _place(row: ReportRow, across: str) -> float:
    return row.ms if across == "ms" else row.subject.speedup


def _height(row: ReportRow, target: str) -> float:
    return max(row.mse(target), 1e-16)  # a logarithmic axis has no zero
