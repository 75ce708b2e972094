"""Plans that forecast the summed residual of all blocks with weights of their own between full steps, and methods that make them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tc_lightning.errors import PlanError
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.forecasts import MAX_HISTORY
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.residual_steps import affordable, repeated_step
from tc_lightning.policies.targeted import Offer, Steps, TargetedPolicy
from tc_lightning.policies.whole_steps import affordable_interval, interval_steps

Weigh = Callable[[Sequence[int], int], Sequence[float]]  # from the last full steps, latest first, and the step that is forecast


def weighed_steps(signature: ModelSignature, sampler: SamplerTable, full_steps: Collection[int], weigh: Weigh) -> Steps:
    """All steps: full where listed, weighted sums of the residuals of the last full ones elsewhere.

    Args:
        signature: the model.
        sampler: the sampler.
        full_steps: steps that compute everything, 0 among them.
        weigh: weights, latest first, of as many of the last full steps as it likes; it is shown the last four, as plans keep no more.
    """
    L, full = signature.depth, sorted({*full_steps}, reverse=True)

    def forecast(step: int) -> Segment:
        sources = [s for s in full if s < step][:MAX_HISTORY]
        return Segment(0, L, "skip", weights=tuple(weigh(sources, step)))

    return tuple((compute(0, L),) if i in full else (forecast(i),) for i in range(len(sampler)))


class WeighedForecastPolicy(TargetedPolicy):
    """Full steps 0 to warmup - 1, then every n-th; in between, a forecast of the residual that subclasses weigh.

    Args:
        target_speedup: in MACs, at least: as many steps are full as it allows, at distances that differ by at most one; None takes the
            interval as it is given.
        interval: distance of full steps.
        warmup: full steps at the start.
        images: held-out images on which forecasts are compared, where there are several.

    Raises:
        PlanError: if an argument is out of range.
    """

    def __init__(self, target_speedup: float | None, interval: float, warmup: int, images: int) -> None:
        super().__init__(target_speedup, images)
        if interval < 1.0 or warmup < 1:
            raise PlanError(f"interval {interval:g} and warmup {warmup} must be at least 1.")
        self.interval, self.warmup = interval, warmup

    @abstractmethod
    def forecasts(self, context: PlanningContext) -> Sequence[tuple[Mapping[str, Any], Weigh]]:
        """The forecasts to choose from, each with the arguments that make it."""

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """The warm-up alone."""
        T = len(sampler)
        warmup = min(self.warmup, T)
        return warmup * full_step_macs(signature) + (T - warmup) * step_macs(signature, repeated_step(signature))

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return self._offers(context, self.interval)

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        count = affordable(context.signature, context.sampler, budget)
        return self._offers(context, affordable_interval(len(context.sampler), count, min(self.warmup, len(context.sampler))))

    def _offers(self, context: PlanningContext, interval: float) -> list[Offer]:
        full = interval_steps(len(context.sampler), interval, self.warmup)
        return [
            Offer(
                weighed_steps(context.signature, context.sampler, full, weigh),
                {"interval": interval, "warmup": self.warmup, **arguments},
            )
            for arguments, weigh in self.forecasts(context)
        ]
