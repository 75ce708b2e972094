"""What all plans of the comparison have in common, so that they cost the same: only which tokens or which blocks differs.

Suffixes: L blocks, N tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.forecasts import KV_ORDER
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute, skip
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.planner.recipe import spread

Segments = tuple[Segment, ...]
WARMUP = 3  # full steps at the start, as in the planner


@dataclasses.dataclass(frozen=True)
class EqualCost:
    """A run with full steps at fixed places, and what the others, the P-steps, may spend.

    Args:
        signature: the model.
        sampler: the sampler.
        guidance: guidance scale and channels.
        full: how many steps compute everything; they are spread evenly, after some at the start.
        order: forecast order of what comes from the cache.
        token_share: share of the tokens that P-steps recompute, where tokens are compared.
        window_share: share of the blocks in which they do; the others are skipped.
        block_share: share of the blocks that P-steps compute, where blocks are compared.
        kv_order: forecast order of the keys and values of tokens that P-steps do not recompute.

    Raises:
        PlanError: if a number is out of range.
    """

    signature: ModelSignature
    sampler: SamplerTable
    guidance: Guidance
    full: int = 16
    order: int = 1
    token_share: float = 0.25
    window_share: float = 1.0
    block_share: float = 1 / 3
    kv_order: int = KV_ORDER

    def __post_init__(self) -> None:
        if not 1 <= self.full < len(self.sampler):
            raise PlanError(f"{self.full} of {len(self.sampler)} steps are to be full: choose 1 to {len(self.sampler) - 1}.")
        if not all(0.0 < share <= 1.0 for share in (self.token_share, self.window_share, self.block_share)):
            raise PlanError("shares of tokens, of the window and of blocks must lie above 0 and at most 1.")

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The steps that compute everything."""
        return spread(len(self.sampler), self.full, WARMUP, 1.0)

    @property
    def pruned(self) -> list[int]:
        """The others."""
        return [i for i in range(len(self.sampler)) if i not in self.full_steps]

    @property
    def keep(self) -> int:
        """Tokens that a P-step recomputes in a block, on the average."""
        return _rounded(self.token_share, self.signature.image_tokens)

    @property
    def width(self) -> int:
        """Blocks in which it does."""
        return _rounded(self.window_share, self.signature.depth)

    @property
    def count(self) -> int:
        """Blocks that a P-step computes, where blocks are compared."""
        return _rounded(self.block_share, self.signature.depth)

    def plan(self, name: str, segments: Callable[[int], Segments], selector: str = "", full: tuple[int, ...] = ()) -> CachePlan:
        """A plan.

        Args:
            name: what it is called in the comparison.
            segments: what a P-step does, by its number.
            selector: digest of the content predictor that chooses tokens; not taken where no segment asks for one.
            full: steps that compute everything, where they aren't those of the comparison.
        """
        full = full or self.full_steps
        everything = (compute(0, self.signature.depth),)
        steps = tuple(everything if i in full else segments(i) for i in range(len(self.sampler)))
        chosen = any(s.is_content for step in steps for s in step)
        provenance = {"policy": "ablation", "arguments": {"variant": name}}
        return CachePlan(
            self.signature, self.sampler, self.guidance, steps, self.sampler, provenance, selector=selector if chosen else ""
        )

    def full_steps_for(self, macs: float) -> tuple[int, ...]:
        """Full steps that these MACs pay for if the other steps compute no block."""
        T, dear = len(self.sampler), full_step_macs(self.signature)
        cheap = step_macs(self.signature, (skip(0, self.signature.depth, self.order),))
        count = min(T, math.floor((macs - T * cheap) / (dear - cheap) + 1e-9))
        return spread(T, count, WARMUP, 1.0)


def blocks_computed(blocks: np.ndarray | list[int], depth: int, order: int) -> Segments:
    """A step that computes the given blocks and skips the spans between them."""
    kept = sorted(int(b) for b in blocks)
    segments: list[Segment] = []
    for start, stop in zip([-1, *kept], [*kept, depth], strict=True):  # the span between two computed blocks
        if start >= 0:
            segments.append(compute(start, start + 1))
        if stop > start + 1:
            segments.append(skip(start + 1, stop, order))
    return tuple(segments)


def without_predictor(plan: CachePlan) -> float:
    """MACs of a plan for one sample, less those of the content predictor."""
    return sum(step_macs(plan.model, segments, selector_runs=0) for segments in plan.steps)


def _rounded(share: float, total: int) -> int:
    return min(max(round(share * total), 1), total)
