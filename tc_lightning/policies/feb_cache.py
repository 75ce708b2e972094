"""EB-Cache and FEB-Cache: attention and MLP are reused at different times (Zou et al., arXiv 2503.07120, versions 1 and 3).

While it is noisy the MLP is what can be reused, at the end attention: noisy steps recompute attention at a short interval and the
MLP at a long one, late steps the other way round. Caching also amplifies exposure bias, and eps is multiplied by a factor slightly
below 1, 0.98 at the noisiest step and 0.96 at the last (b(t) of the paper; its published code, for another sampler, divides by a
constant instead). That shifts every image: whether it brings the images nearer to full compute is measured, with and without it.
"""

from __future__ import annotations

from collections.abc import Iterator

from tc_lightning.errors import PlanError
from tc_lightning.plan.costs import step_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute, reuse
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.targeted import MAX_INTERVAL, Offer, Steps, TargetedPolicy, require_attention

EPS_SCALE = (0.98, 0.96)


class FEBCachePolicy(TargetedPolicy):
    """Separate tables for attention and MLP, each with two phases.

    The authors' tables are data of theirs; these follow their rule with two intervals. With a target, the long interval is the
    shortest that reaches it, for every short one.

    Args:
        target_speedup: in MACs, at least; None takes the intervals as they are given.
        short: interval of the branch that matters in a phase.
        long: interval of the other; a multiple of `short`, so that some steps are full.
        boundary_share: share of the steps that count as noisy.
        max_interval: largest long interval that is tried.
        eps_scale: factors of eps at the first and the last step, linear in between; a plan without them is tried, too.
        images: held-out images on which intervals and factors are compared.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "feb_cache"

    def __init__(
        self,
        target_speedup: float | None = None,
        short: int = 2,
        long: int = 4,
        boundary_share: float = 0.5,
        max_interval: int = 2 * MAX_INTERVAL,
        eps_scale: tuple[float, float] = EPS_SCALE,
        images: int = 4,
    ) -> None:
        super().__init__(target_speedup, images)
        if not min(eps_scale) > 0.0:
            raise PlanError(f"eps_scale {eps_scale} must hold factors above 0.")
        if short < 1 or long <= short or long % short or max_interval < 2:
            raise PlanError(f"short {short} must be at least 1, long {long} a larger multiple of it, and max_interval at least 2.")
        if not 0.0 <= boundary_share <= 1.0:
            raise PlanError(f"boundary_share is {boundary_share:g}; it must lie between 0 and 1.")
        self.short, self.long, self.boundary_share = short, long, boundary_share
        self.max_interval, self.eps_scale = max_interval, eps_scale

    def shorts(self) -> range:
        """The short intervals that are tried."""
        return range(1, self.max_interval // 2 + 1)

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """The sparsest tables."""
        return min(_macs(signature, self._steps(signature, sampler, *pair)) for pair in self._pairs())

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return self._offers(context, self.short, self.long)

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        offers: dict[int, list[Offer]] = {}
        for short, long in self._pairs():
            if short not in offers and _macs(context.signature, self._steps(context.signature, context.sampler, short, long)) <= budget:
                offers[short] = self._offers(context, short, long)
        return [offer for pair in offers.values() for offer in pair]

    def _pairs(self) -> Iterator[tuple[int, int]]:
        for short in self.shorts():
            for long in range(2 * short, self.max_interval + 1, short):
                yield short, long

    def _offers(self, context: PlanningContext, short: int, long: int) -> list[Offer]:
        """Without a factor, and with it."""
        steps, T = self._steps(context.signature, context.sampler, short, long), len(context.sampler)
        arguments = {"short": short, "long": long, "boundary_share": self.boundary_share}
        first, last = self.eps_scale
        factors = tuple(first + (last - first) * i / max(T - 1, 1) for i in range(T))
        with_factor = Offer(steps, arguments | {"eps_scale": list(self.eps_scale)}, eps_scale=factors)
        return [Offer(steps, arguments | {"eps_scale": None}), with_factor]

    def _steps(self, signature: ModelSignature, sampler: SamplerTable, short: int, long: int) -> Steps:
        boundary, block = round(self.boundary_share * len(sampler)), signature.block
        require_attention(signature, self.name)

        def reused(i: int) -> tuple[str, ...]:
            attention, others = (short, long) if i < boundary else (long, short)
            return tuple(branch for branch in block.names if i % (attention if branch in block.attending else others))

        return tuple(branch_step(signature, reused(i)) for i in range(len(sampler)))


class EBCachePolicy(FEBCachePolicy):
    """The first version: the branch that matters in a phase is computed at every step, the other at every n-th.

    At interval 3 and 50 steps it costs DiT-XL/2 1.49 times fewer MACs, the published acceleration; no interval reaches 2 times.

    Args:
        target_speedup: in MACs, at least; None takes the interval as it is given.
        interval: interval of the branch that is reused.
        boundary_share: share of the steps that count as noisy.
        eps_scale: factors of eps at the first and the last step, linear in between; a plan without them is tried, too.
        images: held-out images on which they are compared.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "eb_cache"

    def __init__(
        self,
        target_speedup: float | None = None,
        interval: int = 3,
        boundary_share: float = 0.5,
        eps_scale: tuple[float, float] = EPS_SCALE,
        images: int = 4,
    ) -> None:
        super().__init__(target_speedup, 1, interval, boundary_share, eps_scale=eps_scale, images=images)

    def shorts(self) -> range:
        """Every step."""
        return range(1, 2)


def branch_step(signature: ModelSignature, reused: tuple[str, ...]) -> tuple[Segment, ...]:
    """A step in which all blocks reuse the same branches, possibly none."""
    return (reuse(0, signature.depth, reused),) if reused else (compute(0, signature.depth),)


def _macs(signature: ModelSignature, steps: Steps) -> float:
    return sum(step_macs(signature, segments) for segments in steps)
