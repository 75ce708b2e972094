"""One run of the planner: its images, its searches, and what becomes of the plans that these find."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from tc_lightning.errors import PlanError
from tc_lightning.measure.psnr import psnr_db
from tc_lightning.models.conditions import Given, labels_in
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.planner.finalists import CacheUse, Finalist, best_without_cache, choose, finalist_recipes
from tc_lightning.planner.front import TRIALS
from tc_lightning.planner.image_choice import HARD, Sample, as_they_come, dealt, difficulty, images, stratified
from tc_lightning.planner.price import Price, macs_price
from tc_lightning.planner.recipe import Recipe
from tc_lightning.planner.refine import OnPass
from tc_lightning.planner.search import Search
from tc_lightning.planner.shapes import grid, native
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.planner.trials import Trial, TrialRunner
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.choice import FrontPoint, Role
from tc_lightning.rollout.evaluation import BATCH, RolloutEvaluator
from tc_lightning.rollout.targets import converged_ode

SEEDS = 5  # shapes of one budget that the next one starts from


@dataclasses.dataclass(frozen=True)
class PlannerSettings:
    """What a run of the planner is to do: arguments of `tc_lightning.planner.policy.PlannerPolicy`, and the price of plans."""

    target_speedup: float
    target: str
    front: tuple[float, ...]
    evaluations: int
    front_evaluations: int
    cache: CacheUse
    fit_images: int
    judge_images: int
    choice_images: int
    final_images: int
    pool_images: int
    refinements: int
    ode_steps: int
    progress: bool
    forecast_weights: bool
    price: Price = macs_price

    @property
    def speedups(self) -> tuple[float, ...]:
        """All that plans are looked for at, once each, that of the run's own plan first."""
        return tuple(dict.fromkeys((self.target_speedup, *self.front)))


class Choice(NamedTuple):
    """What a budget ends with: the plan; full compute with fewer steps, refined alike, that it has to beat; all that were compared."""

    chosen: Finalist
    fewer_steps: Finalist | None
    finalists: list[Finalist]

    @property
    def plan(self) -> CachePlan:
        """The plan, which names what it has to beat if it is not that itself."""
        plan, fewer = self.chosen.plan, self.fewer_steps
        return plan if fewer is None or not plan.caches else dataclasses.replace(plan, fewer_steps=fewer.plan.sampler)


