"""Which pictures a report has, and the files they are in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.report.contenders import FEWER, PLANNED, PUBLISHED
from export.report.figures import front, plan_maps, write_both, write_strip
from export.report.rows import TARGET_NAMES, ReportRow, by_group
from export.report.verdict import best, planned_for
from tc_lightning.measure.figures import importance_figure
from tc_lightning.measure.scores import Scores

FOLDER = "figures"


@dataclasses.dataclass(frozen=True)
class Strip:
    """A row of images, and of their differences to the reference run (None for itself)."""

    name: str
    note: str
    images: str
    difference: str | None


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Paths within the report's folder; those of `fronts` and `maps` have a `-dark.svg` beside their `.svg`.

    Args:
        fronts: title and path of each chart.
        maps: plans as step x block maps; None if nothing was planned.
        tokens: token maps of the predictor.
        grids: title and strips, one grid a budget.
    """

    fronts: dict[str, str]
    maps: str | None
    tokens: str
    grids: dict[str, list[Strip]]


def draw(
    folder: Path, scores: Scores, reference: ReportRow, rows: Sequence[ReportRow], reference_seen: np.ndarray, budgets: Sequence[float]
) -> Pictures:
    """Draw everything into `folder`/figures; `reference_seen` is what is seen of the reference run's first images."""
    place = folder / FOLDER
    place.mkdir()
    fronts = {}
    for target, target_name in TARGET_NAMES.items():
        for across, what in (("ms", "measured time"), ("macs", "multiplications")):
            name = f"front-{target}-{across}"
            write_both(place, name, front(rows, reference, target, across))
            fronts[f"Error against the {target_name} over {what}"] = f"{FOLDER}/{name}.svg"
    mapped = _mapped(rows, budgets)
    if mapped:
        write_both(place, "plans", plan_maps({row.name: row.subject.plan for row in mapped}))
    importance_figure(scores).savefig(place / "tokens.png", dpi=90)
    grids = {f"At {budget:g}x": _grid(place, budget, reference, rows, reference_seen) for budget in budgets}
    return Pictures(fronts, f"{FOLDER}/plans.svg" if mapped else None, f"{FOLDER}/tokens.png", grids)


def _mapped(rows: Sequence[ReportRow], budgets: Sequence[float]) -> list[ReportRow]:
    """The run's own plan, and the best planned artefact for each budget."""
    ours = by_group(rows, PLANNED)[:1] + [row for budget in budgets if (row := best(planned_for(rows, budget), "ode"))]
    return list({row.name: row for row in ours}.values())


def _grid(folder: Path, budget: float, reference: ReportRow, rows: Sequence[ReportRow], reference_seen: np.ndarray) -> list[Strip]:
    """The reference run, the best planned artefact, the best published method and the best run with fewer steps at a budget."""
    strips = [_strip(folder, reference, reference_seen, is_reference=True)]
    enough = [row for row in rows if row.subject.speedup * 1.03 >= budget]
    for candidates in (planned_for(rows, budget), by_group(enough, PUBLISHED), by_group(enough, FEWER)):
        if (row := best(candidates, "ode")) is not None:
            strips.append(_strip(folder, row, reference_seen))
    return strips


def _strip(folder: Path, row: ReportRow, reference_seen: np.ndarray, is_reference: bool = False) -> Strip:
    name = re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")
    write_strip(folder / f"{name}.png", row.seen)
    figures = row.figures
    note = f"{figures['ms_per_image']:.1f} ms an image"
    if is_reference:
        return Strip(row.name, note, f"{FOLDER}/{name}.png", None)
    write_strip(folder / f"{name}-difference.png", row.seen, reference_seen)
    return Strip(row.name, f"{note}, PSNR {figures['psnr_db']:.1f} dB", f"{FOLDER}/{name}.png", f"{FOLDER}/{name}-difference.png")
