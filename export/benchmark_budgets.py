"""What planning has found: the plans of a run's front beside fewer steps with a sampler fitted alike, on fresh images.

    python export/benchmark_budgets.py                          the newest run under runs/
    python export/benchmark_budgets.py --run RUN --images 256

Mean squared error of final latents against the run's full-compute images, and against the converged ODE, whichever of the two was
planned for. Prints a table in Markdown, and writes it to RUN/budgets.md and the figures to RUN/budgets.json.

Shape suffixes: B images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from export.command import positive, run
from export.report.contenders import front_rows
from export.report.rows import TARGET_NAMES
from tc_lightning.errors import RunError
from tc_lightning.plan.atomic import write_atomically
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.given import REPORTING, part_for
from tc_lightning.rollout.evaluation import final_latents
from tc_lightning.rollout.sampling import full_plan
from tc_lightning.rollout.targets import TargetKey, Targets, cached_targets
from tc_lightning.runs.folder import find_run, read_run
from tc_lightning.runs.loaded import LoadedRun, load_run

SEED = 4_669_201_609  # of images that neither training, nor planning, nor a report has looked at


@dataclasses.dataclass(frozen=True)
class Budget:
    """A speed-up that was planned for.

    Args:
        speedup: in MACs.
        planned_for: the target that plans were fitted to, `reference` or `ode`.
        plan: what the planner hands out.
        fewer_steps: full compute with fewer steps, fitted alike, that it has to beat; None if it is that itself.
    """

    speedup: float
    planned_for: str
    plan: CachePlan
    fewer_steps: CachePlan | None

    @property
    def plans(self) -> list[CachePlan]:
        """All that is to be run."""
        return [self.plan] if self.fewer_steps is None else [self.plan, self.fewer_steps]


def budgets(folder: Path) -> list[Budget]:
    """All budgets of a run's front.

    Raises:
        RunError: if there are none, or the front is damaged.
        PlanError: if one of its plans is.
    """
    rows, found = front_rows(folder), []
    own = {(row["target"], budget): folder / row["plan"] for row in rows if row["role"] == "fewer steps" for budget in _budgets(row)}
    for row in rows:
        if row["role"] == "planned":
            plan = CachePlan.load(folder / row["plan"])
            named = None if plan.fewer_steps is None else full_plan(plan.model, plan.fewer_steps, plan.guidance)
            for budget in _budgets(row):  # one plan may end several, which pay for different numbers of full steps
                rival = own.get((row["target"], budget)) if plan.caches else None
                found.append(Budget(budget, row["target"], plan, named if rival is None else CachePlan.load(rival)))
    if not found:
        raise RunError(f"{folder} has no front: plan with `python -m tc_lightning plan --run {folder}` first.")
    return sorted(found, key=lambda one: (one.planned_for, one.speedup))


def _budgets(row: Mapping[str, Any]) -> list[float]:
    return [float(speedup) for speedup in row.get("budgets", [])]


def measured(loaded: LoadedRun, found: Iterable[Budget], targets: Targets) -> list[dict[str, Any]]:
    """A row of plain JSON values for every budget and target."""
    latents: dict[str, Tensor] = {}
    plans = {plan.digest: plan for budget in found for plan in budget.plans}
    with tqdm(total=len(targets.x_T) * sum(plan.num_steps for plan in plans.values()), desc="plans", unit="step") as bar:
        for name, plan in plans.items():
            latents[name] = final_latents(loaded.model, plan, targets.x_T, targets.given, loaded.companions, on_step=bar.update)
    ends = {"reference": targets.reference, "ode": targets.ode}
    return [_row(budget, target, latents, ends[target]) for budget in found for target in TARGET_NAMES]


def compared(ours_B: Tensor, theirs_B: Tensor) -> dict[str, float]:
    """Ratio of two means over the same images, and its standard error: images that are hard for both tell nothing about it."""
    ratio = ours_B.mean() / theirs_B.mean()
    apart_B = (ours_B - ratio * theirs_B) / theirs_B.mean()
    return {"ratio": float(ratio), "ratio_stderr": float(apart_B.std() / len(apart_B) ** 0.5)}


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| budget | planned for | error against the | planned: mean (median) | fewer steps, fitted: mean (median) | ratio of means |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, theirs = row["planned"], row["fewer_steps"]
        of_plan = f"{_mean(ours)}, {row['macs_speedup']:.2f}x"
        of_fewer = "the same" if theirs is None else f"{_mean(theirs)}, {theirs['steps']} steps"
        ratio = "1" if theirs is None else f"{row['ratio']:.2f} ± {row['ratio_stderr']:.2f}"
        names = f"{row['budget']:g}x | {TARGET_NAMES[row['planned_for']]} | {TARGET_NAMES[row['target']]}"
        lines.append(f"| {names} | {of_plan} | {of_fewer} | {ratio} |")
    return "\n".join(lines)


def _row(budget: Budget, target: str, latents: Mapping[str, Tensor], end_BCHW: Tensor) -> dict[str, Any]:
    ours_B, *theirs = ((latents[plan.digest] - end_BCHW).double().square().flatten(1).mean(1) for plan in budget.plans)
    return {
        "budget": budget.speedup,
        "planned_for": budget.planned_for,
        "target": target,
        "plan": budget.plan.summary,
        "macs_speedup": macs_speedup(budget.plan),
        "planned": _spread(ours_B, budget.plan),
        "fewer_steps": None if budget.fewer_steps is None else _spread(theirs[0], budget.fewer_steps),
        **({} if budget.fewer_steps is None else compared(ours_B, theirs[0])),
    }


def _spread(errors_B: Tensor, plan: CachePlan) -> dict[str, float]:
    stderr = float(errors_B.std() / len(errors_B) ** 0.5)
    return {"steps": plan.num_steps, "mean": float(errors_B.mean()), "median": float(errors_B.median()), "stderr": stderr}


def _mean(spread: Mapping[str, float]) -> str:
    return f"{spread['mean']:.2g} ± {spread['stderr']:.1g} ({spread['median']:.2g})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder (default: the newest under runs/)")
    parser.add_argument("--images", type=_at_least_two, default=256, help="images that are measured on (default: 256)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of their noise and classes")
    args = parser.parse_args()
    loaded = load_run(read_run(args.run or find_run(Path("runs"))))
    folder, reference = loaded.run.folder, loaded.reference
    found = budgets(folder)
    schedule, examples = loaded.model.schedule, part_for(loaded.model.examples, REPORTING)
    key = TargetKey(reference.model, schedule, reference.sampler, reference.guidance, args.seed, args.images, examples=examples)
    with tqdm(total=key.image_steps, desc="reference run and converged ODE", unit="step") as bar:
        targets = cached_targets(loaded.model, key, folder / "targets", bar.update)
    rows = measured(loaded, found, targets)
    content = {"teacher": reference.model.teacher, "images": args.images, "seed": args.seed, "rows": rows}
    write_atomically(folder / "budgets.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(folder / "budgets.md", (table(rows) + "\n").encode())
    print(table(rows))


def _at_least_two(text: str) -> int:
    if (value := positive(text)) < 2:
        raise argparse.ArgumentTypeError(f"{value} image has no standard error: give at least 2")
    return value


if __name__ == "__main__":
    run(main)
