"""TokenCache version 2 (Lou, Luo, Liu, Li et al., arXiv 2409.18523): one budget of tokens for all blocks, full steps by percentiles.

* I-steps stand at equal percentiles of the scores accumulated over time: where tokens want to be recomputed, they come more often.
* P-steps recompute the top (1 - r) L N scores over all blocks; r_l is what that leaves out of block l. A block's number of tokens is
  the same in all P-steps, so that they share one program, and follows from mean scores. A segment is a single block here; blocks of
  which next to nothing is left are skipped together, blocks that keep everything are computed.
* Which tokens these are, the content predictor says image by image. With scores that do not depend on the image (version 1's
  predictor), they are those of the highest score at the step.

The paper's ratio r and number of I-steps are not given for all its models. Here the target decides: for several numbers of I-steps,
r is the smallest that reaches it, and the plan of lowest error on held-out trajectories is taken.

Shape suffixes: T steps, L blocks, N tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.measure.scores import Scores
from tc_lightning.plan.costs import full_step_macs, selector_runs, step_macs
from tc_lightning.plan.forecasts import KV_ORDER, MAX_ORDER
from tc_lightning.plan.guidance import BOTH
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute, content, partial, skip
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.pruned_steps import top_tokens
from tc_lightning.policies.targeted import Offer, Steps, TargetedPolicy, largest


def percentile_steps(importance_TLN: np.ndarray, count: int) -> list[int]:
    """At most `count` I-steps: step 0, and the first step at which each k-th of `count` equal parts of all scores is reached."""
    reached_T = np.cumsum(np.concatenate([[0.0], importance_TLN[1:].mean((1, 2), dtype=np.float64)]))
    wanted = reached_T[-1] * np.arange(1, count) / count
    return sorted({0, *np.searchsorted(reached_T, wanted * (1 - 1e-9)).tolist()})


def block_keeps(importance_LN: np.ndarray, total: int) -> list[int]:
    """Tokens that each block keeps if the `total` highest scores of all blocks are recomputed; of equals, the first."""
    L, N = importance_LN.shape
    top = np.argsort(-importance_LN.ravel(), kind="stable")[:total]
    return np.bincount(top // N, minlength=L).tolist()


def kept_segments(
    signature: ModelSignature, scores: Scores, step: int, keeps: Sequence[int], order: int, least: int, kv_order: int = 0
) -> tuple[Segment, ...]:
    """Segments of a P-step.

    Args:
        signature: the model.
        scores: whose predictor chooses the tokens.
        step: the step, at which static tokens are chosen.
        keeps: tokens of the image that each block recomputes.
        order: forecast order of what is not recomputed.
        least: blocks that would recompute fewer tokens are skipped.
        kv_order: forecast order of their keys and values.
    """
    N = signature.image_tokens
    segments: list[Segment] = []
    for kind, run in itertools.groupby(enumerate(keeps), key=lambda block: _kind(block[1], least, N)):
        blocks = list(run)
        start, stop = blocks[0][0], blocks[-1][0] + 1
        if kind == "partial":
            segments += [_kept(signature, scores, step, b, keep, order, kv_order) for b, keep in blocks]
        else:
            segments.append(compute(start, stop) if kind == "compute" else skip(start, stop, order))
    return tuple(segments)


class TokenCacheV2Policy(TargetedPolicy):
    """Percentile I-steps and a global budget of tokens.

    With a target, every number of I-steps that can reach it is tried, with as many recomputed tokens as the budget pays for.

    Args:
        target_speedup: in MACs, at least; None takes the shares as they are given.
        full_share: share of the steps that are I-steps.
        keep_share: share of all blocks' tokens that P-steps recompute, 1 - r in the paper.
        full_shares: shares of I-steps that are tried with a target.
        orders: forecast orders of what is not recomputed, to be compared: 0 repeats (the paper), 1 and 2 extrapolate.
        kv_order: forecast order of keys and values that are not recomputed (the paper repeats them: 0).
        least_share: blocks that would recompute a smaller share of their tokens are skipped.
        images: held-out images on which plans are compared.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "tokencache_v2"
    cuts = True

    def __init__(
        self,
        target_speedup: float | None = None,
        full_share: float = 0.2,
        keep_share: float = 0.25,
        full_shares: tuple[float, ...] = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35),
        orders: tuple[int, ...] = (0,),
        least_share: float = 0.05,
        images: int = 4,
        kv_order: int = KV_ORDER,
    ) -> None:
        super().__init__(target_speedup, images)
        if not full_shares or not all(0.0 < share < 1.0 for share in (full_share, *full_shares)):
            raise PlanError("shares of full steps must lie between 0 and 1, and at least one be tried.")
        if not all(0.0 <= share <= 1.0 for share in (keep_share, least_share)):
            raise PlanError("keep_share and least_share must lie in 0 to 1.")
        if not orders or not all(0 <= order <= MAX_ORDER for order in (*orders, kv_order)):
            raise PlanError(f"orders and kv_order must be of 0 to {MAX_ORDER}, and of the first there must be one at least.")
        self.full_share, self.keep_share, self.full_shares = full_share, keep_share, tuple(full_shares)
        self.orders, self.least_share, self.kv_order = tuple(orders), least_share, kv_order

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """The fewest I-steps, and P-steps that skip everything."""
        full, T = _count(min(self.full_shares), len(sampler)), len(sampler)
        return full * full_step_macs(signature) + (T - full) * step_macs(signature, (skip(0, signature.depth),))

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        L, N = context.signature.depth, context.signature.image_tokens
        full_steps = percentile_steps(context.scores.importance_TLN, _count(self.full_share, len(context.sampler)))
        return [self._offer(context, full_steps, round(self.keep_share * L * N), order) for order in self.orders]

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        everything, offers = context.signature.depth * context.signature.image_tokens, []
        for count in sorted({_count(share, len(context.sampler)) for share in self.full_shares}):
            full_steps = percentile_steps(context.scores.importance_TLN, count)
            total = largest(functools.partial(self._macs, context, full_steps), 0, everything, budget)
            if total is not None:
                offers += [self._offer(context, full_steps, total, order) for order in self.orders]
        return offers

    def _macs(self, context: PlanningContext, full_steps: Sequence[int], total: int) -> float:
        runs = selector_runs(context.guidance, BOTH)
        return sum(step_macs(context.signature, segments, runs) for segments in self._steps(context, full_steps, total, 0))

    def _steps(self, context: PlanningContext, full_steps: Sequence[int], total: int, order: int) -> Steps:
        signature, scores, T = context.signature, context.scores, len(context.sampler)
        pruned = [i for i in range(T) if i not in full_steps]
        keeps = block_keeps(scores.importance_TLN[pruned].mean(0), total) if pruned else []
        least, everything = max(1, round(self.least_share * signature.image_tokens)), (compute(0, signature.depth),)

        def pruned_step(i: int) -> tuple[Segment, ...]:
            return kept_segments(signature, scores, i, keeps, order, least, self.kv_order)

        return tuple(everything if i in full_steps else pruned_step(i) for i in range(T))

    def _offer(self, context: PlanningContext, full_steps: Sequence[int], total: int, order: int) -> Offer:
        steps = self._steps(context, full_steps, total, order)
        share = total / (context.signature.depth * context.signature.image_tokens)
        arguments = {
            "keep_share": share,
            "order": order,
            "kv_order": self.kv_order,
            "least_share": self.least_share,
            "scores": context.scores.digest,
        }
        chosen = any(s.is_content for segments in steps for s in segments)
        return Offer(steps, arguments, selector=context.scores.selector if chosen else "")


def _count(share: float, num_steps: int) -> int:
    return max(1, round(share * num_steps))


def _kind(keep: int, least: int, num_tokens: int) -> str:
    if keep < least:
        return "skip"
    return "compute" if keep == num_tokens else "partial"


def _kept(signature: ModelSignature, scores: Scores, step: int, block: int, keep: int, order: int, kv_order: int) -> Segment:
    """One block that recomputes `keep` tokens of the image."""
    names = signature.block.names
    if scores.selector:
        return content(block, block + 1, keep, order, names, kv_order)
    tokens = signature.kept(top_tokens(scores.importance_TLN[step, block], keep))
    return partial(block, block + 1, tokens, order, names, kv_order)
