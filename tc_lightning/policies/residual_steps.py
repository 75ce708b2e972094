"""Plans that repeat the summed residual of all blocks between full steps, and thresholds that decide where."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence

from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute, skip
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.targeted import Steps
from tc_lightning.policies.whole_steps import affordable_full_steps


def repeated_step(signature: ModelSignature) -> tuple[Segment, ...]:
    """A step whose blocks are skipped: what they added last is added again, gates and all."""
    return (skip(0, signature.depth),)


def repeating_steps(signature: ModelSignature, sampler: SamplerTable, full_steps: Collection[int]) -> Steps:
    """All steps: full where listed, the last residual repeated elsewhere."""
    full, repeated = (compute(0, signature.depth),), repeated_step(signature)
    return tuple(full if i in set(full_steps) else repeated for i in range(len(sampler)))


def affordable(signature: ModelSignature, sampler: SamplerTable, budget: float) -> int:
    """How many full steps a budget in MACs pays for where the others repeat the residual."""
    return affordable_full_steps(signature, sampler, budget, repeated_step(signature))


def threshold_for(count: int, thresholds: Iterable[float], schedule: Callable[[float], Sequence[int]]) -> float | None:
    """The threshold whose schedule has the most full steps, but no more than `count`: of equals the lowest; None if there is none."""
    counts = [(len(schedule(threshold)), threshold) for threshold in sorted({*thresholds, math.inf})]
    fitting = [(-full, threshold) for full, threshold in counts if full <= count]
    return min(fitting)[1] if fitting else None
