"""Trying recipes: build the plan, fit its sampler, measure what is left of the error, remember it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import torch

from tc_lightning.errors import TokenCacheError
from tc_lightning.measure.scores import sampler_digest
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.planner.fit import FittedPlan, fit_sampler, named_fitted
from tc_lightning.planner.price import Price
from tc_lightning.planner.recipe import Recipe, build_plan
from tc_lightning.planner.record import TrialRecord, code_digest
from tc_lightning.planner.refine import OnPass, refine_sampler
from tc_lightning.planner.robust import robust_mean_of_all
from tc_lightning.planner.target import TargetRun
from tc_lightning.planner.theta import Places
from tc_lightning.policies.subject import Subject
from tc_lightning.rollout.ranks import Ranks


@dataclasses.dataclass(frozen=True)
class Trial:
    """A recipe that was tried.

    Args:
        recipe: what was tried.
        cost: cost of its plan in full steps.
        error: robust mean of the squared error of final latents, on images that the fit did not see; infinite if they became NaN.
    """

    recipe: Recipe
    cost: float
    error: float


class TrialRunner:
    """Where recipes are tried.

    Args:
        model: the teacher.
        subject: what is planned for.
        price: what they cost.
        target: the run to reproduce, of this process's images: first those that samplers are fitted on, then those that judge.
        fitted: how many of this process's images are fitted on.
        ranks: the processes that search together.
        record: file of trials; None remembers nothing beyond this object.
    """

    def __init__(
        self, model: Network, subject: Subject, price: Price, target: TargetRun, fitted: int, ranks: Ranks, record: Path | None = None
    ) -> None:
        self.model, self.subject, self.price, self.target, self.fitted, self.ranks = model, subject, price, target, fitted, ranks
        self.record, self._record = record, TrialRecord(record, self._name())

    def cost(self, recipe: Recipe) -> float:
        """Cost of a recipe's plan in full steps; infinite if it describes none."""
        try:
            plan = build_plan(self.subject, recipe)
        except TokenCacheError:  # the run that is replaced may have a sampler of another name than any known here, too
            return math.inf
        return self.price(plan)

    def attempt(self, recipe: Recipe) -> Trial:
        """Fit the recipe's plan and measure it, unless that was done before."""
        name, device = recipe.digest, self.target.x_0.device
        if self.ranks.of_first(float(name in self._record), device):  # another process may not see the file
            self._record.know(name, self.ranks.of_first(self._record.get(name), device))
        else:
            self._record.add(name, self._error(recipe), write=self.ranks.first)
        return Trial(recipe, self.cost(recipe), self._record.get(name))

    def fit(self, recipe: Recipe) -> FittedPlan:
        """The recipe's plan with its sampler fitted."""
        return fit_sampler(self.model, build_plan(self.subject, recipe), self.target, self.fitted, ranks=self.ranks)

    def refined(self, recipe: Recipe, iterations: int, on_pass: OnPass, weights: bool = False) -> CachePlan:
        """The recipe's plan, fitted and then refined on all images of the bench, unless that was done before.

        Args:
            recipe: the recipe.
            iterations: steps of Gauss-Newton at most.
            on_pass: called after each of them.
            weights: whether forecasts are refined too (`tc_lightning.planner.theta`).
        """
        plan, device = build_plan(self.subject, recipe), self.target.x_0.device
        places = Places.of(plan, weights and iterations > 0)
        name = f"{recipe.digest}-{iterations}" + "-weights" * bool(places.forecasts)
        known = self._record.refined(name, places.size)
        if self.ranks.of_first(float(known is not None), device):  # another process may not see the file
            theta_P = self.ranks.values_of_first(known, places.size, device).cpu()
            return places.unpack(dataclasses.replace(plan, sampler=named_fitted(plan.sampler)), theta_P)
        fitted = self.refined(recipe, 0, on_pass) if iterations else self.fit(recipe).plan
        found = refine_sampler(self.model, fitted, self.target, iterations, self.ranks, on_pass, weights=weights)
        if found == fitted and iterations:  # for want of memory, perhaps: another time there may be more
            return found
        self._record.add_refined(name, places.pack(found).tolist(), write=self.ranks.first)
        return found

    def _error(self, recipe: Recipe) -> float:
        try:
            judged_B, counts_B = self.fit(recipe).mse_B[self.fitted :], self.target.counts_B[self.fitted :]
        except TokenCacheError:  # there is nothing to fit, or the latents became NaN
            return math.inf
        return robust_mean_of_all(judged_B, counts_B, self.ranks)

    def _name(self) -> str:
        """Digest of all that an error depends on beside the recipe."""
        s, t = self.subject, self.target
        parts = [
            code_digest(),
            dataclasses.asdict(s.signature),
            s.scores.digest,
            sampler_digest(s.sampler),
            sampler_digest(s.reference),
            dataclasses.asdict(s.guidance),
            t.times.tolist(),
            t.sampler,
        ]
        counts = torch.tensor([self.fitted, len(t.x_T)], dtype=torch.float64, device=t.x_T.device)  # of all processes: one name
        noise_B = t.x_T.double().flatten(1).sum(1)
        sums_B = [value.double().flatten(1).sum(1) if value.ndim > 1 else value for value in t.given.values()]
        given = [values_B for value_B in sums_B for values_B in (value_B, value_B * noise_B)]
        images = torch.stack([values.double().sum() for values in (noise_B, *given, t.counts_B)])
        sums = self.ranks.total(torch.cat([counts, images])).tolist()
        return hashlib.sha256(json.dumps([*parts, self.ranks.world, sums]).encode()).hexdigest()[:16]
