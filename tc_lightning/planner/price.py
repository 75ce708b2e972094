"""What plans cost, in units of one full step: in MACs, or in time on the machine at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from tc_lightning.costs import full_step_macs, plan_macs
from tc_lightning.plan import CachePlan


class Price(Protocol):
    """What a plan costs, in units of one full step of its model with both halves of guidance."""

    def __call__(self, plan: CachePlan) -> float:
        """Cost of all its steps."""


def macs_price(plan: CachePlan) -> float:
    """Multiply-accumulates."""
    return plan_macs(plan) / full_step_macs(plan.model)


@dataclasses.dataclass(frozen=True)
class ClockPrice:
    """Time.

    Args:
        milliseconds: measures a plan: milliseconds an image of all its steps, and of one full step.
    """

    milliseconds: Callable[[CachePlan], tuple[float, float]]

    def __call__(self, plan: CachePlan) -> float:
        """See `Price`."""
        whole, full = self.milliseconds(plan)
        return whole / full

    def reference_ms(self, plan: CachePlan) -> float:
        """Milliseconds an image of the full-compute run that the plan replaces."""
        return len(plan.baseline) * self.milliseconds(plan)[1]
