"""HiCache: every n-th step is full, the others a scaled Hermite series of the last full ones (Feng et al., arXiv 2508.16984)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tc_lightning.errors import PlanError
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.published_forecasts import hermite_weights
from tc_lightning.policies.taylorseer import check_orders
from tc_lightning.policies.weighed_steps import Weigh, WeighedForecastPolicy


class HiCachePolicy(WeighedForecastPolicy):
    """TaylorSeer's placement with Hermite polynomials in place of powers (`hermite_weights`); of the summed residual of all blocks.

    The order is the one of least error on held-out trajectories.

    Args:
        target_speedup: in MACs, at least; None takes the interval as it is given.
        interval: distance of full steps (7 for FLUX: 5.55 times fewer MACs).
        orders: of the highest difference, to choose from.
        sigma: contraction of the polynomials.
        warmup: full steps at the start.
        images: held-out images on which orders are compared.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "hicache"

    def __init__(
        self,
        target_speedup: float | None = None,
        interval: float = 7.0,
        orders: tuple[int, ...] = (1, 2),
        sigma: float = 0.5,
        warmup: int = 3,
        images: int = 4,
    ) -> None:
        super().__init__(target_speedup, interval, warmup, images)
        check_orders(orders)
        if not 0.0 < sigma < 1.0:
            raise PlanError(f"sigma is {sigma:g}: choose above 0, and below 1.")
        self.orders, self.sigma = tuple(orders), sigma

    def forecasts(self, context: PlanningContext) -> Sequence[tuple[Mapping[str, Any], Weigh]]:
        """See `WeighedForecastPolicy`."""
        return [
            ({"order": order, "sigma": self.sigma}, functools.partial(hermite_weights, order=order, sigma=self.sigma))
            for order in self.orders
        ]
