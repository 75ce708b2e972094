"""SmoothCache: reuse a branch for as many steps as its measured change stays under a threshold (Liu et al., arXiv 2411.10510).

The change is the relative L1 distance between a branch's outputs, averaged over blocks and calibration trajectories; attention and MLP
have a schedule each. From a computed step the longest reuse is taken whose last step is still close enough.
"""

from __future__ import annotations

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.measure.calibration import MAX_GAP
from tc_lightning.plan.costs import step_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.feb_cache import branch_step
from tc_lightning.policies.targeted import Offer, Steps, TargetedPolicy


class SmoothCachePolicy(TargetedPolicy):
    """One threshold for both branches.

    With a target, the threshold is the one whose plan uses most of the budget; the longest reuse is raised above `max_gap` where the
    target needs it.

    Args:
        target_speedup: in MACs, at least; None takes the threshold as it is given.
        threshold: largest change at which a branch is reused (the paper's alpha: 0.08, 0.18 and 0.22 for DiT-XL/2 at 50 steps).
        max_gap: most steps in a row that reuse a branch (3 in the paper).

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "smoothcache"
    calibrated = True

    def __init__(self, target_speedup: float | None = None, threshold: float = 0.18, max_gap: int = 3) -> None:
        super().__init__(target_speedup, images=1)
        if threshold < 0.0 or not 1 <= max_gap <= MAX_GAP:
            raise PlanError(f"threshold {threshold:g} must not be negative, and max_gap {max_gap} must lie in 1 to {MAX_GAP}.")
        self.threshold, self.max_gap = threshold, max_gap

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """No change is too large, at the largest gap that is measured."""
        nothing_changes = np.zeros((len(sampler), max(1, min(MAX_GAP, len(sampler) - 1)), len(signature.block.names)))
        return _macs(signature, _steps(signature, nothing_changes, 0.0, MAX_GAP))

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return [_offer(context, self.threshold, self.max_gap)]

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        drift_TG2 = context.calibration.drift_TGL2.mean(2)
        for gap in range(self.max_gap, context.calibration.max_gap + 1):
            thresholds = np.unique(drift_TG2[:, :gap])
            costs = [_macs(context.signature, _steps(context.signature, drift_TG2, float(t), gap)) for t in thresholds]
            fitting = [(-cost, float(t)) for cost, t in zip(costs, thresholds, strict=True) if cost <= budget * (1 + 1e-9)]
            if fitting:
                return [_offer(context, min(fitting)[1], gap)]
        return []


def smooth_schedule(drift_TG: np.ndarray, threshold: float, max_gap: int) -> list[int]:
    """Steps at which a branch is computed, the first and the last among them.

    Args:
        drift_TG: change between step i and step i - g at [i, g - 1].
        threshold: largest change at which step i may repeat step i - g.
        max_gap: most steps in a row that repeat.
    """
    T, computed, i = len(drift_TG), [], 0
    while i < T:
        computed.append(i)
        gaps = range(min(max_gap, drift_TG.shape[1], T - 1 - i), 0, -1)
        i += 1 + next((g for g in gaps if drift_TG[i + g, g - 1] <= threshold), 0)
    return sorted({*computed, T - 1})


def _steps(signature: ModelSignature, drift_TG2: np.ndarray, threshold: float, max_gap: int) -> Steps:
    names = signature.block.names
    computed = {branch: set(smooth_schedule(drift_TG2[:, :, b], threshold, max_gap)) for b, branch in enumerate(names)}
    return tuple(branch_step(signature, tuple(b for b in names if i not in computed[b])) for i in range(len(drift_TG2)))


def _macs(signature: ModelSignature, steps: Steps) -> float:
    return sum(step_macs(signature, segments) for segments in steps)


def _offer(context: PlanningContext, threshold: float, max_gap: int) -> Offer:
    steps = _steps(context.signature, context.calibration.drift_TGL2.mean(2), threshold, max_gap)
    return Offer(steps, {"threshold": threshold, "max_gap": max_gap, "calibration": context.calibration.digest})
