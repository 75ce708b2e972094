"""Delta-DiT: a span of blocks is skipped and its offset reused, rear blocks early, front blocks late (Chen et al., arXiv 2406.01125).

The paper finds that front blocks draw outlines, which early steps need, and rear blocks details, which late steps need: it skips
the others. An offset is a span's summed residual, so a skipped step costs the blocks outside the span.
"""

from __future__ import annotations

from collections.abc import Callable

from tc_lightning.errors import PlanError
from tc_lightning.plan.costs import segment_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute, skip
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.targeted import MAX_INTERVAL, Offer, Steps, TargetedPolicy, largest, reference_macs
from tc_lightning.policies.whole_steps import interval_steps


class DeltaDiTPolicy(TargetedPolicy):
    """Every n-th step is full; in between, a span at the rear (early steps) or the front (late steps) repeats its offset.

    With interval 2 and 21 of 28 blocks skipped it costs 1.6 times fewer MACs, as published for 20 steps. With a target, every
    interval that can reach it is tried, with the fewest skipped blocks that do.

    Args:
        target_speedup: in MACs, at least; None takes interval and skipped blocks as they are given.
        interval: distance of full steps (the paper's N).
        skipped_share: share of the blocks that the span holds (21 of 28 in the paper).
        early_share: share of the steps that count as early (the last 12 of 20 are late in the paper: b = 12).
        max_interval: largest interval that is tried.
        images: held-out images on which intervals are compared.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "delta_dit"
    cuts = True

    def __init__(
        self,
        target_speedup: float | None = None,
        interval: int = 2,
        skipped_share: float = 0.75,
        early_share: float = 0.4,
        max_interval: int = MAX_INTERVAL,
        images: int = 4,
    ) -> None:
        super().__init__(target_speedup, images)
        if min(interval, max_interval) < 2 or not 0.0 < skipped_share <= 1.0 or not 0.0 <= early_share <= 1.0:
            raise PlanError("intervals must be at least 2, skipped_share above 0, and shares at most 1.")
        self.interval, self.max_interval = interval, max_interval
        self.skipped_share, self.early_share = skipped_share, early_share

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """All blocks skipped, at the largest interval."""
        return self._macs(signature, sampler, self.max_interval, signature.depth)

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        skipped = max(1, round(self.skipped_share * context.signature.depth))
        return [self._offer(context, self.interval, skipped)]

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        signature, sampler, offers = context.signature, context.sampler, []
        for interval in range(2, self.max_interval + 1):
            computed = largest(self._macs_by_computed(signature, sampler, interval), 0, signature.depth - 1, budget)
            if computed is not None:
                offers.append(self._offer(context, interval, signature.depth - computed))
        return offers

    def _macs_by_computed(self, signature: ModelSignature, sampler: SamplerTable, interval: int) -> Callable[[int], float]:
        return lambda computed: self._macs(signature, sampler, interval, signature.depth - computed)

    def _macs(self, signature: ModelSignature, sampler: SamplerTable, interval: int, skipped: int) -> float:
        spared = segment_macs(signature, compute(0, skipped))
        return reference_macs(signature, sampler) - (len(sampler) - len(interval_steps(len(sampler), interval))) * spared

    def _offer(self, context: PlanningContext, interval: int, skipped: int) -> Offer:
        L, T = context.signature.depth, len(context.sampler)
        full, early = set(interval_steps(T, interval)), round(self.early_share * T)
        front, rear = _nonempty(compute(0, L - skipped), skip(L - skipped, L)), _nonempty(skip(0, skipped), compute(skipped, L))
        steps: Steps = tuple((compute(0, L),) if i in full else front if i < early else rear for i in range(T))
        return Offer(steps, {"interval": interval, "skipped_share": skipped / L, "early_share": self.early_share})


def _nonempty(*segments: Segment) -> tuple[Segment, ...]:
    return tuple(s for s in segments if s.start < s.stop)
