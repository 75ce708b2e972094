"""One run of the planner: its images, its searches, and what becomes of the plans that these find."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.diffusion.table import SamplerTable
from tc_lightning.errors import PlanError
from tc_lightning.evaluation import RolloutEvaluator, psnr_db
from tc_lightning.guidance import Guidance
from tc_lightning.models.dit import DiT
from tc_lightning.plan import CachePlan, ModelSignature
from tc_lightning.planner.bench import Bench, Trial
from tc_lightning.planner.front import TRIALS, FrontPoint
from tc_lightning.planner.pilot import HARD, Sample, as_they_come, difficulty, images, stratified
from tc_lightning.planner.price import Price, macs_price
from tc_lightning.planner.recipe import Kitchen, Recipe
from tc_lightning.planner.refine import refine_sampler
from tc_lightning.planner.robust import robust_mean_of_all
from tc_lightning.planner.search import Search, grid, native, variations
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.ranks import ALONE, Ranks
from tc_lightning.scores import Scores
from tc_lightning.targets import ODE_SAMPLER, ODE_SPACING

BATCH = 16
SEEDS = 5  # shapes of one budget that the next one starts from


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run of the planner is to do: arguments of `tc_lightning.planner.policy.PlannerPolicy`, and the price of plans."""

    target_speedup: float
    target: str
    front: tuple[float, ...]
    evaluations: int
    front_evaluations: int
    fit_images: int
    judge_images: int
    final_images: int
    pool_images: int
    refinements: int
    ode_steps: int
    progress: bool
    price: Price = macs_price

    @property
    def speedups(self) -> tuple[float, ...]:
        """All that plans are looked for at, once each, that of the chosen plan first."""
        return tuple(dict.fromkeys((self.target_speedup, *self.front)))


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


class Finished(NamedTuple):
    """A recipe's plan, fitted and refined, and its robust error on the images that were looked at."""

    recipe: Recipe
    plan: CachePlan
    error: float


