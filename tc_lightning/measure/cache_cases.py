"""For which cache scores are learned: how far apart its full steps are, and at which order it forecasts from them. Needs no torch.

Plans forecast a cached value from the last full steps. So scores are learned of such forecasts, too: of every step that lies between
full steps at one of some distances, at one of some orders, all of these in turn.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import NamedTuple

from tc_lightning.errors import RunError
from tc_lightning.plan.forecasts import MAX_ORDER, lagrange_weights

MAX_GAP = 100  # most steps from one full step to the next


class Case(NamedTuple):
    """One way for a value to come from the cache.

    Args:
        order: forecast order.
        gap: steps from one full step to the next.
        age: steps since the last full step.
        kv_order: forecast order of keys and values.
    """

    order: int
    gap: int
    age: int
    kv_order: int = 0

    @property
    def reach(self) -> int:
        """How many steps back it may look."""
        return self.age + max(self.order, self.kv_order) * self.gap

    def reads(self, step: int) -> Reads:
        """What a step reads; the first step of a run is always full."""
        last, history = step - self.age, max(self.order, self.kv_order) + 1
        sources = tuple(dict.fromkeys(max(last - j * self.gap, 0) for j in range(history)))
        return Reads(sources, _weights(sources, self.order, step), _weights(sources, self.kv_order, step))


class Reads(NamedTuple):
    """Full steps, latest first, and what each of them weighs: in residuals and branches, and in keys and values."""

    sources: tuple[int, ...]
    weights: tuple[float, ...]
    kv_weights: tuple[float, ...]


def _weights(sources: tuple[int, ...], order: int, step: int) -> tuple[float, ...]:
    """Those of the polynomial of an order, and 0 for sources that it does not look at."""
    own = lagrange_weights(sources[: order + 1], step)
    return own + (0.0,) * (len(sources) - len(own))


@dataclasses.dataclass(frozen=True)
class CacheCases:
    """Caches by the orders of their forecasts and by the distances of their full steps. The default repeats the step before.

    Args:
        orders: forecast orders, 0 to 2; 0 repeats.
        gaps: steps from one full step to the next; at 1 every step is full, and each value is that of the step before.
        kv_order: forecast order of keys and values, whatever that of residuals and branches.

    Raises:
        RunError: if there is none, or one is out of range.
    """

    orders: tuple[int, ...] = (0,)
    gaps: tuple[int, ...] = (1,)
    kv_order: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.kv_order <= MAX_ORDER:
            raise RunError(f"kv_order is {self.kv_order}: choose 0 to {MAX_ORDER}.")
        for name, least, most in (("orders", 0, MAX_ORDER), ("gaps", 1, MAX_GAP)):
            values = tuple(sorted({*getattr(self, name)}))
            if not values or not all(least <= value <= most for value in values):
                raise RunError(f"{name} are {list(values)}: name at least one, each {least} to {most}.")
            object.__setattr__(self, name, values)

    @functools.cached_property
    def each(self) -> tuple[Case, ...]:
        """One for each order, distance, and place between two full steps."""
        found = itertools.product(self.orders, self.gaps)
        return tuple(Case(order, gap, age, self.kv_order) for order, gap in found for age in range(1, max(gap, 2)))

    @property
    def reach(self) -> int:
        """How many steps back a forecast may look."""
        return max(case.reach for case in self.each)

    def reads(self, index: int, step: int) -> Reads:
        """What a step of a trajectory reads. Cases take turns over steps and over trajectories: every one is met at every step.

        Args:
            index: number of the trajectory.
            step: sampling step, 1 or later.
        """
        return self.each[(index + step) % len(self.each)].reads(step)

    @property
    def in_words(self) -> str:
        """For a person: forecasts at order 1 or 2 (keys and values at order 2) from full steps 2, 3 or 4 apart."""
        kv = f" (keys and values at order {self.kv_order})" if self.orders != (self.kv_order,) else ""
        return f"forecasts at order {_either(self.orders)}{kv} from full steps {_either(self.gaps)} apart"


REPEATED = CacheCases()


def _either(values: tuple[int, ...]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