class PlannerRun:
    """Searches, finalists and points of one run.

    Four groups of images: samplers are fitted on the first, recipes compared on the second, and finalists fitted and refined on
    both; finalists are compared on the third, and the figures of the plans that win are measured on the fourth.

    Args:
        settings: what to do.
        context: what for; it has a model, on the device where plans are to run.

    Raises:
        PlanError: if there is no model, or there are fewer images than processes.
    """

    def __init__(self, settings: PlannerSettings, context: PlanningContext) -> None:
        if context.model is None:
            raise PlanError("the planner runs plans and needs the model: plan with `lightning fit` or `python -m tc_lightning plan`.")
        self.settings, self.context, self.model, self.ranks = settings, context, context.model, context.ranks
        least = min(settings.fit_images, settings.judge_images, settings.choice_images, settings.final_images)
        if least < self.ranks.world:
            raise PlanError(
                f"{self.ranks.world} processes cannot share {least} images: set fit_images, judge_images, choice_images and "
                "final_images to one for each at least, or use fewer devices."
            )
        self._shown = settings.progress and self.ranks.first
        seen, choice = self._pick()
        fit, judge = seen.split(settings.fit_images)
        final = as_they_come(self._pool_size, settings.final_images)
        parts = [part.part(self.ranks.share(len(part.indices))) for part in (fit, judge, choice, final)]
        self.fitted, self.judged, self.compared = itertools.accumulate(len(part.indices) for part in parts[:3])
        self.target = self._run_target(parts)
        record = None if context.folder is None else context.folder / TRIALS
        self.bench = TrialRunner(self.model, context, settings.price, self._seen, self.fitted, self.ranks, record)

    def searches(self) -> dict[float, Search]:
        """The search for the target, then those for the other budgets, which start from what that one found.

        Raises:
            PlanError: if a budget has no plan.
        """
        settings, steps = self.settings, len(self.context.reference)
        with tqdm(desc="planning", unit="plan", disable=not self._shown) as bar:

            def progress(trial: Trial, best: Trial) -> None:
                bar.update()
                bar.set_postfix_str(f"{psnr_db(best.error):.1f} dB at {steps / best.cost:.2f}x")

            found: dict[float, Search] = {}
            for speedup in settings.speedups:
                found[speedup] = Search(self.bench, steps / speedup, progress)
                self._search(found[speedup], found[settings.target_speedup])
        for speedup, search in found.items():
            if not search.trials or search.best.error == float("inf"):
                raise PlanError(f"no plan was found for a speed-up of {speedup:g}: lower it.")
        return found

    def finish(self, searches: dict[float, Search]) -> dict[float, Choice]:
        """What every budget ends with, of all finalists that it can pay for.

        Raises:
            PlanError: if a budget has no plan with, or without, a cache, and one was asked for.
        """
        use = self.settings.cache
        recipes = list(dict.fromkeys(recipe for search in searches.values() for recipe in finalist_recipes(search, use)))
        costs = {recipe: self.bench.cost(recipe) for recipe in recipes}
        paid = {speedup: [recipe for recipe in recipes if costs[recipe] <= s.budget] for speedup, s in searches.items()}
        finalists = self._finalists(recipes)
        compared = {speedup: [finalists[recipe] for recipe in affordable] for speedup, affordable in paid.items()}
        return {speedup: Choice(choose(ones, use), best_without_cache(ones), ones) for speedup, ones in compared.items()}

    def points(self, choices: dict[float, Choice]) -> tuple[FrontPoint, ...]:
        """The plans of all budgets, then what they have to beat, once each, measured on images that nothing has looked at.

        Raises:
            PlanError: if one of these images becomes NaN.
        """
        planned = [(choice.plan, speedup) for speedup, choice in choices.items()]
        fewer = [(c.fewer_steps.plan, speedup) for speedup, c in choices.items() if c.plan.caches and c.fewer_steps is not None]
        own = choices[self.settings.target_speedup].plan
        first = _merged(planned)
        rest = [pair for pair in _merged(fewer) if _run_of(pair[0]) not in {_run_of(plan) for plan, _ in first}]
        return (
            *(self._point(plan, budgets, "planned", chosen=_run_of(plan) == _run_of(own)) for plan, budgets in first),
            *(self._point(plan, budgets, "fewer steps", chosen=False) for plan, budgets in rest),
        )

    @property
    def _seen(self) -> TargetRun:
        return self.target.part(slice(0, self.judged))

    @property
    def _pool_size(self) -> int:
        s = self.settings
        return max(s.pool_images, s.fit_images + s.judge_images + s.choice_images)

    @property
    def _reference_run(self) -> tuple[str, str, int]:
        reference = self.context.reference
        return reference.name, reference.spacing, len(reference)

    def _pick(self) -> tuple[Sample, Sample]:
        """The images that plans are fitted and judged on, and those that finalists are compared on; all processes pick the same."""
        seen, choice = self.settings.fit_images + self.settings.judge_images, self.settings.choice_images
        if self._pool_size == seen + choice or min(seen, choice) < HARD:
            return as_they_come(0, seen), as_they_come(seen, choice)
        own = range(self._pool_size)[self.ranks.share(self._pool_size)]
        what = "hard images" if self._shown else None
        noise, steps = images(self.model, list(own)), len(self.context.reference)
        guidance, device = self.context.guidance, noise[0].device
        own_P = self.ranks.together(lambda: difficulty(self.model, guidance, steps, *noise, BATCH, what), device)
        difficulty_P = self.ranks.gathered(own_P)
        first, second = dealt(difficulty_P, seen / (seen + choice))
        return stratified(first, seen), stratified(second, choice)

    def _search(self, search: Search, first: Search) -> None:
        """Search one budget; all but the first one start from what that one found."""
        settings, guided = self.settings, self.context.guidance.doubles_batch
        search.try_without_skips(guided and settings.cache != "none")
        if settings.cache == "none":
            return
        before = len(search.trials)
        if search is first:
            search.try_shapes(list(grid(self._reference_run))[: settings.evaluations])
            search.try_around(settings.evaluations - (len(search.trials) - before), guided)
        else:
            seeds = [*(shape for shape, _ in first.ranking("cache")[:SEEDS]), *native(self._reference_run)]
            search.try_shapes(seeds[: settings.front_evaluations])
            search.climb(settings.front_evaluations - (len(search.trials) - before))

    def _finalists(self, recipes: list[Recipe]) -> dict[Recipe, Finalist]:
        """All of them fitted, refined, and measured on the images of the comparison."""
        passes, found = self.settings.refinements, dict[Recipe, Finalist]()
        with tqdm(total=len(recipes) * (1 + passes), desc="finalists", unit="pass", disable=not self._shown) as bar:
            for j, recipe in enumerate(recipes, 1):
                found[recipe] = self._finalist(recipe, bar.update)
                bar.update(j * (1 + passes) - bar.n)  # fewer passes were made if one did not help
        return found

    def _finalist(self, recipe: Recipe, on_pass: OnPass) -> Finalist:
        plan = self._wide_bench.refined(recipe, self.settings.refinements, on_pass, self.settings.forecast_weights)
        plan = dataclasses.replace(plan, provenance={**plan.provenance, "fit": self._fit_record})
        group = self.target.part(slice(self.judged, self.compared))
        errors_B, weights_B = self.ranks.gathered(torch.stack([self._errors(plan, group), group.counts_B.double()], 1)).unbind(1)
        return Finalist(recipe, plan, errors_B.cpu(), weights_B.cpu())

    @functools.cached_property
    def _wide_bench(self) -> TrialRunner:
        """Where finalists are fitted and refined: on all images that the search has looked at."""
        bench = self.bench
        return TrialRunner(self.model, bench.subject, bench.price, self._seen, self.judged, self.ranks, bench.record)

    @functools.cached_property
    def _fit_record(self) -> dict[str, Any]:
        """What the coefficients were fitted on: plain JSON values for the plan's provenance."""
        images, conditions = len(self.ranks.gathered(self._seen.counts_B[:, None])), self.model.conditions
        labels = {c.name: self.ranks.gathered(self._seen.given[c.name][:, None].double())[:, 0].long() for c in conditions if c.classes}
        seen = labels_in(conditions, Given(labels))
        return {"target": self.settings.target, "guidance": self.context.guidance.scale, "images": images} | seen

    def _point(self, plan: CachePlan, budgets: list[float], role: Role, chosen: bool) -> FrontPoint:
        mse_B = self.ranks.gathered(self._errors(plan, self.target.part(slice(self.compared, None))))
        if not torch.isfinite(mse_B).all():
            raise PlanError(
                f"the plan found for a speed-up of {budgets[0]:g} makes images NaN that the search did not look at: lower it."
            )
        stderr = float(mse_B.std(correction=1)) / len(mse_B) ** 0.5 if len(mse_B) > 1 else 0.0
        return FrontPoint(plan, self.settings.target, float(mse_B.mean()), stderr, chosen, role, tuple(budgets))

    def _errors(self, plan: CachePlan, target: TargetRun) -> torch.Tensor:
        found = RolloutEvaluator(self.model, target.x_T, target.given, target.x_0).mse_per_image(plan)
        return found.double().to(target.x_0.device)

    def _run_target(self, parts: list[Sample]) -> TargetRun:
        settings, context = self.settings, self.context
        sampler = context.reference if settings.target == "reference" else converged_ode(self.model.schedule, settings.ode_steps)
        noise = images(self.model, [index for part in parts for index in part.indices])
        what = "target run" if self._shown else None
        run = self.ranks.together(lambda: run_target(self.model, sampler, context.guidance, *noise, BATCH, what), noise[0].device)
        weights = torch.tensor([weight for part in parts for weight in part.weights], device=run.x_0.device)
        return dataclasses.replace(run, weights_B=weights)


def _merged(plans: list[tuple[CachePlan, float]]) -> list[tuple[CachePlan, list[float]]]:
    """Every plan once, as its first budget has it, with all budgets that end on it."""
    by_run: dict[str, tuple[CachePlan, list[float]]] = {}
    for plan, speedup in plans:
        by_run.setdefault(_run_of(plan), (plan, []))[1].append(speedup)
    return list(by_run.values())


def _run_of(plan: CachePlan) -> str:
    """Names what a plan runs, whatever it has to beat."""
    return dataclasses.replace(plan, fewer_steps=None).digest
