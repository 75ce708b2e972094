"""The planner as a policy: what `lightning fit` ends with, and what `python -m tc_lightning plan` runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.diffusion.table import SamplerTable
from tc_lightning.errors import PlanError
from tc_lightning.evaluation import RolloutEvaluator, psnr_db
from tc_lightning.guidance import Guidance
from tc_lightning.models.dit import DiT
from tc_lightning.plan import ModelSignature
from tc_lightning.planner.bench import Bench, Trial
from tc_lightning.planner.front import TRIALS, FrontPoint
from tc_lightning.planner.price import Price, macs_price
from tc_lightning.planner.recipe import Kitchen
from tc_lightning.planner.search import Search, grid, native, variations
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.policies.base import PlanChoice, PlanningContext, Policy
from tc_lightning.ranks import ALONE, Ranks
from tc_lightning.sampling import noise_for
from tc_lightning.scores import Scores
from tc_lightning.targets import ODE_SAMPLER, ODE_SPACING

TARGETS = ("reference", "ode")
SEED = 0x506C616E  # of the planner's images: apart from any seed that a person would choose
BATCH = 16
SEEDS = 5  # shapes of one budget that the next one starts from


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is planned for.

    Args:
        model: the teacher, on the device where plans are to run.
        signature: its signature.
        guidance: guidance scale and channels.
        scores: importances and sensitivities.
        scored: the sampler whose steps the scores are of.
        reference: the full-compute run that plans replace.
        ranks: the processes that plan together.
        folder: where trials are remembered; None for nowhere.
    """

    model: DiT
    signature: ModelSignature
    guidance: Guidance
    scores: Scores
    scored: SamplerTable
    reference: SamplerTable
    ranks: Ranks = ALONE
    folder: Path | None = None


class PlannerPolicy(Policy):
    """Searches sampler, spacing, placement of full steps, forecasts, segments and guidance; fits the sampler to each plan.

    Args:
        target_speedup: of the plan that is chosen, at least, against the full-compute run of the context.
        target: what images are to come near to: `reference`, the full-compute run, or `ode`, the converged solution.
        front: further speed-ups at which the best plan is looked for.
        evaluations: plans tried for `target_speedup`.
        front_evaluations: plans tried for each further speed-up.
        fit_images: images that samplers are fitted on.
        judge_images: images that plans are compared on.
        final_images: images that the figures of the plans found are measured on, and nothing else is.
        ode_steps: steps of the run that counts as converged.
        progress: show progress bars.

    Raises:
        PlanError: if an argument is out of range.
    """

    on_all_ranks = True

    def __init__(
        self,
        target_speedup: float = 2.5,
        target: str = "reference",
        front: tuple[float, ...] = (2.0, 3.0, 4.0),
        evaluations: int = 60,
        front_evaluations: int = 20,
        fit_images: int = 12,
        judge_images: int = 16,
        final_images: int = 32,
        ode_steps: int = 200,
        progress: bool = True,
    ) -> None:
        if not all(speedup > 1.0 for speedup in (target_speedup, *front)):
            raise PlanError(f"speed-ups must be above 1; found {(target_speedup, *front)}.")
        if target not in TARGETS:
            raise PlanError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}.")
        if min(evaluations, front_evaluations, fit_images, judge_images, final_images, ode_steps - 1) < 1:
            raise PlanError("evaluations and images must be at least 1, ode_steps at least 2.")
        self.target_speedup, self.target, self.front = float(target_speedup), target, tuple(map(float, front))
        self.evaluations, self.front_evaluations = evaluations, front_evaluations
        self.fit_images, self.judge_images, self.final_images = fit_images, judge_images, final_images
        self.ode_steps, self.progress = ode_steps, progress
        self.price: Price = macs_price

    def check(self, signature: ModelSignature, sampler: SamplerTable) -> None:
        """Whether the budgets pay for anything.

        Raises:
            PlanError: if they pay for less than two full steps.
        """
        for speedup in (self.target_speedup, *self.front):
            if len(sampler) / speedup < 2.0:
                most = len(sampler) / 2
                raise PlanError(f"a speed-up of {speedup:g} leaves fewer than 2 of {len(sampler)} full steps: choose up to {most:g}.")

    def plan(self, context: PlanningContext) -> PlanChoice:
        """Choose a plan; the table has a line for every recipe that was tried.

        Raises:
            PlanError: if the context has no model, or no plan fits the budget.
        """
        if context.model is None:
            raise PlanError("the planner runs plans and needs the model: plan with `lightning fit` or `python -m tc_lightning plan`.")
        c = context
        self.check(c.signature, c.baseline)
        return self.search(Subject(context.model, c.signature, c.guidance, c.scores, c.sampler, c.baseline, c.ranks, c.folder))

    def search(self, subject: Subject) -> PlanChoice:
        """As `plan`, for what can be planned without being asked through a context."""
        run = _Run(self, subject)
        searches = run.searches()
        distinct = {search.best.recipe: (speedup, search) for speedup, search in reversed(searches.items())}  # of equal ones the first
        points = tuple(run.point(*pair, chosen=j == 0) for j, pair in enumerate(reversed(distinct.values())))
        rows = [_row(speedup, t, search.best) for speedup, search in searches.items() for t in sorted(search.trials.values(), key=_mse)]
        return PlanChoice(points[0].plan, rows, points)


