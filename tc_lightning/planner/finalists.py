"""Who wins a budget: the best few recipes, fitted and refined, compared on images that nothing was fitted on.

Refining is what costs most. It is for full compute with fewer steps, which everything has to beat; for what forecasts guidance's
difference, which gains most by it; and for steps that skip or prune where the search found no less error with a cache.

Errors of two plans on the same images go up and down together, and are many times as large on some images as on others, so it is the
logarithm of their ratio that is looked at: of two plans one is worse if its error is larger, and the mean of that logarithm is above
twice its standard error. By plain differences the few hardest images would decide alone, and 32 images could hardly tell a plan from
one of twice its error; by one standard error the luckiest of several plans would too often be taken for a better one. Of equals a plan
without a cache comes before one with a cache, then fewer programs, then less memory. A budget may so end on the plan of a smaller one:
it is no worse, and cheaper.

Shape suffixes: B images.
"""

from __future__ import annotations

import dataclasses
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
LEAST = 1e-12  # of the largest error: what counts as none
SURE = 2.0  # standard errors between plans that are not equals
KINDS: dict[CacheUse, tuple[Kind, ...]] = dict.fromkeys(CACHE_USES, ("full", "halves", "cache")) | {"none": ("full",)}


@dataclasses.dataclass(frozen=True, eq=False)
class Finalist:
    """A recipe's plan, fitted and refined.

    Args:
        recipe: the recipe.
        plan: its plan.
        errors_B: squared error of each image that finalists are compared on, of all processes, [B]; infinite if they became NaN.
        weights_B: how much each of these images counts, [B].
    """

    recipe: Recipe
    plan: CachePlan
    errors_B: Tensor
    weights_B: Tensor

    @property
    def error(self) -> float:
        """Robust mean of the squared error: by the plain one, the few images near a fork of their path would choose alone."""
        return float(robust_mean(self.errors_B, self.weights_B))

    @property
    def simplicity(self) -> tuple[bool, int, int]:
        """The less, the simpler: whether it caches, how many programs it runs, bytes of its cache."""
        plan = self.plan
        kinds = {(plan.guidance_mode(i).outline, tuple(s.outline for s in segments)) for i, segments in enumerate(plan.steps)}
        return plan.caches, len(kinds), cache_bytes_per_image(plan)

    def worse_than(self, other: Finalist) -> bool:
        """Whether its error is above the other's, and the mean over images of log(own / other's) above `SURE` standard errors."""
        if not torch.isfinite(self.errors_B).all():
            return bool(torch.isfinite(other.errors_B).all())
        share_B = self.weights_B / self.weights_B.sum()
        least = LEAST * torch.stack([self.errors_B, other.errors_B]).max().clamp_min(LEAST)  # of an image without any error
        ratio_B = self.errors_B.clamp_min(least).log() - other.errors_B.clamp_min(least).log()
        mean = (share_B * ratio_B).sum()
        left_over = 1 - share_B.square().sum()  # (n - 1) / n for equal weights: the mean is taken from the same images
        variance = (share_B * (ratio_B - mean)).square().sum() / left_over.clamp_min(LEAST)
        least_mean = SURE * (1 + 1e-9) * variance.sqrt()  # rounding decides nothing
        return self.error > other.error and bool(mean > least_mean)


def finalist_recipes(search: Search, use: CacheUse) -> list[Recipe]:
    """Recipes of one budget that are to be refined and compared: of each kind the one of least error, full compute always; skipping or
    pruning steps only where no halves of guidance did better."""
    best = {trial.recipe.kind: trial for kind in KINDS[use] if (trial := search.best_of(kind)) is not None}
    if "halves" in best and "cache" in best and best["halves"].error < best["cache"].error:
        del best["cache"]
    return [trial.recipe for trial in best.values()]


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
