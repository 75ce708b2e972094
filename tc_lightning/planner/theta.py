"""What refining moves, as one vector theta, and what its places mean in a plan.

    theta = (next_x, next_m, next_m_prev, next_m_prev2 of each step; the weights of each free forecast, latest value first)

A forecast is that of what one segment of a step takes from the cache, of the keys and values of one, or of the difference of guidance's
halves at a step. It is free where all that it forecasts is weighed alike: a segment whose blocks, or whose halves of guidance, were
last computed at different steps keeps its order, since it has one list of weights. Keys and values that repeat one value do so still:
stated as a weight of 1, it would be another plan, one that updates them in place. The weights start from the polynomial's, and are as
many as there are values.

Shape suffixes: B images, P places, F coefficients of a step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.dataflow import Entry, Read, entries_read
from tc_lightning.planner.fit import COEFFICIENTS

_ORDERS = {"weights": "order", "kv_weights": "kv_order"}  # which order the weights of a field take the place of


class FreeForecast(NamedTuple):
    """A forecast whose weights theta holds.

    Args:
        step: where it is.
        segment: which of the step's segments; None: the difference of guidance's halves.
        field: which weights of it, `weights` or `kv_weights`.
        entries: what is forecast.
        places: where its weights are in theta.
    """

    step: int
    segment: int | None
    field: str
    entries: tuple[Entry, ...]
    places: slice


@dataclasses.dataclass(frozen=True)
class Places:
    """What the places of theta are in a plan, and in every plan that refining makes of it.

    Args:
        steps: sampling steps.
        forecasts: those whose weights are free, as they stand in theta.
    """

    steps: int
    forecasts: tuple[FreeForecast, ...]

    @classmethod
    def of(cls, plan: CachePlan, weights: bool) -> Places:
        """Those of a plan: its sampler's coefficients and, if `weights`, those of forecasts."""
        found: list[FreeForecast] = []
        first = plan.num_steps * len(COEFFICIENTS)
        for step in range(plan.num_steps if weights else 0):
            for segment, field, reads in _forecasts(plan, step):
                if len({read.weights for read in reads}) == 1:
                    places = slice(first, first + len(reads[0].weights))
                    found.append(FreeForecast(step, segment, field, tuple(read.entry for read in reads), places))
                    first = places.stop
        return cls(plan.num_steps, tuple(found))

    @property
    def size(self) -> int:
        """How many places there are, P."""
        return self.forecasts[-1].places.stop if self.forecasts else self.steps * len(COEFFICIENTS)

    def pack(self, plan: CachePlan) -> Tensor:
        """Theta of a plan, [P] in double precision."""
        values = [getattr(row, name) for row in plan.sampler.steps for name in COEFFICIENTS]
        for one in self.forecasts:
            values += next(read.weights for read in plan.flows[one.step].reads if read.entry == one.entries[0])
        return torch.tensor(values, dtype=torch.float64)

    def unpack(self, plan: CachePlan, theta_P: Tensor) -> CachePlan:
        """The plan with this theta: free weights take the place of the orders that they are of.

        Raises:
            PlanError: if a value is not finite.
        """
        values = iter(theta_P.tolist())
        rows = [dataclasses.replace(row, **{name: next(values) for name in COEFFICIENTS}) for row in plan.sampler.steps]
        steps, modes = [list(segments) for segments in plan.steps], list(plan.guidance_modes)
        for one in self.forecasts:
            weights = tuple(itertools.islice(values, one.places.stop - one.places.start))
            if one.segment is None:
                modes[one.step] = dataclasses.replace(modes[one.step], order=0, weights=weights)
            else:
                free: dict[str, Any] = {one.field: weights, _ORDERS[one.field]: 0}
                steps[one.step][one.segment] = dataclasses.replace(steps[one.step][one.segment], **free)
        sampler = dataclasses.replace(plan.sampler, steps=tuple(rows))
        return dataclasses.replace(plan, sampler=sampler, steps=tuple(map(tuple, steps)), guidance_modes=tuple(modes))

    def moved(self, plan: CachePlan, delta_P: Tensor) -> CachePlan:
        """The plan with theta changed by so much."""
        return self.unpack(plan, self.pack(plan) + delta_P)

    def coefficients(self, own_BP: Tensor, step: int) -> Tensor:
        """Of each image's theta, the sampler's coefficients of a step, [B, F]."""
        return own_BP[:, step * len(COEFFICIENTS) : (step + 1) * len(COEFFICIENTS)]

    def weights(self, own_BP: Tensor, step: int) -> dict[Entry, Tensor]:
        """Of each image's theta, the free weights of what a step forecasts, [B, values] each."""
        return {entry: own_BP[:, one.places] for one in self.forecasts if one.step == step for entry in one.entries}


def _forecasts(plan: CachePlan, step: int) -> Iterator[tuple[int | None, str, list[Read]]]:
    """The forecasts of a step that may be free: segment, field, and what is read by each."""
    reads = plan.flows[step].reads
    for j, segment in enumerate(plan.steps[step]):
        own = [read for read in reads if read.entry.whole in entries_read(segment, plan.model.tokens, plan.model.block)]
        kv = [read for read in own if read.entry.kind in ("k", "v")]
        yield j, "weights", [read for read in own if read not in kv]
        yield j, "kv_weights", [] if any(read.repeats for read in kv) else kv
    yield None, "weights", [read for read in reads if read.entry.kind == "guidance"]
