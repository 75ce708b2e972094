"""What methods with a published recipe share: a budget in MACs, a few plans that keep to it, and a choice by measurement."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from tc_lightning.errors import PlanError
from tc_lightning.measure.scores import sampler_digest
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs, macs_speedup, plan_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext, Policy
from tc_lightning.policies.choice import PlanChoice

Steps = tuple[tuple[Segment, ...], ...]
MAX_INTERVAL = 10  # steps from one full step to the next that a policy considers, unless told otherwise


@dataclasses.dataclass(frozen=True)
class Offer:
    """A plan that a policy could return, and the arguments that would make it again.

    `sampler` is the context's unless it is given; `eps_scale` and `selector` as in `CachePlan`.
    """

    steps: Steps
    arguments: dict[str, Any]
    sampler: SamplerTable | None = None
    eps_scale: tuple[float, ...] = ()
    selector: str = ""


class TargetedPolicy(Policy):
    """A method whose natural parameter (interval, share, threshold) is set by hand, or by a target.

    With a target, the parameter is the one whose plan uses most of the budget without exceeding it; what the method's authors tune
    besides is decided by measurement on a few held-out trajectories. Subclasses name themselves, say what their cheapest plan
    costs, and offer plans.

    Args:
        target_speedup: in MACs, at least; None takes the parameters as they are given.
        images: held-out images on which offers are compared, if there are several.

    Raises:
        PlanError: if the target is not above 1, or no image is to be looked at.
    """

    name: str
    calibrated = False  # whether it reads the context's calibration
    cuts = False  # whether its segments begin and end at any block, whatever long skips there are

    def __init__(self, target_speedup: float | None, images: int) -> None:
        if target_speedup is not None and target_speedup <= 1.0:
            raise PlanError(f"target_speedup {target_speedup:g} asks for nothing: choose a value above 1, for example 2.5.")
        if images < 1:
            raise PlanError(f"images is {images}: plans are compared on at least 1.")
        self.target_speedup, self.images = target_speedup, images

    @abstractmethod
    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """MACs of the cheapest plan that the method can make."""

    @abstractmethod
    def published(self, context: PlanningContext) -> list[Offer]:
        """Plans of the parameters as given; several where one is left to measurement."""

    @abstractmethod
    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """Plans of at most this many MACs, which use as much of them as the natural parameter allows."""

    def check(self, signature: ModelSignature, sampler: SamplerTable) -> None:
        """See `Policy.check`."""
        self._check(signature, sampler, sampler)

    def most(self, context: PlanningContext) -> float:
        """See `Policy.most`."""
        return reference_macs(context.signature, context.reference) / self.least_macs(context.signature, context.sampler)

    def unavailable(self, context: PlanningContext) -> str | None:
        """See `Policy.unavailable`."""
        try:
            self._require(context)
        except PlanError as error:
            return str(error)
        return None

    def plan(self, context: PlanningContext) -> PlanChoice:
        """The best offer; the table lists all of them, by error."""
        self._require(context)
        budget = reference_macs(context.signature, context.reference) / (self.target_speedup or 1.0)
        offers = self.published(context) if self.target_speedup is None else self.within(context, budget)
        plans = [(offer, self._build(context, offer)) for offer in distinct(offers)]
        if self.target_speedup is not None:
            plans = [(offer, plan) for offer, plan in plans if plan_macs(plan) <= budget * (1 + 1e-9)]
        if not plans:
            raise PlanError(f"{self.name} has no plan of {self.target_speedup} times fewer MACs: lower target_speedup.")
        return self._best(context, plans)

    def _require(self, context: PlanningContext) -> None:
        self._check(context.signature, context.sampler, context.reference)
        if self.calibrated and context.calibrate is None:
            raise PlanError(f"{self.name} needs calibration data, and none can be measured here: plan with `lightning fit`.")
        if self.needs and context.scores.sampler != sampler_digest(context.sampler):
            raise PlanError(f"{self.name} needs scores of the sampler that is planned, and those at hand are another's: distil for it.")
        if "importance_TLN" in self.needs and context.scores.importance_TLN.min() == 1.0:
            raise PlanError(f"{self.name} chooses tokens by importance, and no predictor of it was trained: distil one.")

    def _check(self, signature: ModelSignature, sampler: SamplerTable, reference: SamplerTable) -> None:
        if self.cuts and (skip := next(iter(signature.skips.between_blocks), None)):
            raise PlanError(
                f"{self.name} caches some blocks and computes others beside them, which cuts the long skip from block {skip.source} "
                f"to block {skip.target} in two: choose a policy that caches whole steps or branches, or whose spans hold both ends."
            )
        most = reference_macs(signature, reference) / self.least_macs(signature, sampler)
        if self.target_speedup is not None and self.target_speedup > most * (1 + 1e-9):
            raise PlanError(
                f"target_speedup {self.target_speedup:g} is not reachable with {self.name} and {len(sampler)} steps: "
                f"choose above 1, up to {most:.2f}."
            )

    def _build(self, context: PlanningContext, offer: Offer) -> CachePlan:
        sampler, provenance = offer.sampler or context.sampler, {"policy": self.name, "arguments": offer.arguments}
        where = (context.signature, sampler, context.guidance)
        return CachePlan(*where, offer.steps, context.reference, provenance, offer.eps_scale, selector=offer.selector)

    def _best(self, context: PlanningContext, plans: list[tuple[Offer, CachePlan]]) -> PlanChoice:
        measured = [context.evaluate(plan, self.images) if len(plans) > 1 else None for _, plan in plans]
        order = sorted(range(len(plans)), key=lambda j: measured[j] or 0.0)
        if measured[order[0]] == float("inf"):
            raise PlanError(f"every plan of {self.name} makes the latents NaN or infinite: lower target_speedup.")
        rows = [_row(self.name, *plans[j], measured[j], j == order[0]) for j in order]
        return PlanChoice(plans[order[0]][1], rows)


def reference_macs(signature: ModelSignature, sampler: SamplerTable) -> float:
    """MACs of the full-compute run that a plan replaces."""
    return len(sampler) * full_step_macs(signature)


def distinct(offers: Iterable[Offer]) -> list[Offer]:
    """The offers without those that repeat the steps of an earlier one."""
    first: dict[Any, Offer] = {}
    for offer in offers:
        first.setdefault((offer.steps, offer.sampler, offer.eps_scale), offer)
    return list(first.values())


def largest(value: Callable[[int], float], low: int, high: int, most: float) -> int | None:
    """Largest integer in [low, high] whose non-decreasing `value` is at most `most`; None if there is none."""
    if low > high or value(low) > most:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if value(middle) <= most else (low, middle - 1)
    return low


def _row(name: str, offer: Offer, plan: CachePlan, mse: float | None, chosen: bool) -> dict[str, Any]:
    return {
        "policy": name,
        **offer.arguments,
        "full_steps": len(plan.full_steps),
        "macs_speedup": macs_speedup(plan),
        "mse_screen": mse,
        "chosen": chosen,
    }


def require_attention(signature: ModelSignature, policy: str) -> None:
    """Refuse a model of which no branch attends, or none does not.

    Raises:
        PlanError: naming its branches.
    """
    block = signature.block
    if not block.attending or not block.tokenwise:
        raise PlanError(
            f"{policy} treats branches that attend to all tokens and those that do not differently, and the model's are "
            f"{', '.join(block.names)}, all of one kind: choose another policy."
        )