class _Run:
    """One run of the planner: its images, its bench, its searches."""

    def __init__(self, policy: PlannerPolicy, subject: Subject) -> None:
        self.policy, self.subject, self.model, self.ranks = policy, subject, subject.model, subject.ranks
        groups = (policy.fit_images, policy.judge_images, policy.final_images)
        if min(groups) < self.ranks.world:
            raise PlanError(
                f"{self.ranks.world} processes cannot share {min(groups)} images: set fit_images, judge_images and final_images to "
                "one for each at least, or use fewer devices."
            )
        parts = _shares(groups, self.ranks.share)
        self.target = self._run_target([index for part in parts for index in part])
        self.fitted, self.judged = len(parts[0]), len(parts[0]) + len(parts[1])
        kitchen = Kitchen(subject.signature, subject.guidance, subject.scores, subject.scored, subject.reference)
        record = None if subject.folder is None else subject.folder / TRIALS
        seen = self.target.part(slice(0, self.judged))
        self.bench = Bench(self.model, kitchen, policy.price, seen, self.fitted, self.ranks, record)

    def searches(self) -> dict[float, Search]:
        """The search for the target, then those for the other budgets, which start from what that one found."""
        policy, steps = self.policy, len(self.subject.reference)
        others = [speedup for speedup in dict.fromkeys(policy.front) if speedup != policy.target_speedup]
        total = policy.evaluations + len(others) * policy.front_evaluations
        with tqdm(total=total, desc="planning", unit="plan", disable=not (policy.progress and self.ranks.first)) as bar:

            def progress(trial: Trial, best: Trial) -> None:
                bar.update()
                bar.set_postfix_str(f"{psnr_db(best.mse):.1f} dB at {steps / best.cost:.2f}x")

            first = Search(self.bench, steps / policy.target_speedup, progress)
            self._search_widely(first)
            seeds = [*(shape for shape, _ in first.ranking()[:SEEDS]), *native(self._reference_run)]
            found = {policy.target_speedup: first}
            for speedup in others:
                found[speedup] = Search(self.bench, steps / speedup, progress)
                found[speedup].try_shapes(seeds[: policy.front_evaluations])
                found[speedup].climb(policy.front_evaluations - len(found[speedup].trials))
        for search, other in itertools.permutations(found.values(), 2):
            search.adopt(other)
        for speedup, search in found.items():
            if not search.trials or search.best.mse == float("inf"):
                raise PlanError(f"no plan was found for a speed-up of {speedup:g}: lower it.")
        return found

    @property
    def _reference_run(self) -> tuple[str, str, int]:
        reference = self.subject.reference
        return reference.name, reference.spacing, len(reference)

    def _search_widely(self, search: Search) -> None:
        count = self.policy.evaluations
        search.try_shapes(list(grid(self._reference_run))[:count])
        for shape, _ in search.ranking()[:2]:
            room = max(0, (2 * count) // 3 - len(search.trials))
            search.try_shapes(list(variations(shape, self.subject.guidance.doubles_batch))[:room])
        search.climb(count - len(search.trials))

    def point(self, speedup: float, search: Search, chosen: bool) -> FrontPoint:
        """The best plan of a search, fitted on all images that the search saw, and measured on those that it did not."""
        wide = Bench(self.model, self.bench.kitchen, self.policy.price, self.bench.target, self.judged, self.ranks)
        plan = wide.fit(search.best.recipe).plan
        unseen = self.target.part(slice(self.judged, None))
        mse_B = RolloutEvaluator(self.model, unseen.x_T, unseen.labels_B, unseen.x_0).mse_per_image(plan).double()
        ones = torch.ones_like(mse_B)
        count, total, squares = self.ranks.total(torch.stack([ones.sum(), mse_B.sum(), mse_B.square().sum()])).tolist()
        mean = total / count
        if not np.isfinite(mean):
            raise PlanError(f"the plan found for a speed-up of {speedup:g} makes images NaN that the search did not look at: lower it.")
        stderr = float(np.sqrt(max(squares / count - mean**2, 0.0) / max(count - 1, 1)))
        return FrontPoint(plan, self.policy.target, mean, stderr, chosen)

    def _run_target(self, indices: list[int]) -> TargetRun:
        policy, subject = self.policy, self.subject
        sampler = subject.reference if policy.target == "reference" else make_sampler(ODE_SAMPLER, policy.ode_steps, ODE_SPACING)
        x_BCHW, labels_B = images(self.model, indices)
        what = "target run" if policy.progress and self.ranks.first else None
        return run_target(self.model, sampler, subject.guidance, x_BCHW, labels_B, BATCH, what)


def images(model: DiT, indices: list[int]) -> tuple[Tensor, Tensor]:
    """Noise [B, C, H, W] and labels [B] of the planner's images, on the model's device."""
    device = next(model.parameters()).device
    noise = torch.cat([noise_for(SEED, range(index, index + 1), model, device) for index in indices])
    return noise, torch.tensor([index % model.config.num_classes for index in indices], device=device)


def _shares(groups: tuple[int, ...], share: Callable[[int], slice]) -> list[range]:
    """This process's image indices of each group."""
    starts = np.cumsum([0, *groups])
    return [range(start, start + count)[share(count)] for start, count in zip(starts.tolist(), groups, strict=False)]


def _mse(trial: Trial) -> float:
    return trial.mse


def _row(speedup: float, trial: Trial, best: Trial) -> dict[str, Any]:
    recipe = trial.recipe
    pruned = {f"pruned_{name}": value for name, value in dataclasses.asdict(recipe.pruned).items()}
    return {
        "speedup": speedup,
        "solver": recipe.solver,
        "spacing": recipe.spacing,
        "steps": recipe.num_steps,
        "full_steps": len(recipe.full),
        "alone": len(recipe.alone),
        **pruned,
        "cost": trial.cost,
        "mse": trial.mse,
        "chosen": trial.recipe == best.recipe,
    }