class PlannerRun:
    """Searches and points of one run.

    Args:
        settings: what to do.
        subject: what for.

    Raises:
        PlanError: if there are fewer images than processes.
    """

    def __init__(self, settings: Settings, subject: Subject) -> None:
        self.settings, self.subject, self.model, self.ranks = settings, subject, subject.model, subject.ranks
        groups = (settings.fit_images, settings.judge_images, settings.final_images)
        if min(groups) < self.ranks.world:
            raise PlanError(
                f"{self.ranks.world} processes cannot share {min(groups)} images: set fit_images, judge_images and final_images to "
                "one for each at least, or use fewer devices."
            )
        self._shown = settings.progress and self.ranks.first
        fit, judge = self._pick().split(settings.fit_images)
        final = as_they_come(self._pool_size, settings.final_images)
        parts = [part.part(self.ranks.share(len(part.indices))) for part in (fit, judge, final)]
        self.target = self._run_target(parts)
        self.fitted, self.judged = len(parts[0].indices), len(parts[0].indices) + len(parts[1].indices)
        kitchen = Kitchen(subject.signature, subject.guidance, subject.scores, subject.scored, subject.reference)
        record = None if subject.folder is None else subject.folder / TRIALS
        self.bench = Bench(self.model, kitchen, settings.price, self._seen, self.fitted, self.ranks, record)

    def searches(self) -> dict[float, Search]:
        """The search for the target, then those for the other budgets, which start from what that one found.

        Raises:
            PlanError: if a budget has no plan.
        """
        settings, steps = self.settings, len(self.subject.reference)
        others = settings.speedups[1:]
        total = settings.evaluations + len(others) * settings.front_evaluations
        with tqdm(total=total, desc="planning", unit="plan", disable=not self._shown) as bar:

            def progress(trial: Trial, best: Trial) -> None:
                bar.update()
                bar.set_postfix_str(f"{psnr_db(best.error):.1f} dB at {steps / best.cost:.2f}x")

            first = Search(self.bench, steps / settings.target_speedup, progress)
            self._search_widely(first)
            seeds = [*(shape for shape, _ in first.ranking()[:SEEDS]), *native(self._reference_run)]
            found = {settings.target_speedup: first}
            for speedup in others:
                found[speedup] = Search(self.bench, steps / speedup, progress)
                found[speedup].try_shapes(seeds[: settings.front_evaluations])
                found[speedup].climb(settings.front_evaluations - len(found[speedup].trials))
        for search, other in itertools.permutations(found.values(), 2):
            search.adopt(other)
        for speedup, search in found.items():
            if not search.trials or search.best.error == float("inf"):
                raise PlanError(f"no plan was found for a speed-up of {speedup:g}: lower it.")
        return found

    def finish(self, searches: dict[float, Search]) -> dict[float, Finished]:
        """The plan of every budget: each search's best, fitted and refined on all images that were looked at.

        Of these a budget takes the best that it can pay for, which may be what another one found.
        """
        recipes = dict.fromkeys(search.best.recipe for search in searches.values())
        total = len(recipes) * self.settings.refinements
        finished: dict[Recipe, Finished] = {}
        with tqdm(total=total, desc="refining", unit="pass", disable=not (self._shown and total)) as bar:
            for j, recipe in enumerate(recipes, 1):
                finished[recipe] = self._finished(recipe, bar)
                bar.update(j * self.settings.refinements - bar.n)  # fewer passes were made if one did not help
        paid = {speedup: [one for recipe, one in finished.items() if recipe in search.trials] for speedup, search in searches.items()}
        return {speedup: min(ones, key=lambda one: one.error) for speedup, ones in paid.items()}

    def points(self, finished: dict[float, Finished]) -> tuple[FrontPoint, ...]:
        """Plans, measured on images that nothing has looked at, that of the target first; budgets of the same plan have one point.

        Raises:
            PlanError: if one of these images becomes NaN.
        """
        distinct = {one.recipe: (speedup, one.plan) for speedup, one in reversed(finished.items())}  # of equal ones the first
        return tuple(self._point(*pair, chosen=j == 0) for j, pair in enumerate(reversed(distinct.values())))

    @property
    def _seen(self) -> TargetRun:
        return self.target.part(slice(0, self.judged))

    @property
    def _pool_size(self) -> int:
        return max(self.settings.pool_images, self.settings.fit_images + self.settings.judge_images)

    @property
    def _reference_run(self) -> tuple[str, str, int]:
        reference = self.subject.reference
        return reference.name, reference.spacing, len(reference)

    def _pick(self) -> Sample:
        """The images that plans are fitted and judged on; all processes pick the same."""
        count = self.settings.fit_images + self.settings.judge_images
        if self._pool_size == count or count < HARD:
            return as_they_come(0, count)
        own = range(self._pool_size)[self.ranks.share(self._pool_size)]
        what = "hard images" if self._shown else None
        noise, steps = images(self.model, list(own)), len(self.subject.reference)
        return stratified(self.ranks.gathered(difficulty(self.model, self.subject.guidance, steps, *noise, BATCH, what)), count)

    def _search_widely(self, search: Search) -> None:
        count = self.settings.evaluations
        search.try_shapes(list(grid(self._reference_run))[:count])
        for shape, _ in search.ranking()[:2]:
            room = max(0, (2 * count) // 3 - len(search.trials))
            search.try_shapes(list(variations(shape, self.subject.guidance.doubles_batch))[:room])
        search.climb(count - len(search.trials))

    def _finished(self, recipe: Recipe, bar: tqdm[None]) -> Finished:
        wide = Bench(self.model, self.bench.kitchen, self.settings.price, self._seen, self.judged, self.ranks)
        plan = refine_sampler(self.model, wide.fit(recipe).plan, self._seen, self.settings.refinements, self.ranks, bar.update)
        return Finished(recipe, plan, robust_mean_of_all(self._errors(plan, self._seen), self._seen.counts_B, self.ranks))

    def _point(self, speedup: float, plan: CachePlan, chosen: bool) -> FrontPoint:
        mse_B = self.ranks.gathered(self._errors(plan, self.target.part(slice(self.judged, None))))
        if not torch.isfinite(mse_B).all():
            raise PlanError(f"the plan found for a speed-up of {speedup:g} makes images NaN that the search did not look at: lower it.")
        stderr = float(mse_B.std(correction=1)) / len(mse_B) ** 0.5 if len(mse_B) > 1 else 0.0
        return FrontPoint(plan, self.settings.target, float(mse_B.mean()), stderr, chosen)

    def _errors(self, plan: CachePlan, target: TargetRun) -> torch.Tensor:
        found = RolloutEvaluator(self.model, target.x_T, target.labels_B, target.x_0).mse_per_image(plan)
        return found.double().to(target.x_0.device)

    def _run_target(self, parts: list[Sample]) -> TargetRun:
        settings, subject = self.settings, self.subject
        ode = make_sampler(ODE_SAMPLER, settings.ode_steps, ODE_SPACING)
        sampler = subject.reference if settings.target == "reference" else ode
        noise = images(self.model, [index for part in parts for index in part.indices])
        run = run_target(self.model, sampler, subject.guidance, *noise, BATCH, "target run" if self._shown else None)
        weights = torch.tensor([weight for part in parts for weight in part.weights], device=run.x_0.device)
        return dataclasses.replace(run, weights_B=weights)
