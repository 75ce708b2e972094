"""MagCache: a residual is repeated while its magnitude has changed little, by ratios measured once (Ma et al., arXiv 2506.09045).

The ratio of a step is the mean over tokens of how much longer the residual is than at the step before. In a row of repeated steps k
has the error |1 - product of the ratios up to k|, and a step is repeated while the row's summed error is within a threshold. The
ratios come from a calibration run, and nothing of the image is looked at: the schedule is the same for every image, and a plan.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.measure.calibration import MAX_GAP
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.residual_steps import affordable, repeated_step, repeating_steps, threshold_for
from tc_lightning.policies.targeted import Offer, TargetedPolicy


class MagCachePolicy(TargetedPolicy):
    """The authors' rule and their settings for FLUX. Both halves of guidance have one ratio, their mean.

    With a target, the threshold is the one whose plan uses most of the budget; the longest row is raised above `max_gap` where the
    target needs it.

    Args:
        target_speedup: in MACs, at least; None takes the threshold as it is given.
        threshold: summed error up to which a residual is repeated.
        max_gap: most steps in a row that repeat (the paper's K).
        retained: share of the steps, at the start, that are full.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "magcache"
    calibrated = True

    def __init__(self, target_speedup: float | None = None, threshold: float = 0.24, max_gap: int = 5, retained: float = 0.1) -> None:
        super().__init__(target_speedup, images=1)
        if threshold < 0.0 or max_gap < 1 or not 0.0 <= retained < 1.0:
            raise PlanError(
                f"threshold {threshold:g} must not be negative, max_gap {max_gap} at least 1, and retained {retained:g} in [0, 1)."
            )
        self.threshold, self.max_gap, self.retained = threshold, max_gap, retained

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """Nothing changes, and rows are as long as they may get."""
        T = len(sampler)
        full = len(magnitude_schedule(np.ones(T), 0.0, max(self.max_gap, MAX_GAP), self._start(T)))
        return full * full_step_macs(signature) + (T - full) * step_macs(signature, repeated_step(signature))

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return [self._offer(context, self.threshold, self.max_gap)]

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        ratio_T = context.residuals.ratio_T
        start, count = self._start(len(ratio_T)), affordable(context.signature, context.sampler, budget)
        for gap in range(self.max_gap, max(self.max_gap, MAX_GAP) + 1):
            rows = {error for i in range(start, len(ratio_T)) for error in itertools.islice(row_errors(ratio_T[i:]), gap)}
            threshold = threshold_for(count, rows, functools.partial(magnitude_schedule, ratio_T, max_gap=gap, start=start))
            if threshold is not None:
                return [self._offer(context, min(threshold, max(rows, default=0.0)), gap)]
        return []

    def _start(self, num_steps: int) -> int:
        return max(1, math.floor(self.retained * num_steps + 0.5))

    def _offer(self, context: PlanningContext, threshold: float, max_gap: int) -> Offer:
        full = magnitude_schedule(context.residuals.ratio_T, threshold, max_gap, self._start(len(context.sampler)))
        arguments = {"threshold": threshold, "max_gap": max_gap, "retained": self.retained, "calibration": context.calibration.digest}
        return Offer(repeating_steps(context.signature, context.sampler, full), arguments)


def row_errors(ratios: Sequence[float] | np.ndarray) -> list[float]:
    """Summed errors of a row of repeated steps, after each of them: sum over k of |1 - product of the first k ratios|."""
    return [float(error) for error in np.cumsum(np.abs(1.0 - np.cumprod(ratios)))]


def magnitude_schedule(ratio_T: np.ndarray, threshold: float, max_gap: int, start: int) -> list[int]:
    """Full steps: the first `start`, and each that would make the summed error of its row too large, or the row too long."""
    full, product, error, row = list(range(start)), 1.0, 0.0, 0
    for i in range(start, len(ratio_T)):
        product, row = product * float(ratio_T[i]), row + 1
        error += abs(1.0 - product)
        if error > threshold or row > max_gap:
            full.append(i)
            product, error, row = 1.0, 0.0, 0
    return full
