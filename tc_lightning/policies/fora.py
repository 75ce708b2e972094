"""FORA: every n-th step is full, the others repeat all branch outputs (Selvaraju et al., arXiv 2407.01425)."""

from __future__ import annotations

from tc_lightning.errors import PlanError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.targeted import Offer, TargetedPolicy, reference_macs
from tc_lightning.policies.whole_steps import affordable_full_steps, affordable_interval, interval_steps, reused_step, whole_steps


class FORAPolicy(TargetedPolicy):
    """Full steps 0, n, 2n, ...; attention and MLP outputs are reused in between, with the current gates.

    Args:
        target_speedup: in MACs, at least: as many steps are full as it allows, at distances that differ by at most one; None takes
            the interval as it is given.
        interval: distance of full steps (the paper's N; 3 is its default, others are reported up to 7).

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "fora"

    def __init__(self, target_speedup: float | None = None, interval: float = 3.0) -> None:
        super().__init__(target_speedup, images=1)
        if interval < 1.0:
            raise PlanError(f"interval is {interval:g}: full steps are at least 1 step apart.")
        self.interval = interval

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """One full step."""
        return full_step_macs(signature) + (len(sampler) - 1) * step_macs(signature, reused_step(signature, 0))

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return [_offer(context.signature, context.sampler, self.interval)]

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        return [_affordable(context.signature, context.sampler, budget)]


def fora_plan(signature: ModelSignature, sampler: SamplerTable, guidance: Guidance, target_speedup: float) -> CachePlan:
    """FORA's plan at a target, without anything to measure it on.

    Args:
        signature: the model.
        sampler: the sampler.
        guidance: guidance scale and channels.
        target_speedup: in MACs, at least.

    Raises:
        PlanError: if the target is not above 1, or a single full step is too expensive for it.
    """
    FORAPolicy(target_speedup).check(signature, sampler)
    offer = _affordable(signature, sampler, reference_macs(signature, sampler) / target_speedup)
    return CachePlan(signature, sampler, guidance, offer.steps, sampler, {"policy": FORAPolicy.name, "arguments": offer.arguments})


def _affordable(signature: ModelSignature, sampler: SamplerTable, budget: float) -> Offer:
    count = affordable_full_steps(signature, sampler, budget, reused_step(signature, 0))
    return _offer(signature, sampler, affordable_interval(len(sampler), count))


def _offer(signature: ModelSignature, sampler: SamplerTable, interval: float) -> Offer:
    steps = whole_steps(signature, sampler, interval_steps(len(sampler), interval), 0)
    return Offer(steps, {"interval": interval})
