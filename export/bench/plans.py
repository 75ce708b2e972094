"""The plans of the benchmark: what the three ways of saving cost, apart from any question of quality. Plain data, no torch."""

from __future__ import annotations

import random
from collections.abc import Callable

from tc_lightning.errors import PlanError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.forecasts import KV_ORDER
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute, partial, skip
from tc_lightning.plan.signature import ModelSignature

WARMUP = 3  # full steps at the start, so that forecasts of order 2 are what they say


def benchmark_plans(signature: ModelSignature, sampler: SamplerTable, full_steps: int) -> dict[str, CachePlan]:
    """Four plans with equally many full steps, which differ in what the other steps do.

    `skip`: nothing, order 2. `third of the blocks`: they compute a third of the blocks, half of it at each end. `quarter of the
    tokens`: they recompute 25 % of the tokens in every block, other ones at each step, and repeat the keys and values of the others;
    `quarter, K/V forecast`: the same tokens, with forecasts of these.

    Args:
        signature: the model.
        sampler: its sampling steps.
        full_steps: how many of them compute everything: the first three, the others evenly spread.

    Raises:
        PlanError: if there are fewer than five full steps, or more than steps.
    """
    num_steps = len(sampler)
    if not WARMUP + 2 <= full_steps <= num_steps:
        raise PlanError(f"{full_steps} full steps of {num_steps} cannot be spread: give {WARMUP + 2} to {num_steps}.")
    L, N = signature.depth, signature.image_tokens
    third = max(2, L // 3)
    front, stop = third // 2, L - third + third // 2
    while signature.skips.cut_by(front, stop):  # a span that holds both ends of each long skip, or neither
        stop -= 1
    ends = (compute(0, front), skip(front, stop, 2), compute(stop, L))

    def quarter(kv_order: int) -> Callable[[], tuple[Segment, ...]]:
        chooser = random.Random(0)

        def segments() -> tuple[Segment, ...]:
            tokens = signature.kept(chooser.sample(range(N), N // 4))
            return (partial(0, L, tokens, 1, signature.block.names, kv_order),)

        return segments

    guidance, rest = Guidance(1.5, min(3, signature.in_channels)), full_steps - WARMUP
    full = {*range(WARMUP), *(WARMUP - 1 + round((num_steps - WARMUP) * (j + 1) / rest) for j in range(rest))}
    kinds: dict[str, Callable[[], tuple[Segment, ...]]] = {
        "skip": lambda: (skip(0, L, 2),),
        "third of the blocks": lambda: ends,
        "quarter of the tokens": quarter(0),
        "quarter, K/V forecast": quarter(KV_ORDER),
    }
    return {
        name: CachePlan(
            signature,
            sampler,
            guidance,
            tuple((compute(0, L),) if i in full else pruned() for i in range(num_steps)),
            sampler,
            {"policy": f"benchmark-{name.replace(',', '').replace('/', '').replace(' ', '-')}"},
        )
        for name, pruned in kinds.items()
    }
