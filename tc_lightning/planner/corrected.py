"""Corrected steps between full ones, with a fitted sampler, beside the row that they have to beat: full steps alone, fitted alike.

Where steps alternate, a corrected one costs a block and stands for a full one. A few recipes of each kind are fitted
(`tc_lightning.planner.fit`) and compared on images that nothing was fitted on; the best of both kinds are refined on all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.models.conditions import labels_in
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs, plan_macs, step_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import compute, skip
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.planner.fit import fit_sampler
from tc_lightning.planner.image_choice import images
from tc_lightning.planner.policy import TARGETS
from tc_lightning.planner.refine import refine_sampler
from tc_lightning.planner.robust import robust_mean
from tc_lightning.planner.shapes import FEWER_SPACINGS, PRUNED_SPACINGS, WARMUP
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.policies.base import PlanningContext, Policy
from tc_lightning.policies.choice import PlanChoice
from tc_lightning.rollout.evaluation import BATCH
from tc_lightning.rollout.targets import ODE_STEPS, converged_ode

SOLVER = "dpmpp_2m"


class CorrectedTrial(NamedTuple):
    """A recipe as it was fitted, and the robust mean of its error on the images that judge."""

    plan: CachePlan
    order: int | None
    error: float


class CorrectedPolicy(Policy):
    """The best plan of alternate full and corrected steps; it names the fitted run of full steps alone that it has to beat.

    Args:
        target_speedup: in MACs against the full-compute run, at least.
        target: what images are to come near to: `reference`, the full-compute run, or `ode`, the converged solution.
        orders: forecast orders that are tried, 1, 2 or both.
        spacings: spacings that are tried of corrected plans.
        fit_images: images that samplers are fitted on.
        judge_images: images that fitted plans are compared on.
        refinements: steps of Gauss-Newton, at most, on the best plan of each kind.
        ode_steps: steps of the run that counts as converged.
        progress: show a progress bar.

    Raises:
        PlanError: if an argument is out of range.
    """

    needs = ("corrector",)

    def __init__(
        self,
        target_speedup: float = 3.0,
        target: str = "reference",
        orders: tuple[int, ...] = (1, 2),
        spacings: tuple[str, ...] = PRUNED_SPACINGS,
        fit_images: int = 16,
        judge_images: int = 16,
        refinements: int = 1,
        ode_steps: int = ODE_STEPS,
        progress: bool = True,
    ) -> None:
        if not target_speedup > 1.0:
            raise PlanError(f"target_speedup is {target_speedup:g}; it must be above 1.")
        if target not in TARGETS:
            raise PlanError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}.")
        if not spacings or not orders or not {*orders} <= {1, 2}:
            raise PlanError(
                f"orders are {list(orders)} and spacings {list(spacings)}: give orders of 1 and 2, and one spacing at least."
            )
        if min(fit_images, judge_images, ode_steps - 1) < 1 or refinements < 0:
            raise PlanError("images must be at least 1, ode_steps at least 2, and refinements 0 or more.")
        self.target_speedup, self.target, self.orders, self.spacings = float(target_speedup), target, tuple(orders), tuple(spacings)
        self.fit_images, self.judge_images, self.refinements = fit_images, judge_images, refinements
        self.ode_steps, self.progress = ode_steps, progress

    def check(self, signature: ModelSignature, sampler: SamplerTable) -> None:
        """Whether the budget pays for one corrected step.

        Raises:
            PlanError: if it does not, or images would have to come near to a run that adds noise.
        """
        if sampler.stochastic and self.target == "reference":
            raise PlanError(f"{sampler.name} adds noise, so no plan can come near to its images: plan with target ode.")
        if not corrected_steps(signature, len(sampler) / self.target_speedup)[1]:
            raise PlanError(
                f"a speed-up of {self.target_speedup:g} leaves {len(sampler) / self.target_speedup:.3g} full steps of {len(sampler)}, "
                f"and {WARMUP} must come before the first corrected one: lower it, or take more steps."
            )

    def plan(self, context: PlanningContext) -> PlanChoice:
        """Choose a plan; the table has a line for every recipe that was tried, best first.

        Raises:
            PlanError: if the context has no model or no corrector, or no plan fits the budget.
        """
        if context.model is None or context.companions.corrector is None:
            raise PlanError("corrected steps need the model and a trained corrector: set `model.init_args.corrector` and fit.")
        self.check(context.signature, context.reference)
        target = self._target(context)
        tried = sorted(self._tried(context, target), key=lambda one: one.error)
        kinds = [[one for one in tried if (one.order is None) is alone] for alone in (False, True)]
        if not all(kinds):
            raise PlanError("the latents of every recipe of a kind became NaN: lower target_speedup.")
        corrected, alone = (self._refined(ones[0].plan, context, target) for ones in kinds)
        said = {"policy": "corrected", "arguments": {"target_speedup": self.target_speedup, "order": kinds[0][0].order}}
        provenance = {**said, "scores": context.scores.digest, "fit": self._fit_record(context, target)}
        plan = dataclasses.replace(corrected, provenance=provenance, fewer_steps=alone.sampler)
        return PlanChoice(plan, [_row(one) for one in tried])

    def _target(self, context: PlanningContext) -> TargetRun:
        assert context.model is not None
        sampler = context.reference if self.target == "reference" else converged_ode(context.schedule, self.ode_steps)
        noise = images(context.model, list(range(self.fit_images + self.judge_images)))
        return run_target(context.model, sampler, context.guidance, *noise, BATCH, "target run" if self.progress else None)

    def _tried(self, context: PlanningContext, target: TargetRun) -> Iterator[CorrectedTrial]:
        assert context.model is not None
        budget, recipes = len(context.reference) / self.target_speedup, list[tuple[str, int, int, int | None]]()
        recipes += [(spacing, math.floor(budget + 1e-9), 0, None) for spacing in FEWER_SPACINGS]
        counts = corrected_steps(context.signature, budget)
        recipes += [(spacing, *counts, order) for spacing in self.spacings for order in self.orders]
        for spacing, full, corrected, order in tqdm(recipes, "corrected steps", disable=not self.progress, unit="plan"):
            with contextlib.suppress(TokenCacheError):  # a spacing may be unknown to a schedule, or lead to NaN
                plan = alternating(context, spacing, full, corrected, order or 1)
                found = fit_sampler(context.model, plan, target, self.fit_images, companions=context.companions)
                error = float(robust_mean(found.mse_B[self.fit_images :], target.counts_B[self.fit_images :]))
                if math.isfinite(error):
                    yield CorrectedTrial(found.plan, order, error)

    def _refined(self, plan: CachePlan, context: PlanningContext, target: TargetRun) -> CachePlan:
        """Fitted and refined on all images."""
        assert context.model is not None
        found = fit_sampler(context.model, plan, target, self.fit_images + self.judge_images, companions=context.companions).plan
        return refine_sampler(context.model, found, target, self.refinements, companions=context.companions)

    def _fit_record(self, context: PlanningContext, target: TargetRun) -> dict[str, Any]:
        seen = labels_in(context.signature.conditions, target.given)
        return {"target": self.target, "guidance": context.guidance.scale, "images": self.fit_images + self.judge_images} | seen


def corrected_steps(signature: ModelSignature, budget: float) -> tuple[int, int]:
    """Full and corrected steps that a budget in full steps pays for, where they alternate after the first full ones."""
    one = step_macs(signature, (skip(0, signature.depth, 1, corrected=True),)) / full_step_macs(signature)
    corrected = max(0, math.floor((budget - WARMUP) / (1 + one) + 1e-9))
    return math.floor(budget - corrected * one + 1e-9), corrected


def alternating(context: PlanningContext, spacing: str, full: int, corrected: int, order: int) -> CachePlan:
    """A plan with so many steps of each kind: full ones first, then a corrected and a full one in turn.

    Raises:
        PlanError: if there are fewer than two steps.
        TokenCacheError: if the schedule has no such spacing.
    """
    s, named = context.signature, context.companions.corrector
    if full + corrected < 2:
        raise PlanError(f"{full + corrected} steps are no plan: at least 2 are needed.")
    sampler = make_sampler(context.schedule, SOLVER, full + corrected, spacing)
    everything, fixed = (compute(0, s.depth),), (skip(0, s.depth, order, corrected=True),)
    steps = (*(everything,) * (full - corrected), *(fixed, everything) * corrected)
    digest = named.digest if named is not None and corrected else ""
    return CachePlan(s, sampler, context.guidance, steps, context.reference, {"policy": "corrected"}, corrector=digest)


def _row(one: CorrectedTrial) -> dict[str, Any]:
    full = len(one.plan.full_steps)
    return {
        "kind": "full steps alone" if one.order is None else "corrected",
        "spacing": one.plan.sampler.spacing,
        "order": one.order,
        "full_steps": full,
        "corrected_steps": one.plan.num_steps - full,
        "cost": plan_macs(one.plan) / full_step_macs(one.plan.model),
        "error": one.error,
    }
