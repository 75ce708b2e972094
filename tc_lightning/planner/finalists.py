"""Who wins a budget: the best few recipes, of which those that may win are refined, compared on images that nothing was fitted on.

Refining is what costs most. It is for full compute with fewer steps, which everything has to beat; for what forecasts guidance's
difference, which gains most by it; and for steps that skip or prune where they have the least error of all with a cache before any is
refined. That error is measured on the images of the comparison, to which nothing is fitted; what wins is measured again on images of
its own.

Errors of two plans on the same images go up and down together, so their difference is what is looked at: two plans are equal if its
mean is within its standard error. Of equals a plan without a cache comes before one with a cache, then fewer programs, then less
memory. A budget may so end on the plan of a smaller one: it is no worse, and cheaper.

Shape suffixes: B images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from tc_lightning.errors import PlanError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import cache_bytes_per_image
from tc_lightning.planner.recipe import Kind, Recipe
from tc_lightning.planner.robust import robust_mean
from tc_lightning.planner.search import Search

CacheUse = Literal["auto", "keep", "none"]
CACHE_USES: tuple[CacheUse, ...] = get_args(CacheUse)
KINDS: dict[CacheUse, tuple[Kind, ...]] = dict.fromkeys(CACHE_USES, ("full", "halves", "cache")) | {"none": ("full",)}


@dataclasses.dataclass(frozen=True, eq=False)
class Finalist:
    """A recipe's plan, fitted, and refined if it may win.

    Args:
        recipe: the recipe.
        plan: its plan.
        errors_B: squared error of each image that finalists are compared on, of all processes, [B]; infinite if they became NaN.
        weights_B: how much each of these images counts, [B].
        refined: whether the plan was refined.
    """

    recipe: Recipe
    plan: CachePlan
    errors_B: Tensor
    weights_B: Tensor
    refined: bool = False

    @property
    def error(self) -> float:
        """Robust mean of the squared error: by the plain one, the few images near a fork of their path would choose alone."""
        return float(robust_mean(self.errors_B, self.weights_B))

    @property
    def simplicity(self) -> tuple[bool, int, int]:
        """The less, the simpler: whether it caches, how many programs it runs, bytes of its cache."""
        plan = self.plan
        kinds = {
            (plan.guidance_mode(i), tuple((s.start, s.stop, s.mode, s.order, s.branches, s.keep) for s in segments))
            for i, segments in enumerate(plan.steps)
        }
        return plan.caches, len(kinds), cache_bytes_per_image(plan)

    def worse_than(self, other: Finalist) -> bool:
        """Whether its error is above the other's by more than the standard error of their difference."""
        if not torch.isfinite(self.errors_B).all():
            return bool(torch.isfinite(other.errors_B).all())
        share_B = self.weights_B / self.weights_B.sum()
        apart_B = self.errors_B - other.errors_B
        mean = (share_B * apart_B).sum()
        left_over = 1 - share_B.square().sum()  # (n - 1) / n for equal weights: the mean is taken from the same images
        if left_over <= 0.0:
            return bool(mean > 0.0)
        variance = (share_B * (apart_B - mean)).square().sum() / left_over
        return bool(mean > (1 + 1e-9) * variance.sqrt())  # with one image apart from the others they are the same number


def finalist_recipes(search: Search, use: CacheUse) -> list[Recipe]:
    """The recipe of least error of each kind, of those that are to be compared; full compute is always one of them."""
    best = (search.best_of(kind) for kind in KINDS[use])
    return [trial.recipe for trial in best if trial is not None]


def worth_refining(finalists: Sequence[Finalist]) -> list[Finalist]:
    """Of the finalists of a budget, of which none is refined: all without a cache, those that forecast guidance's difference alone
    unless they became NaN, and the one with a cache that has the least error."""
    caching = [one for one in finalists if one.plan.caches]
    best = sorted(caching, key=lambda one: one.error)[:1]
    halves = [one for one in caching if one.recipe.kind == "halves" and math.isfinite(one.error) and one not in best]
    return [one for one in finalists if not one.plan.caches] + halves + best


def choose(finalists: Sequence[Finalist], use: CacheUse) -> Finalist:
    """The simplest of those that are no worse than the best, and of those as simple the one of least error.

    Args:
        finalists: of one budget.
        use: `auto` takes any, `keep` only plans that cache, `none` only plans that do not.

    Raises:
        PlanError: if none of the kind that is asked for is there.
    """
    allowed = [one for one in finalists if use == "auto" or one.plan.caches == (use == "keep")]
    if not allowed:
        raise PlanError(
            f"no plan {'with' if use == 'keep' else 'without'} a cache was found: raise evaluations, or plan with cache auto."
        )
    best = min(allowed, key=lambda one: one.error)
    return min((one for one in allowed if not one.worse_than(best)), key=lambda one: (one.simplicity, one.error))


def best_without_cache(finalists: Sequence[Finalist]) -> Finalist | None:
    """Full compute with fewer steps of least error; None if a budget pays for none."""
    return min((one for one in finalists if not one.plan.caches), key=lambda one: one.error, default=None)
