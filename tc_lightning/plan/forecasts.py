"""How a cached value is forecast: a weighted sum of the last values of its entry. Plain data, no torch.

The weights are those of a polynomial through the last values, by the steps at which they were computed (TaylorSeer, arXiv 2503.06923,
with exact extrapolation in place of finite differences), or free ones that the plan states (all forecast caches are linear in past
values: L2P, arXiv 2604.26365).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tc_lightning.errors import PlanError
from tc_lightning.plan.json_fields import is_int, is_number

MAX_ORDER = 2  # of polynomials
MAX_HISTORY = 4  # past values of one entry that free weights may weigh
KV_ORDER = 2  # of keys and values, unless told otherwise: measured best whatever the order of residuals (export/BENCHMARKS.md)


class Forecast(NamedTuple):
    """Weights of an entry's last values.

    Args:
        order: of the polynomial, 0 to 2: 0 repeats the last value; where there are fewer than order + 1 values, that of these.
        weights: free weights in its place, latest value first, for as many values as there are weights; empty for the polynomial.
    """

    order: int = 0
    weights: tuple[float, ...] = ()

    @property
    def history(self) -> int:
        """Past values that are weighed, where there are as many."""
        return len(self.weights) or self.order + 1

    @property
    def repeats(self) -> bool:
        """Whether it is the last value as it is."""
        return self.history == 1 and self.weights in ((), (1.0,))

    @property
    def in_words(self) -> str:
        """For a person, for example `order 1`, `weights 1.5 -0.5`."""
        return "weights " + " ".join(f"{weight:.4g}" for weight in self.weights) if self.weights else f"order {self.order}"

    def weigh(self, sources: Sequence[int], step: int) -> tuple[float, ...]:
        """Weights, at a step, of the values computed at steps `sources`, latest first."""
        return self.weights or lagrange_weights(sources, step)

    def fault(self) -> str:
        """What is wrong with it; empty if nothing is."""
        if not 0 <= self.order <= MAX_ORDER:
            return f"order {self.order} is not 0, 1 or 2"
        if self.weights and self.order:
            return f"order {self.order} is that of a polynomial, and there are free weights: give one of the two"
        if len(self.weights) > MAX_HISTORY:
            return f"{len(self.weights)} weights: at most the last {MAX_HISTORY} values are kept"
        if not all(map(math.isfinite, self.weights)):
            return f"weights {list(self.weights)} must be finite"
        return ""


def lagrange_weights(sources: Sequence[int], at: int) -> tuple[float, ...]:
    """Weights that extrapolate the polynomial through values at steps `sources` to step `at`; one source repeats its value."""
    weights = []
    for j, s in enumerate(sources):
        weight = 1.0
        for k, other in enumerate(sources):
            if k != j:
                weight *= (at - other) / (s - other)
        weights.append(weight)
    return tuple(weights)


def forecast_to_json(forecast: Forecast, prefix: str = "") -> dict[str, Any]:
    """Its order or, where it has some, its weights, as keys that begin with the prefix."""
    return {f"{prefix}weights": list(forecast.weights)} if forecast.weights else {f"{prefix}order": forecast.order}


def forecast_from_json(raw: dict[str, Any], where: str, prefix: str = "") -> Forecast:
    """Inverse of `forecast_to_json`, from an object with these keys among others; order 0 where there are none.

    Raises:
        PlanError: if a value has the wrong type.
    """
    order, weights = raw.get(f"{prefix}order", 0), raw.get(f"{prefix}weights", [])
    if not is_int(order):
        raise PlanError(f"{where}: {prefix}order must be an integer.")
    if not (isinstance(weights, list) and all(map(is_number, weights))):
        raise PlanError(f"{where}: {prefix}weights must be a list of numbers, the weight of the latest value first.")
    return Forecast(order, tuple(map(float, weights)))
