"""What plans cost, in units of one full step: in MACs, or in time on the machine at hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import torch

from tc_lightning.errors import RunError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs, plan_macs
from tc_lightning.rollout.ranks import Ranks


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
        return len(plan.reference) * self.milliseconds(plan)[1]


@dataclasses.dataclass(frozen=True)
class SharedPrice:
    """The first process's price, for all that plan together: two clocks never agree, and one decision has to.

    Args:
        price: asked in the first process alone.
        ranks: the processes, all of which ask at the same time.
        device: where their sums are made.

    Raises:
        RunError: in the other processes, when called, if the first one fails.
    """

    price: Price
    ranks: Ranks
    device: torch.device

    def __call__(self, plan: CachePlan) -> float:
        """See `Price`."""
        return self.of(lambda: self.price(plan))

    def of(self, measure: Callable[[], float]) -> float:
        """What the first process measures."""
        try:
            found = measure() if self.ranks.first else 0.0
        except Exception:
            self.ranks.of_first(math.nan, self.device)
            raise
        found = self.ranks.of_first(found, self.device)
        if math.isnan(found):
            raise RunError("the first process could not time a plan: what it printed says why.")
        return found
