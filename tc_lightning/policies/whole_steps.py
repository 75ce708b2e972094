"""Plans in which a step computes either everything or no block at all: where the full steps stand, what the others do."""

from __future__ import annotations

import math
from collections.abc import Collection

from tc_lightning.errors import PlanError
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute, reuse, skip
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.targeted import Steps


def interval_steps(num_steps: int, interval: float, warmup: int = 1) -> list[int]:
    """Full steps: the first `warmup` ones, the last of which starts a count of `interval`; a fraction makes distances differ by one.

    Raises:
        PlanError: if the interval or the warm-up is below 1.
    """
    if interval < 1.0 or warmup < 1:
        raise PlanError(f"interval {interval:g} and warm-up {warmup} must be at least 1.")
    start = min(warmup, num_steps) - 1
    counted = math.ceil((num_steps - start) / interval - 1e-9)
    return [*range(start), *(start + math.floor(j * interval + 1e-9) for j in range(counted))]


def affordable_interval(num_steps: int, full_steps: int, warmup: int = 1) -> float:
    """The interval at which there are this many full steps, warm-up included."""
    return (num_steps - warmup + 1) / (full_steps - warmup + 1)


def affordable_full_steps(signature: ModelSignature, sampler: SamplerTable, macs: float, pruned: tuple[Segment, ...]) -> int:
    """How many steps may compute everything if the others are like `pruned`."""
    dear, cheap, num_steps = full_step_macs(signature), step_macs(signature, pruned), len(sampler)
    return min(num_steps, math.floor((macs - num_steps * cheap) / (dear - cheap) + 1e-9))


def reused_step(signature: ModelSignature, order: int) -> tuple[Segment, ...]:
    """A step that computes no block.

    At order 0 the branches are repeated before their gates, as published: the current gates fit better than those of the step that
    was computed. Forecasts of order 1 and 2 are of the summed residual, one tensor in place of two a block: there the two have the
    same error.
    """
    L = signature.depth
    return (skip(0, L, order),) if order else (reuse(0, L, signature.block.names),)


def whole_steps(signature: ModelSignature, sampler: SamplerTable, full_steps: Collection[int], order: int) -> Steps:
    """All steps: full where listed, forecasts of the given order elsewhere."""
    full, reused = (compute(0, signature.depth),), reused_step(signature, order)
    return tuple(full if i in set(full_steps) else reused for i in range(len(sampler)))
