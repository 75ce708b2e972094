"""Spectrum: full steps at growing distances, the others regressions on Chebyshev polynomials of time (Han et al., arXiv 2603.01623).

The authors regress on all full steps so far; plans keep the last four, and so does this. Their forecast is of the last block's output,
here it is of the summed residual, to which the step's own tokens are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tc_lightning.errors import PlanError
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.published_forecasts import spectrum_weights
from tc_lightning.policies.residual_steps import affordable, repeated_step
from tc_lightning.policies.targeted import Offer, TargetedPolicy
from tc_lightning.policies.weighed_steps import weighed_steps

GROWTHS = [round(0.05 * k, 2) for k in range(401)]  # 0 to 20 steps a window, of which the least that fits a budget is taken


class SpectrumPolicy(TargetedPolicy):
    """The authors' windows and regression.

    Args:
        target_speedup: in MACs, at least: windows grow as little as it takes, from 1 step where it allows; None takes them as given.
        window: steps from the first full step after the warm-up to the next (the paper's N).
        growth: steps by which each window is longer than the one before (the paper's alpha: 0.75 has 14 full steps of 50, 3 has 10).
        degree: of the highest polynomial.
        ridge: penalty on squared coefficients.
        warmup: share of the steps, at the start, that are full (5 of 50).

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "spectrum"

    def __init__(
        self,
        target_speedup: float | None = None,
        window: float = 2.0,
        growth: float = 0.75,
        degree: int = 4,
        ridge: float = 0.1,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(target_speedup, images=1)
        if window < 1.0 or growth < 0.0 or degree < 0 or ridge <= 0.0 or not 0.0 <= warmup < 1.0:
            raise PlanError(
                f"window {window:g} must be at least 1, growth {growth:g} and degree {degree} not negative, ridge {ridge:g} above 0, "
                f"and warmup {warmup:g} in [0, 1)."
            )
        self.window, self.growth, self.degree, self.ridge, self.warmup = window, growth, degree, ridge, warmup

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """Windows that grow most."""
        T = len(sampler)
        full = len(self._placed(T, self.window, GROWTHS[-1]))
        return full * full_step_macs(signature) + (T - full) * step_macs(signature, repeated_step(signature))

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return [self._offer(context, self.window, self.growth)]

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        T, count = len(context.sampler), affordable(context.signature, context.sampler, budget)
        choices = ((window, growth) for window in sorted({1.0, self.window}) for growth in GROWTHS)
        fitting = [(-full, *choice) for choice in choices if (full := len(self._placed(T, *choice))) <= count]
        return [self._offer(context, *min(fitting)[1:])] if fitting else []

    def _placed(self, num_steps: int, window: float, growth: float) -> list[int]:
        return growing_steps(num_steps, max(1, round(self.warmup * num_steps)), window, growth)

    def _offer(self, context: PlanningContext, window: float, growth: float) -> Offer:
        T = len(context.sampler)

        def weigh(sources: Sequence[int], at: int) -> Sequence[float]:
            return spectrum_weights(sources, at, T, self.degree, self.ridge)

        steps = weighed_steps(context.signature, context.sampler, self._placed(T, window, growth), weigh)
        arguments: Mapping[str, Any] = {"window": window, "growth": growth, "degree": self.degree, "ridge": self.ridge}
        return Offer(steps, {**arguments, "warmup": self.warmup})


def growing_steps(num_steps: int, warmup: int, window: float, growth: float) -> list[int]:
    """Full steps: the first `warmup` ones, then one at the end of each window; windows are rounded down."""
    full, last = list(range(min(warmup, num_steps))), warmup - 1
    for i in range(warmup, num_steps):
        if i - last >= int(window):
            full.append(i)
            last, window = i, round(window + growth, 3)
    return full
