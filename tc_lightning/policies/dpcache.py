"""DPCache: full steps by dynamic programming on path-aware costs of features (Cui et al., arXiv 2602.22654).

Entry [a, i, j] of the cost tensor is the error, summed over steps i + 1 to j, of forecasting from the full steps i and a before it,
and at order 2 from the step just before a, which stands for the full step before: a tensor of three steps does not know it. The end
of the process counts as one step more, whose features are forecast from the last steps. The paths are walked as the authors do it:
the best way to step i with k full steps, and the full step before i on that way, are kept, and those alone.

DP placement (`dp_placement.py`) differs in what it adds up: errors of eps in squares, weighed by their effect on the image, with both
distances known. Here the error is the root mean square in place of the mean absolute one: it follows from the products of residuals
that a calibration holds. Shape suffixes: T sampling steps.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.measure.residuals import Residuals, forecast_error
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.published_forecasts import taylor_weights
from tc_lightning.policies.residual_steps import affordable, repeated_step
from tc_lightning.policies.targeted import Offer, TargetedPolicy
from tc_lightning.policies.taylorseer import check_orders
from tc_lightning.policies.weighed_steps import weighed_steps


class DPCachePolicy(TargetedPolicy):
    """The placement of least summed cost for as many full steps as the target allows; the other steps forecast.

    The order is the one of least error on held-out trajectories. Forecasts are TaylorSeer's series, as the authors' are.

    Args:
        target_speedup: in MACs, at least; None takes the number of full steps as it is given.
        full_steps: how many steps compute everything.
        orders: forecast orders to choose from, 1 and 2 (the authors' is 2).
        warmup: full steps at the start.
        longest: largest distance of full steps, as a share of all steps; raised where the target needs it.
        images: held-out images on which orders are compared.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "dpcache"
    calibrated = True

    def __init__(
        self,
        target_speedup: float | None = None,
        full_steps: int = 13,
        orders: tuple[int, ...] = (1, 2),
        warmup: int = 3,
        longest: float = 0.3,
        images: int = 4,
    ) -> None:
        super().__init__(target_speedup, images)
        check_orders(orders)
        if min(orders) < 1 or warmup < 2 or full_steps < warmup or not 0.0 < longest <= 1.0:
            raise PlanError(
                f"orders {list(orders)} must be 1 or 2, warmup {warmup} at least 2, full_steps {full_steps} no fewer, and longest "
                f"{longest:g} above 0 and at most 1."
            )
        self.full_steps, self.orders, self.warmup, self.longest = full_steps, tuple(orders), warmup, longest

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """The warm-up alone."""
        full = min(self.warmup, len(sampler))
        return full * full_step_macs(signature) + (len(sampler) - full) * step_macs(signature, repeated_step(signature))

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return self._offers(context, min(self.full_steps, len(context.sampler)))

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        return self._offers(context, affordable(context.signature, context.sampler, budget))

    def _offers(self, context: PlanningContext, count: int) -> list[Offer]:
        T, offers = len(context.sampler), []
        warmup = min(self.warmup, T)
        longest = max(int(self.longest * T), math.ceil((T - warmup + 1) / (count - warmup + 1)))
        for order in self.orders:
            placed = cheapest_path(path_costs(context.residuals, order, longest), count, warmup, longest)
            weigh = functools.partial(taylor_weights, order=order)
            steps = weighed_steps(context.signature, context.sampler, placed, weigh)
            arguments = {"order": order, "placed": count, "warmup": warmup, "calibration": context.calibration.digest}
            offers.append(Offer(steps, arguments))
        return offers


def path_costs(residuals: Residuals, order: int, longest: int) -> np.ndarray:
    """The cost tensor [T, T, T + 1] by full step before, full step, and the next one; infinite where it is never entered.

    Args:
        residuals: of full-compute trajectories.
        order: forecast order, 1 or 2.
        longest: largest distance of full steps.
    """
    T = len(residuals.ratio_T)
    costs_TTT = np.full((T, T, T + 1), np.inf)
    ends = _with_end(residuals.products_TT, order)
    for i in range(1, T):
        for a in range(max(0, i - longest), i):
            sources = [i, a, a - 1][: min(order, a + 1) + 1]
            total = 0.0
            for j in range(i + 1, min(T, i + longest) + 1):
                total += math.sqrt(forecast_error(ends, sources, taylor_weights(sources, j, order), j))
                costs_TTT[a, i, j] = total
    return costs_TTT


def _with_end(products_TT: np.ndarray, order: int) -> np.ndarray:
    """Products with those of one step more, [T + 1, T + 1]: the residual that the last steps forecast."""
    T = len(products_TT)
    sources = list(range(T - 1, max(-1, T - 2 - order), -1))
    basis = np.vstack([np.eye(T), np.zeros(T)])
    basis[T, sources] = taylor_weights(sources, T, order)
    return basis @ products_TT @ basis.T


def cheapest_path(costs_TTT: np.ndarray, count: int, warmup: int, longest: int) -> list[int]:
    """Full steps, the first `warmup` ones among them, of the least summed cost.

    Args:
        costs_TTT: see `path_costs`.
        count: number of full steps.
        warmup: how many steps at the start are full.
        longest: largest distance of full steps, and from the last to the end.

    Raises:
        PlanError: if so few full steps do not reach the end, or the warm-up alone has more.
    """
    T = len(costs_TTT)
    if count < warmup:
        raise PlanError(f"{count} full steps are fewer than the {warmup} of the warm-up: allow more.")
    best: dict[int, tuple[float, tuple[int, ...]]] = {warmup - 1: (0.0, (*range(warmup),))}  # by the last: cost, and the way there
    for placed in range(warmup + 1, count + 2):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for j in range(T, T + 1) if placed == count + 1 else range(T):
            ways = [
                (cost + (float(costs_TTT[way[-2], i, j]) if len(way) > 1 else 0.0), (*way, j))
                for i, (cost, way) in best.items()
                if i < j <= i + longest
            ]
            if ways:
                reached[j] = min(ways)
        best = reached
    if T not in best or not math.isfinite(best[T][0]):
        raise PlanError(f"{count} full steps of {T} would be more than {longest} apart: allow more, or raise `longest`.")
    return list(best[T][1][:-1])
