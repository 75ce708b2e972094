"""ERTACache's schedule: a residual is repeated while it is near the one that it stands for (Peng et al., arXiv 2508.21091, equation 7).

Full runs are recorded once, and a step is repeated if the relative L1 distance between the residual that was computed last and its
own is below a threshold; otherwise it is computed, and its residual is the one to repeat. Of the paper's three parts this is the
first. The others are left out: a plan cannot hold the correction that is added to a repeated residual, and the adjusted time steps
(equations 9 and 10) presume an Euler sampler of a flow.
"""

from __future__ import annotations

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.measure.calibration import MAX_GAP
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.residual_steps import affordable, repeated_step, repeating_steps, threshold_for
from tc_lightning.policies.targeted import Offer, TargetedPolicy


class ERTACachePolicy(TargetedPolicy):
    """One threshold for all steps; distances are measured up to 8 steps, and further on a step is computed.

    Args:
        target_speedup: in MACs, at least: the threshold is the one whose plan uses most of the budget; None takes it as it is given.
        threshold: relative L1 distance below which a residual is repeated (the paper's lambda, of which it tries several).

    Raises:
        PlanError: if the threshold is negative.
    """

    name = "ertacache"
    calibrated = True

    def __init__(self, target_speedup: float | None = None, threshold: float = 0.2) -> None:
        super().__init__(target_speedup, images=1)
        if threshold < 0.0:
            raise PlanError(f"threshold is {threshold:g}: a distance is not negative.")
        self.threshold = threshold

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """Nothing changes for as long as is measured."""
        T = len(sampler)
        full = len(nearness_schedule(np.zeros((T, max(1, min(MAX_GAP, T - 1)))), np.inf))
        return full * full_step_macs(signature) + (T - full) * step_macs(signature, repeated_step(signature))

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return [_offer(context, self.threshold)]

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        change_TG, count = context.residuals.change_TG, affordable(context.signature, context.sampler, budget)
        above = np.nextafter(change_TG, np.inf)  # a threshold just above a distance repeats at that distance
        threshold = threshold_for(count, map(float, np.unique(above)), lambda t: nearness_schedule(change_TG, t))
        return [] if threshold is None else [_offer(context, min(threshold, float(above.max())))]


def nearness_schedule(change_TG: np.ndarray, threshold: float) -> list[int]:
    """Full steps: the first, and each whose residual is not within the threshold of the one that was computed last.

    Args:
        change_TG: see `tc_lightning.measure.residuals.Residuals`; steps further apart than G are full.
        threshold: distances below it are repeated.
    """
    T, G = change_TG.shape
    full = [0]
    for i in range(1, T):
        gap = i - full[-1]
        if gap > G or change_TG[i, gap - 1] >= threshold:
            full.append(i)
    return full


def _offer(context: PlanningContext, threshold: float) -> Offer:
    full = nearness_schedule(context.residuals.change_TG, threshold)
    arguments = {"threshold": threshold, "calibration": context.calibration.digest}
    return Offer(repeating_steps(context.signature, context.sampler, full), arguments)
