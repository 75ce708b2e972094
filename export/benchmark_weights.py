"""What forecasts gain by weights of their own: plans with a cache, refined with them and without, on images that nothing was fitted on.

    python export/benchmark_weights.py                       the newest run under runs/
    python export/benchmark_weights.py --run RUN --speedup 3 --target ode --fit-images 24 64 --images 48

Two plans of DPM-Solver++ 2M: guidance's difference forecast at nearly half of the steps, and every second step skipped, order 1. Each
is fitted, then refined as the planner does, on the same images, by as many iterations. Mean squared error (median) of final latents,
and the ratio of means with its standard error. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from export.benchmark_budgets import compared
from export.command import positive, run
from tc_lightning.errors import PlanError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.planner.fit import fit_sampler
from tc_lightning.planner.fitted_fewer_steps import FIT, JUDGE, REFINEMENTS
from tc_lightning.planner.image_choice import images
from tc_lightning.planner.policy import TARGETS
from tc_lightning.planner.price import macs_price
from tc_lightning.planner.recipe import build_plan
from tc_lightning.planner.refine import refine_sampler
from tc_lightning.planner.shapes import Shape, fill
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.planner.theta import Places
from tc_lightning.policies.pruned_steps import PrunedStep
from tc_lightning.policies.subject import Subject
from tc_lightning.rollout.evaluation import BATCH, RolloutEvaluator
from tc_lightning.rollout.targets import converged_ode
from tc_lightning.runs.folder import find_run, read_run
from tc_lightning.runs.loaded import LoadedRun, load_run

FRESH = 10_000  # index of the first image that is measured on: far from those of the fits
SHAPES = {
    "halves of guidance forecast": Shape("dpmpp_2m", "mix:0.5", alone=0.48),
    "every second step skipped, order 1": Shape("dpmpp_2m", "mix:0.5", 2.0, PrunedStep("skip", 1)),
}


class WeightsRow(NamedTuple):
    """One line of the table: the plan, images of the fit, how many weights are free, and the error per image of each, [B]."""

    what: str
    fit_images: int
    weights: int
    without_B: Tensor
    with_B: Tensor


class WeightsBench:
    """Refines the plans of one budget with weights of their own and without.

    Args:
        loaded: the run.
        speedup: what plans are to save, in MACs.
        target: what images are to come near to, `reference` or `ode`.
        test_images: images that are measured on.
        refinements: steps of Gauss-Newton at most.
    """

    def __init__(self, loaded: LoadedRun, speedup: float, target: str, test_images: int, refinements: int = REFINEMENTS) -> None:
        plan, self.model = loaded.plan, loaded.model
        self.subject = Subject(plan.model, self.model.schedule, plan.reference, plan.guidance, loaded.scores, plan.reference)
        self.budget, self.test_images, self.refinements = len(plan.reference) / speedup, test_images, refinements
        self.sampler = plan.reference if target == "reference" else converged_ode(self.model.schedule)

    def rows(self, counts: Iterable[int]) -> Iterator[WeightsRow]:
        """A line for every plan and number of images of the fit."""
        fresh = self.target(range(FRESH, FRESH + self.test_images))
        evaluator = RolloutEvaluator(self.model, fresh.x_T, fresh.given, fresh.x_0)
        for count in counts:
            target = self.target(range(count))
            for what, plan in self.plans().items():
                fitted = fit_sampler(self.model, plan, target, count).plan
                found = [refine_sampler(self.model, fitted, target, self.refinements, weights=weights) for weights in (False, True)]
                free = Places.of(plan, weights=True).size - Places.of(plan, weights=False).size
                yield WeightsRow(what, count, free, *(evaluator.mse_per_image(one).double() for one in found))

    def plans(self) -> dict[str, CachePlan]:
        """What the budget pays for, as published.

        Raises:
            PlanError: if it pays for nothing, or there are no halves of guidance to forecast.
        """
        recipes = {what: fill(shape, self.budget, lambda r: macs_price(build_plan(self.subject, r))) for what, shape in SHAPES.items()}
        found = {what: build_plan(self.subject, recipe) for what, recipe in recipes.items() if recipe is not None}
        if len(found) < len(SHAPES) or not all(plan.caches for plan in found.values()):
            raise PlanError(f"{self.budget:g} full steps pay for no plan with a cache: measure at a lower speed-up.")
        return found

    def target(self, indices: range) -> TargetRun:
        """The run of these images that plans are to come near to."""
        return run_target(self.model, self.sampler, self.subject.guidance, *images(self.model, list(indices)), BATCH)


def table(rows: Iterable[WeightsRow]) -> str:
    """Markdown."""
    lines = [
        "| plan | fitted on | free weights | refined without: mean (median) | with | ratio of means |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs, ours = (f"{float(e.mean()):.2g} ({float(e.median()):.2g})" for e in (row.without_B, row.with_B))
        found = compared(row.with_B, row.without_B)
        ratio = f"{found['ratio']:.2f} ± {found['ratio_stderr']:.2f}"
        lines.append(f"| {row.what} | {row.fit_images} | {row.weights} | {theirs} | {ours} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder (default: the newest under runs/)")
    parser.add_argument("--speedup", type=float, default=3.0, help="in MACs (default: 3)")
    parser.add_argument("--target", choices=TARGETS, default="ode", help="what images are to come near to")
    parser.add_argument("--fit-images", type=positive, nargs="+", default=[FIT + JUDGE], help="images of the fit; several are compared")
    parser.add_argument("--images", type=positive, default=48, help="images that are measured on")
    parser.add_argument("--refinements", type=positive, default=REFINEMENTS, help="steps of Gauss-Newton at most")
    args = parser.parse_args()
    loaded = load_run(read_run(args.run or find_run(Path("runs"))))
    bench = WeightsBench(loaded, args.speedup, args.target, args.images, args.refinements)
    total = len(SHAPES) * len(args.fit_images)
    print(table(list(tqdm(bench.rows(args.fit_images), "refining and measuring", total, unit="row"))))


if __name__ == "__main__":
    run(main)
