"""FoCa: every n-th step is full, the others BDF2 forecasts calibrated by Heun's rule (Zheng et al., arXiv 2508.16211)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.published_forecasts import foca_weights
from tc_lightning.policies.weighed_steps import Weigh, WeighedForecastPolicy


class FoCaPolicy(WeighedForecastPolicy):
    """TaylorSeer's placement with the recursion of `foca_weights`, of the summed residual of all blocks.

    Args:
        target_speedup: in MACs, at least; None takes the interval as it is given.
        interval: distance of full steps (5 for DiT-XL/2 and 50 steps: 4.53 times fewer MACs).
        warmup: full steps at the start.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "foca"

    def __init__(self, target_speedup: float | None = None, interval: float = 5.0, warmup: int = 2) -> None:
        super().__init__(target_speedup, interval, warmup, images=1)

    def forecasts(self, context: PlanningContext) -> Sequence[tuple[Mapping[str, Any], Weigh]]:
        """See `WeighedForecastPolicy`."""
        return [({}, foca_weights)]
