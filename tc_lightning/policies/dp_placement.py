"""Full steps placed by dynamic programming on measured errors (after CEM, arXiv 2512.23258, and ProCache, arXiv 2512.17298).

CEM tabulates the error of reuse by step and distance and minimises its sum over placements; ProCache asks for distances that shrink
towards the end, which is what the tables lead to. Here the tables know the spacing of the sources, too, on which a forecast
depends, and errors are weighed by their measured effect on the final image.

Shape suffixes: T sampling steps, G gaps, S spacings, O orders.
"""

from __future__ import annotations

import math

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.measure.calibration import MAX_GAP, Calibration
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.targeted import Offer, TargetedPolicy
from tc_lightning.policies.taylorseer import check_orders
from tc_lightning.policies.whole_steps import affordable_full_steps, reused_step, whole_steps

SUMS = ("independent", "coherent")


class DPPlacementPolicy(TargetedPolicy):
    """The placement of least predicted error for as many full steps as the target allows; the other steps forecast.

    Order, and how errors in a row add up, are the ones of least error on held-out trajectories.

    Args:
        target_speedup: in MACs, at least; None takes the number of full steps as it is given.
        full_steps: how many steps compute everything (13 of 50 is ProCache's setting for DiT-XL/2).
        orders: forecast orders to choose from.
        sums: how errors between two full steps add up: independent (their squares) or coherent (their sizes, as they point the same
            way).
        images: held-out images on which they are compared.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "dp_placement"
    calibrated = True

    def __init__(
        self,
        target_speedup: float | None = None,
        full_steps: int = 13,
        orders: tuple[int, ...] = (0, 1, 2),
        sums: tuple[str, ...] = SUMS,
        images: int = 4,
    ) -> None:
        super().__init__(target_speedup, images)
        check_orders(orders)
        if full_steps < 1 or not sums or not set(sums) <= set(SUMS):
            raise PlanError(f"full_steps {full_steps} must be at least 1, and sums {list(sums)} be of {', '.join(SUMS)}.")
        self.full_steps, self.orders, self.sums = full_steps, tuple(orders), tuple(sums)

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """Full steps as far apart as is measured."""
        full = math.ceil(len(sampler) / (MAX_GAP + 1))
        return full * full_step_macs(signature) + (len(sampler) - full) * step_macs(signature, reused_step(signature, 0))

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return self._offers(context, min(self.full_steps, len(context.sampler)))

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        pruned = reused_step(context.signature, 0)
        return self._offers(context, affordable_full_steps(context.signature, context.sampler, budget, pruned))

    def _offers(self, context: PlanningContext, count: int) -> list[Offer]:
        offers = []
        for order in self.orders:
            for how in self.sums:
                placed = place_full_steps(interval_costs(context.calibration, order, how), count)
                steps = whole_steps(context.signature, context.sampler, placed, order)
                arguments = {"order": order, "sums": how, "placed": count, "calibration": context.calibration.digest}
                offers.append(Offer(steps, arguments))
        return offers


def interval_costs(calibration: Calibration, order: int, sums: str) -> np.ndarray:
    """Predicted error of the final latents from an interval: [T, G + 1, S] by first step, length - 1, and spacing of its sources.

    An interval of length n starts with a full step, at `first`, and forecasts n - 1 steps. Infinite where it would leave the process.
    """
    T, G = calibration.drift_TGL2.shape[:2]
    error_TGS = calibration.gap_error_TGSO[:, :, :, order] * calibration.effect_T[:, None, None]
    costs = np.full((T, G + 1, G), np.inf)
    for first in range(T):
        for length in range(1, min(G + 1, T - first) + 1):
            errors_gS = np.stack([error_TGS[first + g, g - 1] for g in range(1, length)]) if length > 1 else np.zeros((1, G))
            costs[first, length - 1] = np.sqrt(errors_gS).sum(0) ** 2 if sums == "coherent" else errors_gS.sum(0)
    return costs


def place_full_steps(costs_TGS: np.ndarray, count: int) -> list[int]:
    """Full steps, the first being 0, of the least summed cost; the spacing of an interval's sources is the length of the one before.

    Args:
        costs_TGS: see `interval_costs`; the first interval has one source, for which its entry of any spacing holds the cost.
        count: number of full steps.

    Raises:
        PlanError: if so few full steps would be further apart than costs are known.
    """
    T, G1, G = costs_TGS.shape
    if count * G1 < T:
        raise PlanError(f"{count} full steps of {T} would be more than {G1} apart, and errors are measured up to there: allow more.")
    # best[t, s]: least cost of k intervals that end before t, the last of length s + 1; spacings above G are held to be G
    best = np.full((T + 1, G1), np.inf)
    for length in range(1, G1 + 1):
        if length <= T:
            best[length, length - 1] = costs_TGS[0, length - 1, 0]
    origins: list[np.ndarray] = []
    for _ in range(count - 1):
        following, origin = np.full((T + 1, G1), np.inf), np.zeros((T + 1, G1), dtype=int)
        for t in range(1, T):
            for length in range(1, min(G1, T - t) + 1):
                totals = best[t] + costs_TGS[t, length - 1, np.minimum(np.arange(G1), G - 1)]
                origin[t + length, length - 1] = int(np.argmin(totals))
                following[t + length, length - 1] = totals.min()
        best = following
        origins.append(origin)
    return _walk_back(origins, T, int(np.argmin(best[T])))


def _walk_back(origins: list[np.ndarray], num_steps: int, last: int) -> list[int]:
    """Starts of the intervals, from the length of the last one and the choices that led to it."""
    end, starts = num_steps, []
    for origin in reversed(origins):
        starts.append(end - last - 1)
        last, end = int(origin[end, last]), end - last - 1
    return [0, *reversed(starts)]
