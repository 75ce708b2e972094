"""The planner as a policy: what `lightning fit` ends with, and what `python -m tc_lightning plan` runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from tc_lightning.errors import PlanError
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.planner.finalists import CACHE_USES, CacheUse
from tc_lightning.planner.fitted_fewer_steps import FIT, JUDGE, REFINEMENTS
from tc_lightning.planner.price import Price, macs_price
from tc_lightning.planner.run import Choice, PlannerRun, PlannerSettings
from tc_lightning.planner.trials import Trial
from tc_lightning.policies.base import PlanningContext, Policy
from tc_lightning.policies.choice import PlanChoice
from tc_lightning.rollout.targets import ODE_STEPS

TARGETS = ("reference", "ode")


class PlannerPolicy(Policy):
    """Searches sampler, spacing, placement of full steps, forecasts, segments and guidance; fits the sampler to each plan.

    Args:
        target_speedup: of the plan that is chosen, at least, against the full-compute run of the context.
        target: what images are to come near to: `reference`, the full-compute run, or `ode`, the converged solution.
        front: further speed-ups at which the best plan is looked for.
        evaluations: plans with P-steps tried for `target_speedup`, after those without, of which there are a few for every budget.
        front_evaluations: the same for each further speed-up.
        cache: `auto` takes the better of plans with and without a cache, `keep` the best that caches, `none` the best that does not and
            looks at no others: fewer steps, with a fitted sampler.
        fit_images: images that samplers are fitted on.
        judge_images: images that plans are compared on while searching; the best are then refined on these and those of the fit.
        choice_images: images on which the refined plans are compared, and nothing was fitted.
        final_images: images that the figures of the plans found are measured on, and nothing else is.
        pool_images: images of which the hardest are among those that are planned on; as few as are needed, or 0, takes images as they
            come.
        refinements: steps of Gauss-Newton, at most, on the samplers of those finalists of each budget that may win.
        ode_steps: steps of the run that counts as converged.
        progress: show progress bars.
        forecast_weights: whether refining gives forecasts weights of their own (`tc_lightning.planner.theta`), beside the sampler.

    Raises:
        PlanError: if an argument is out of range.
    """

    on_all_ranks = True

    def __init__(
        self,
        target_speedup: float = 2.5,
        target: str = "reference",
        front: tuple[float, ...] = (2.0, 3.0, 4.0),
        evaluations: int = 12,
        front_evaluations: int = 2,
        cache: CacheUse = "auto",
        fit_images: int = FIT,
        judge_images: int = JUDGE,
        choice_images: int = 64,
        final_images: int = 32,
        pool_images: int = 128,
        refinements: int = REFINEMENTS,
        ode_steps: int = ODE_STEPS,
        progress: bool = True,
        forecast_weights: bool = False,
    ) -> None:
        if not all(speedup > 1.0 for speedup in (target_speedup, *front)):
            raise PlanError(f"speed-ups must be above 1; found {(target_speedup, *front)}.")
        if target not in TARGETS:
            raise PlanError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}.")
        if cache not in CACHE_USES:
            raise PlanError(f"unknown cache {cache!r}: choose one of {', '.join(CACHE_USES)}.")
        if min(evaluations, front_evaluations, fit_images, judge_images, choice_images, final_images, ode_steps - 1) < 1:
            raise PlanError("evaluations and images must be at least 1, ode_steps at least 2.")
        if min(pool_images, refinements) < 0:
            raise PlanError("pool_images and refinements must be 0 or more.")
        self.settings = PlannerSettings(
            target_speedup=float(target_speedup),
            target=target,
            front=tuple(map(float, front)),
            evaluations=evaluations,
            front_evaluations=front_evaluations,
            cache=cache,
            fit_images=fit_images,
            judge_images=judge_images,
            choice_images=choice_images,
            final_images=final_images,
            pool_images=pool_images,
            refinements=refinements,
            ode_steps=ode_steps,
            progress=progress,
            forecast_weights=forecast_weights,
        )
        self.price: Price = macs_price

    def check(self, signature: ModelSignature, sampler: SamplerTable) -> None:
        """Whether the budgets pay for anything, and the target is one.

        Raises:
            PlanError: if they pay for less than two full steps, or images would have to come near to a run that adds noise.
        """
        if sampler.stochastic and self.settings.target == "reference":
            raise PlanError(f"{sampler.name} adds noise, so no plan can come near to its images: plan with target ode.")
        for speedup in self.settings.speedups:
            if len(sampler) / speedup < 2.0:
                most = len(sampler) / 2
                raise PlanError(f"a speed-up of {speedup:g} leaves fewer than 2 of {len(sampler)} full steps: choose up to {most:g}.")

    def plan(self, context: PlanningContext) -> PlanChoice:
        """Choose a plan; the table has a line for every recipe that was tried.

        Raises:
            PlanError: if the context has no model, or no plan fits the budget.
        """
        self.check(context.signature, context.reference)
        run = PlannerRun(dataclasses.replace(self.settings, price=self.price), context)
        searches = run.searches()
        choices = run.finish(searches)
        known = {recipe: trial for search in searches.values() for recipe, trial in search.trials.items()}
        rows = []
        for speedup, choice in choices.items():  # finalists of a smaller budget are compared in a larger one too
            compared = {one.recipe: known[one.recipe] for one in choice.finalists}
            rows += [_row(speedup, trial, choice) for trial in sorted((searches[speedup].trials | compared).values(), key=_error)]
        return PlanChoice(choices[self.settings.target_speedup].plan, rows, run.points(choices))


def _error(trial: Trial) -> float:
    return trial.error


def _row(speedup: float, trial: Trial, choice: Choice) -> dict[str, Any]:
    recipe = trial.recipe
    finalist = next((one for one in choice.finalists if one.recipe == recipe), None)
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
        "error": trial.error,
        "compared_error": None if finalist is None else finalist.error,
        "chosen": recipe == choice.chosen.recipe,
    }
