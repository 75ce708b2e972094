"""Who wins: planned artefacts against the best of everything else, at equal multiplications and at equal measured time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from export.report.contenders import FEWER, PLANNED, PUBLISHED, ROUNDING
from export.report.rows import TARGET_NAMES, ReportRow, by_group
from tc_lightning.plan.costs import full_step_macs, plan_macs
from tc_lightning.plan.sampler_table import FITTED

SAME_TIME = 1.03  # an alternative may take this much longer on the clock and still count as equally fast
THIRD = 1 / 3


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The best planned artefact for a budget against its best alternative, by one target.

    Args:
        budget: speed-up in MACs that the planned artefact reaches.
        equal: what the alternative may spend as much of: `MACs` or `time`.
        target: ode or reference.
        planned: name of the planned artefact.
        planned_mse: its error.
        best: name of the alternative of least error.
        best_mse: its error.
        closer: share of the images on which the planned artefact is the closer one.
        fewer: name of the best run with fewer steps, and its error; None where none is comparable.
        fewer_mse: its error.
        fitted: name of the best run with fewer steps and a fitted sampler; None where none is comparable.
        fitted_mse: its error.
        unfitted_mse: error of the best alternative whose sampler was not fitted.
    """

    budget: float
    equal: str
    target: str
    planned: str
    planned_mse: float
    best: str
    best_mse: float
    closer: float
    fewer: str | None
    fewer_mse: float | None
    fitted: str | None = None
    fitted_mse: float | None = None
    unfitted_mse: float | None = None

    @property
    def ratio(self) -> float:
        """Error of the planned artefact over that of the best alternative: below 1 it wins."""
        return self.planned_mse / max(self.best_mse, 1e-30)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"ratio": self.ratio}


def compare(rows: Sequence[ReportRow], reference: ReportRow, budgets: Sequence[float]) -> list[Comparison]:
    """All comparisons that the measured rows allow.

    Rounding is in the alternatives' favour: at equal MACs they may spend up to one full step more than the budget, at equal time
    they may take 3 % longer than the planned artefact.
    """
    whole, step = plan_macs(reference.subject.plan), full_step_macs(reference.subject.plan.model)
    found = []
    for budget in budgets:
        for target in TARGET_NAMES:
            ours = best(planned_for(rows, budget), target)
            if ours is None:
                continue
            others = by_group(rows, PUBLISHED, FEWER)
            if ours.subject.plan.caches:  # what the planner found without a cache is what a cache has to beat, too
                others += [row for row in by_group(rows, PLANNED) if not row.subject.plan.caches]
            equal = {
                "MACs": [row for row in others if plan_macs(row.subject.plan) <= whole / budget + step],
                "time": [row for row in others if row.ms <= ours.ms * SAME_TIME],
            }
            found += [_compare(budget, name, target, ours, rivals) for name, rivals in equal.items() if rivals]
    return found


def planned_for(rows: Sequence[ReportRow], budget: float) -> list[ReportRow]:
    """Planned artefacts that reach a budget."""
    return [row for row in by_group(rows, PLANNED) if row.subject.speedup * ROUNDING >= budget]


def best(rows: Sequence[ReportRow], target: str) -> ReportRow | None:
    """The row of least error."""
    return min(rows, key=lambda row: row.mse(target), default=None)


def sentences(comparisons: Sequence[Comparison], missing: int, failed: int, images: int) -> list[str]:
    """What a reader should take away, losses included."""
    told = [_told(c) for c in comparisons]
    if not comparisons:
        told = ["No planned artefact reaches a budget at which there is anything to compare it with."]
    lost = [c for c in comparisons if c.ratio >= 1]
    if lost:
        told.append(f"The plan loses {len(lost)} of {len(comparisons)} comparisons: there, take the alternative.")
    if failed:
        told.append(f"{failed} plan(s) could not be exported or disagreed with torch; they are listed with the reason, not measured.")
    if missing:
        told.append(f"{missing} method and budget pair(s) have no plan; they are listed with the reason.")
    return [*told, f"Errors are means over {images} images that neither training nor planning saw."]


def headline(comparisons: Sequence[Comparison]) -> str:
    """One sentence: by how much the plan wins or loses, against the converged ODE at equal MACs."""
    decisive = [c for c in comparisons if c.target == "ode" and c.equal == "MACs"]
    if not decisive:
        return "There is nothing to compare the plan with at these budgets."
    parts = [f"{c.ratio:.2g} (at {c.budget:g}x)" for c in decisive]
    wins = sum(c.ratio < 1 for c in decisive)
    verdict = {len(decisive): "wins at every budget", 0: "loses at every budget"}.get(
        wins, f"wins at {wins} of {len(decisive)} budgets"
    )
    return (
        f"Measured against the converged ODE at equal multiplications, the plan {verdict}: "
        f"its error is {_listed(parts)} times that of the best alternative."
    )


def _compare(budget: float, equal: str, target: str, ours: ReportRow, rivals: list[ReportRow]) -> Comparison:
    rival, fewer = best(rivals, target), best([row for row in rivals if not row.subject.plan.caches], target)
    assert rival is not None
    of_fit = [row for row in [ours, *rivals] if is_fitted(row) and not row.subject.plan.caches]
    fitted, unfitted = best(of_fit, target), best([row for row in rivals if not is_fitted(row)], target)
    return Comparison(
        budget,
        equal,
        target,
        planned=ours.name,
        planned_mse=ours.mse(target),
        best=rival.name,
        best_mse=rival.mse(target),
        closer=float((ours.errors[target] < rival.errors[target]).mean()),
        fewer=None if fewer is None else fewer.name,
        fewer_mse=None if fewer is None else fewer.mse(target),
        fitted=None if fitted is None else fitted.name,
        fitted_mse=None if fitted is None else fitted.mse(target),
        unfitted_mse=None if unfitted is None else unfitted.mse(target),
    )


def is_fitted(row: ReportRow) -> bool:
    """Whether the coefficients of a row's sampler were fitted to the model."""
    return row.subject.plan.sampler.name.endswith(FITTED)


def _told(c: Comparison) -> str:
    what = "equal multiplications" if c.equal == "MACs" else "equal time"
    if c.ratio >= 1:
        outcome = f"LOSES to {c.best}: its error is {c.ratio:.3g} times as large"
    else:
        aim = "at most a third" if c.ratio <= THIRD else "more than a third"
        outcome = f"beats {c.best}: its error is {c.ratio:.2g} times as large ({aim})"
    where = f"At {c.budget:g}x and {what}, against the {TARGET_NAMES[c.target]}"
    text = f"{where}, “{c.planned}” {outcome}; closer on {c.closer:.0%} of images."
    if c.fitted_mse and c.unfitted_mse:
        sampler, cache = c.fitted_mse / c.unfitted_mse, c.planned_mse / c.fitted_mse
        text += f" Of its gain, the fitted sampler alone ({c.fitted}) makes {sampler:.2g} of the best unfitted error, "
        text += "and there is no cache." if c.fitted == c.planned else f"and the cache {cache:.2g} of that."
    if c.fewer is not None and c.fewer != c.best and c.fewer_mse:
        text += f" Against fewer steps ({c.fewer}) it is {c.planned_mse / c.fewer_mse:.2g} times."
    return text


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
