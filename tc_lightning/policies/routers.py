"""Plans from a router: for each step and block, which branches come from the cache. What two published methods share.

Shape suffixes: T sampling steps, L blocks, 2 branches (0 attn, 1 mlp).
"""

from __future__ import annotations

import itertools
from abc import abstractmethod

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import BRANCHES, Segment, compute, reuse
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.targeted import Offer, TargetedPolicy

NO_ROUTER = (
    "the run has no router: train one with `model.init_args.router` (lightning_configs/digits_router.yaml shows how), or choose a "
    "policy that needs none."
)


def router_steps(reused_TL2: np.ndarray, names: tuple[str, ...] = BRANCHES) -> tuple[tuple[Segment, ...], ...]:
    """Steps in which the given branches come from the cache, before their gate, and all others are computed.

    Args:
        reused_TL2: whether a branch is reused, boolean.
        names: the branches of a block.
    """
    return tuple(_segments(reused_L2, names) for reused_L2 in np.asarray(reused_TL2, dtype=bool))


def _segments(reused_L2: np.ndarray, names: tuple[str, ...]) -> tuple[Segment, ...]:
    """Neighbouring blocks that reuse the same branches share a segment."""
    segments, start = [], 0
    for reused, blocks in itertools.groupby(map(tuple, reused_L2.tolist())):
        stop = start + len(list(blocks))
        branches = tuple(branch for branch, here in zip(names, reused, strict=True) if here)
        segments.append(reuse(start, stop, branches) if branches else compute(start, stop))
        start = stop
    return tuple(segments)


class RouterPolicy(TargetedPolicy):
    """Reuses the branches with the lowest w: those up to a threshold, or as many as a target asks for.

    Args:
        target_speedup: in MACs, at least; None to go by the threshold.
        threshold: without a target, branches with w above it are computed and the others reused.

    Raises:
        PlanError: if an argument is out of range.
    """

    needs = ("router_TL2",)

    def __init__(self, target_speedup: float | None = None, threshold: float = 0.1) -> None:
        super().__init__(target_speedup, images=1)
        if not 0.0 <= threshold < 1.0:
            raise PlanError(f"threshold {threshold:g}: choose 0 or more, and below 1.")
        self.threshold = threshold

    @abstractmethod
    def may_reuse(self, num_steps: int) -> np.ndarray:
        """Whether a step may reuse anything, boolean [T]."""

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """Every branch reused wherever the method allows it."""
        computed_T11 = 1.0 - self.may_reuse(len(sampler))[:, None, None]
        return macs_of_branches(signature, np.broadcast_to(computed_T11, (len(sampler), signature.depth, len(signature.block.names))))

    def unavailable(self, context: PlanningContext) -> str | None:
        """See `Policy.unavailable`."""
        return f"{self.name}: {NO_ROUTER}" if context.scores.router_TL2 is None else super().unavailable(context)

    def published(self, context: PlanningContext) -> list[Offer]:
        """The plan of the threshold."""
        router_TL2 = _router(context, self.name)
        return [self._offer(context, self._allowed(router_TL2) & (router_TL2 <= self.threshold))]

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """The plan of the highest threshold that the target asks for."""
        router_TL2 = _router(context, self.name)
        return [self._offer(context, lowest_within_budget(context.signature, router_TL2, self._allowed(router_TL2), budget))]

    def _allowed(self, router_TL2: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.may_reuse(len(router_TL2))[:, None, None], router_TL2.shape)

    def _offer(self, context: PlanningContext, reused_TL2: np.ndarray) -> Offer:
        threshold = float(_router(context, self.name)[reused_TL2].max(initial=0.0))
        return Offer(router_steps(reused_TL2, context.signature.block.names), {"threshold": threshold, "scores": context.scores.digest})


def _router(context: PlanningContext, name: str) -> np.ndarray:
    if context.scores.router_TL2 is None:
        raise PlanError(f"{name}: {NO_ROUTER}")
    return context.scores.router_TL2


def lowest_within_budget(signature: ModelSignature, router_TL2: np.ndarray, may_TL2: np.ndarray, macs_budget: float) -> np.ndarray:
    """Reuse branches from the lowest w on until the budget is met, [T, L, 2]; of equals, the earlier step, block and branch first."""
    allowed = np.flatnonzero(may_TL2)
    order = allowed[np.argsort(router_TL2.ravel()[allowed], kind="stable")]
    saved = np.cumsum(branch_macs(signature).ravel()[order % router_TL2[0].size])
    needed = macs_of_branches(signature, np.ones_like(router_TL2)) - macs_budget
    count = int(np.searchsorted(saved, needed * (1 - 1e-12))) + 1 if needed > 0 else 0
    reused = np.zeros(router_TL2.size, dtype=bool)
    reused[order[:count]] = True
    return reused.reshape(router_TL2.shape)


def branch_macs(signature: ModelSignature) -> np.ndarray:
    """MACs of every branch of every block, [L, 2]."""
    costs = [[macs.of(signature.tokens, signature.tokens) for macs in signature.macs_of(b)] for b in range(signature.depth)]
    return np.array(costs, dtype=np.float64)


def macs_of_branches(signature: ModelSignature, computed_TL2: np.ndarray) -> float:
    """MACs of a whole plan that computes these branches."""
    return float(len(computed_TL2) * signature.fixed_macs + (computed_TL2 * branch_macs(signature)).sum())
