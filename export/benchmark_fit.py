"""How far fitted coefficients carry: other guidance, labels that were left out, fewer and more images of the fit.

    python export/benchmark_fit.py                       the newest run under runs/
    python export/benchmark_fit.py --run RUN --speedup 3 --images 64

Full compute with fewer steps, fitted to the run's full-compute images and refined as the planner does, beside DPM-Solver++ 2M with
as many steps at its best spacing: mean squared error (median) of final latents on images that nothing was fitted on. Prints a table
in Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from export.command import positive, run
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.conditions import class_label
from tc_lightning.planner.fit import fit_sampler
from tc_lightning.planner.image_choice import images
from tc_lightning.planner.refine import refine_sampler
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.rollout.evaluation import BATCH, RolloutEvaluator
from tc_lightning.rollout.sampling import full_plan
from tc_lightning.runs.folder import find_run, read_run
from tc_lightning.runs.loaded import LoadedRun, load_run

GUIDANCE_SCALES = (1.0, 1.5, 2.5, 4.0, 7.0)
TRIED_SPACINGS = ("mix:0.5", "quadratic", "logsnr")
REFINEMENTS = 3
FRESH = 10_000  # index of the first image that is measured on: far from those of the fits

Labels = Callable[[Tensor], Tensor]  # labels [B] -> whether an image of that class is taken [B]


class CarryRow(NamedTuple):
    """One line of the table: where it is measured, and the error per image of both samplers, [B]."""

    where: str
    fitted_B: Tensor
    plain_B: Tensor


class FitBench:
    """Fits one number of steps of one run in several ways.

    Args:
        loaded: the run.
        speedup: steps of the full-compute run over those that are fitted.
        fit_images: images of the fit.
        test_images: images that are measured on.

    Raises:
        TokenCacheError: if fewer than 2 steps or images are left to fit, or none is saved.
    """

    def __init__(self, loaded: LoadedRun, speedup: float, fit_images: int, test_images: int) -> None:
        self.model, self.plan = loaded.model, loaded.plan
        self.steps, self.fit_images, self.test_images = int(len(loaded.plan.reference) / speedup + 1e-9), fit_images, test_images
        if not 2 <= self.steps < len(loaded.plan.reference) or fit_images < 2:
            raise TokenCacheError(
                f"a speed-up of {speedup:g} leaves {self.steps} of {len(loaded.plan.reference)} steps, fitted on {fit_images} images: "
                "at least 2 steps, fewer than that run has, and 2 images are needed."
            )

    @property
    def label(self) -> str:
        """Name of the class label among the conditions."""
        return class_label(self.plan.model.conditions).name

    def rows(self) -> Iterator[CarryRow]:
        """All lines of the table."""
        base, half = self.fitted(self.fit_images), class_label(self.plan.model.conditions).classes // 2
        scale = self.plan.guidance.scale
        for g in sorted({*GUIDANCE_SCALES, scale}):
            yield self.row(f"guidance {g:g}" + " (fitted at it)" * (g == scale), base, g)
        if half:
            some = self.fitted(self.fit_images, lambda labels_B: labels_B < half)
            yield self.row(f"classes {half} and up, fitted on those below", some, scale, lambda labels_B: labels_B >= half)
            yield self.row(f"classes {half} and up, fitted on all", base, scale, lambda labels_B: labels_B >= half)
        for count in (self.fit_images // 2, 2 * self.fit_images):
            yield self.row(f"fitted on {count} images instead of {self.fit_images}", self.fitted(count), scale)

    def fitted(self, count: int, labels: Labels | None = None) -> CachePlan:
        """Full compute with fewer steps, fitted and refined on the first images of some classes."""
        target = self.target(0, count, self.plan.guidance.scale, labels)
        return refine_sampler(
            self.model, fit_sampler(self.model, self.fewer(TRIED_SPACINGS[0]), target, count).plan, target, REFINEMENTS
        )

    def fewer(self, spacing: str) -> CachePlan:
        """Full compute with fewer steps, as published."""
        plan = full_plan(self.plan.model, make_sampler(self.model.schedule, "dpmpp_2m", self.steps, spacing), self.plan.guidance)
        return dataclasses.replace(plan, reference=self.plan.reference)

    def row(self, where: str, plan: CachePlan, scale: float, labels: Labels | None = None) -> CarryRow:
        """Errors of a plan, and of the best plain sampler, at a guidance scale."""
        target = self.target(FRESH, self.test_images, scale, labels)
        evaluator = RolloutEvaluator(self.model, target.x_T, target.given, target.x_0)
        guidance = dataclasses.replace(self.plan.guidance, scale=scale)
        plain = [evaluator.mse_per_image(dataclasses.replace(self.fewer(spacing), guidance=guidance)) for spacing in TRIED_SPACINGS]
        found_B = evaluator.mse_per_image(dataclasses.replace(plan, guidance=guidance))
        return CarryRow(where, found_B, min(plain, key=lambda errors_B: float(errors_B.mean())))

    def target(self, first: int, count: int, scale: float, labels: Labels | None = None) -> TargetRun:
        """The full-compute run of the first images from an index on, of the classes that are asked for."""
        indices: list[int] = []
        while len(indices) < count:
            candidates = list(range(first, first + count))
            taken = [True] * count if labels is None else labels(images(self.model, candidates)[1][self.label]).tolist()
            indices += [index for index, wanted in zip(candidates, taken, strict=True) if wanted]
            first += count
        guidance = dataclasses.replace(self.plan.guidance, scale=scale)
        return run_target(self.model, self.plan.reference, guidance, *images(self.model, indices[:count]), BATCH)


def table(rows: list[CarryRow]) -> str:
    """Markdown."""
    lines = ["| measured at | fitted | plain DPM-Solver++ 2M | ratio of means |", "|---|---|---|---|"]
    for row in rows:
        ours, theirs = (f"{float(e.mean()):.2g} ({float(e.median()):.2g})" for e in (row.fitted_B, row.plain_B))
        lines.append(f"| {row.where} | {ours} | {theirs} | {float(row.fitted_B.mean() / row.plain_B.mean()):.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder (default: the newest under runs/)")
    parser.add_argument("--speedup", type=float, default=3.0, help="in MACs (default: 3)")
    parser.add_argument("--fit-images", type=positive, default=32)
    parser.add_argument("--images", type=positive, default=64, help="images that are measured on")
    args = parser.parse_args()
    bench = FitBench(load_run(read_run(args.run or find_run(Path("runs")))), args.speedup, args.fit_images, args.images)
    print(table(list(tqdm(bench.rows(), "fitting and measuring", unit="row"))))


if __name__ == "__main__":
    run(main)
