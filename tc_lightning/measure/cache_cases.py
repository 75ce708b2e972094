"""For which cache scores are learned: how far apart its full steps are, and at which order it forecasts from them. Needs no torch.

Plans forecast a cached value from the last full steps. So scores are learned of such forecasts, too: of every step that lies between
full steps at one of some distances, at one of some orders, all of these in turn.
"""

from __future__ import annotations

import dataclasses
import functools
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
    """

    order: int
    gap: int
    age: int

    def sources(self, step: int) -> tuple[int, ...]:
        """The full steps that a step's values are forecast from, latest first; the first step of a run is always one."""
        last = step - self.age
        return tuple(dict.fromkeys(max(last - j * self.gap, 0) for j in range(self.order + 1)))


class Reads(NamedTuple):
    """The full steps that a value is forecast from, latest first, and the weight of each."""

    sources: tuple[int, ...]
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class CacheCases:
    """Caches by the orders of their forecasts and by the distances of their full steps. The default repeats the step before.

    Args:
        orders: forecast orders, 0 to 2; 0 repeats.
        gaps: steps from one full step to the next; at 1 every step is full, and each value is that of the step before.

    Raises:
        RunError: if there is none, or one is out of range.
    """

    orders: tuple[int, ...] = (0,)
    gaps: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name, least, most in (("orders", 0, MAX_ORDER), ("gaps", 1, MAX_GAP)):
            values = tuple(sorted({*getattr(self, name)}))
            if not values or not all(least <= value <= most for value in values):
                raise RunError(f"{name} are {list(values)}: name at least one, each {least} to {most}.")
            object.__setattr__(self, name, values)

    @functools.cached_property
    def each(self) -> tuple[Case, ...]:
        """One for each order, distance, and place between two full steps."""
        return tuple(Case(o, gap, age) for o in self.orders for gap in self.gaps for age in range(1, max(gap, 2)))

    @property
    def reach(self) -> int:
        """How many steps back a forecast may look."""
        return max(case.age + case.order * case.gap for case in self.each)

    def reads(self, index: int, step: int) -> Reads:
        """What a step of a trajectory reads. Cases take turns over steps and over trajectories: every one is met at every step.

        Args:
            index: number of the trajectory.
            step: sampling step, 1 or later.
        """
        sources = self.each[(index + step) % len(self.each)].sources(step)
        return Reads(sources, lagrange_weights(sources, step))

    @property
    def in_words(self) -> str:
        """For a person: forecasts at order 1 or 2 from full steps 2, 3 or 4 apart."""
        return f"forecasts at order {_either(self.orders)} from full steps {_either(self.gaps)} apart"


REPEATED = CacheCases()


def _either(values: tuple[int, ...]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
