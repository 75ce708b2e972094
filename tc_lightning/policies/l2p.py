"""L2P: forecast weights of every step fitted to recorded trajectories (Shen et al., arXiv 2604.26365).

The authors train a weight for each step and each step before it by gradient descent on the mean squared error; the minimum of that
error follows from the products of residuals that a calibration holds, so that it is found at once. Plans keep four past values, and
weigh those of full steps alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tc_lightning.errors import PlanError
from tc_lightning.measure.residuals import Residuals
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.weighed_steps import Weigh, WeighedForecastPolicy


class L2PPolicy(WeighedForecastPolicy):
    """Least squares of the summed residual of all blocks, step by step, for the full steps at hand.

    Residuals of neighbouring steps are nearly alike, so that weights may be large and opposite: history and ridge are the ones of least
    error on held-out trajectories.

    Args:
        target_speedup: in MACs, at least; None takes the interval as it is given.
        interval: distance of full steps (7 in the authors' code).
        histories: how many of the last full steps are weighed, to choose from.
        ridge: penalty on squared weights, relative to the mean square of the residuals.
        warmup: full steps at the start.
        images: held-out images on which histories are compared.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "l2p"
    calibrated = True

    def __init__(
        self,
        target_speedup: float | None = None,
        interval: float = 7.0,
        histories: tuple[int, ...] = (2, 3, 4),
        ridge: float = 1e-6,
        warmup: int = 3,
        images: int = 4,
    ) -> None:
        super().__init__(target_speedup, interval, warmup, images)
        if not histories or not all(1 <= history <= 4 for history in histories) or ridge < 0.0:
            raise PlanError(f"histories {list(histories)} must be of 1 to 4, and ridge {ridge:g} not negative.")
        self.histories, self.ridge = tuple(histories), ridge

    def forecasts(self, context: PlanningContext) -> Sequence[tuple[Mapping[str, Any], Weigh]]:
        """See `WeighedForecastPolicy`."""
        digest, residuals = context.calibration.digest, context.residuals
        return [
            ({"history": history, "ridge": self.ridge, "calibration": digest}, _fitted(residuals, history, self.ridge))
            for history in self.histories
        ]


def _fitted(residuals: Residuals, history: int, ridge: float) -> Weigh:
    return lambda sources, at: residuals.least_squares(sources[:history], at, ridge).tolist()
