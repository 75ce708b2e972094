"""Plans from a router: for each step and block, which branches come from the cache. What two published methods share.

Shape suffixes: T sampling steps, L blocks, 2 branches (0 attn, 1 mlp).
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from tc_lightning.costs import block_macs, fixed_macs, full_step_macs, macs_speedup
from tc_lightning.diffusion.table import SamplerTable
from tc_lightning.errors import PlanError
from tc_lightning.evaluation import psnr_db
from tc_lightning.plan import BRANCHES, CachePlan, Guidance, ModelSignature, Segment, compute, reuse
from tc_lightning.policies.base import PlanChoice, PlanningContext, Policy

NO_ROUTER = (
    "the run has no router: train one with `model.init_args.router` (lightning_configs/digits_router.yaml shows how), or choose a "
    "policy that needs none."
)


def router_plan(
    signature: ModelSignature,
    sampler: SamplerTable,
    guidance: Guidance,
    reused_TL2: np.ndarray,
    provenance: Mapping[str, Any] | None = None,
) -> CachePlan:
    """The plan in which the given branches come from the cache, before their gate, and all others are computed.

    Args:
        signature: the model.
        sampler: the sampler.
        guidance: guidance scale and channels.
        reused_TL2: whether a branch is reused, boolean.
        provenance: policy, arguments and digests.

    Raises:
        PlanError: if something is reused at step 0.
    """
    steps = tuple(_segments(reused_L2) for reused_L2 in np.asarray(reused_TL2, dtype=bool))
    return CachePlan(signature, sampler, guidance, steps, dict(provenance or {}))


def _segments(reused_L2: np.ndarray) -> tuple[Segment, ...]:
    """Neighbouring blocks that reuse the same branches share a segment."""
    segments, start = [], 0
    for reused, blocks in itertools.groupby(map(tuple, reused_L2.tolist())):
        stop = start + len(list(blocks))
        branches = tuple(branch for branch, here in zip(BRANCHES, reused, strict=True) if here)
        segments.append(reuse(start, stop, branches) if branches else compute(start, stop))
        start = stop
    return tuple(segments)


class RouterPolicy(Policy):
    """Reuses the branches with the lowest w: those up to a threshold, or as many as a target asks for.

    Args:
        target_speedup: in MACs, at least; None to go by the threshold.
        threshold: without a target, branches with w above it are computed and the others reused.

    Raises:
        PlanError: if an argument is out of range.
    """

    name: str
    needs = ("router_TL2",)

    def __init__(self, target_speedup: float | None = None, threshold: float = 0.1) -> None:
        if target_speedup is not None and target_speedup <= 1.0:
            raise PlanError(f"target_speedup {target_speedup:g} asks for nothing: choose a value above 1, or null.")
        if not 0.0 <= threshold < 1.0:
            raise PlanError(f"threshold {threshold:g}: choose 0 or more, and below 1.")
        self.target_speedup, self.threshold = target_speedup, threshold

    @abstractmethod
    def may_reuse(self, num_steps: int) -> np.ndarray:
        """Whether a step may reuse anything, boolean [T]."""

    def max_speedup(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """The largest target within reach: every branch reused wherever the method allows it."""
        may = self.may_reuse(len(sampler))
        return len(may) * full_step_macs(signature) / _macs(signature, np.where(may, 0.0, 1.0)[:, None, None])

    def check(self, signature: ModelSignature, sampler: SamplerTable) -> None:
        """Whether the target can be reached.

        Raises:
            PlanError: if it cannot, with the largest target that can.
        """
        most = self.max_speedup(signature, sampler)
        if self.target_speedup is not None and self.target_speedup > most:
            raise PlanError(
                f"target_speedup {self.target_speedup:g} is out of reach of {self.name} with {len(sampler)} steps, of which "
                f"{self.may_reuse(len(sampler)).sum()} may reuse: choose above 1, up to {most:.2f}."
            )

    def plan(self, context: PlanningContext) -> PlanChoice:
        """The plan; a single row tells of it.

        Raises:
            PlanError: if the scores hold no router, or the target is out of reach.
        """
        if context.scores.router_TL2 is None:
            raise PlanError(f"{self.name}: {NO_ROUTER}")
        self.check(context.signature, context.sampler)
        reused_TL2 = self._reused(context.signature, context.scores.router_TL2)
        arguments = {"target_speedup": self.target_speedup, "threshold": self.threshold}
        provenance = {"policy": self.name, "arguments": arguments, "scores": context.scores.digest}
        plan = router_plan(context.signature, context.sampler, context.guidance, reused_TL2, provenance)
        mse = context.evaluate(plan, None)
        row = {"policy": self.name, "reused": float(reused_TL2.mean()), "macs_speedup": macs_speedup(plan)}
        return PlanChoice(plan, [row | {"mse": mse, "psnr": psnr_db(mse), "chosen": True}])

    def _reused(self, signature: ModelSignature, router_TL2: np.ndarray) -> np.ndarray:
        """Which branches are reused, boolean [T, L, 2]."""
        may_TL2 = np.broadcast_to(self.may_reuse(len(router_TL2))[:, None, None], router_TL2.shape)
        if self.target_speedup is None:
            return may_TL2 & (router_TL2 <= self.threshold)
        budget = len(router_TL2) * full_step_macs(signature) / self.target_speedup
        return lowest_within_budget(signature, router_TL2, may_TL2, budget)


def lowest_within_budget(signature: ModelSignature, router_TL2: np.ndarray, may_TL2: np.ndarray, macs_budget: float) -> np.ndarray:
    """Reuse branches from the lowest w on until the budget is met, [T, L, 2]; of equals, the earlier step, block and branch first."""
    allowed = np.flatnonzero(may_TL2)
    order = allowed[np.argsort(router_TL2.ravel()[allowed], kind="stable")]
    saved = np.cumsum(_branch_macs(signature)[order % 2])
    needed = _macs(signature, np.ones_like(router_TL2)) - macs_budget
    count = int(np.searchsorted(saved, needed * (1 - 1e-12))) + 1 if needed > 0 else 0
    reused = np.zeros(router_TL2.size, dtype=bool)
    reused[order[:count]] = True
    return reused.reshape(router_TL2.shape)


def _branch_macs(signature: ModelSignature) -> np.ndarray:
    """MACs of a branch, [2]."""
    return np.array([block_macs(signature, signature.tokens, (branch,)) for branch in BRANCHES], dtype=np.float64)


def _macs(signature: ModelSignature, computed_TL2: np.ndarray) -> float:
    """MACs of a whole plan; the shares of blocks may be given once for all."""
    branches = (computed_TL2 * _branch_macs(signature)).sum(2).mean(1) * signature.depth
    return float((fixed_macs(signature) + branches).sum())
