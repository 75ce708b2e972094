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

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tc_lightning.costs import macs_speedup
from tc_lightning.diffusion.table import SamplerTable
from tc_lightning.errors import PlanError
from tc_lightning.evaluation import psnr_db
from tc_lightning.plan import MAX_ORDER, CachePlan, Guidance, ModelSignature, Segment, compute, content, partial, skip
from tc_lightning.policies.base import PlanChoice, PlanningContext, Policy
from tc_lightning.policies.pruned_steps import top_tokens
from tc_lightning.scores import Scores


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


def kept_segments(scores: Scores, step: int, keeps: Sequence[int], order: int, least: int) -> tuple[Segment, ...]:
    """Segments of a P-step.

    Args:
        scores: whose predictor chooses the tokens.
        step: the step, at which static tokens are chosen.
        keeps: tokens that each block recomputes.
        order: forecast order of what is not recomputed.
        least: blocks that would recompute fewer tokens are skipped.
    """
    N = scores.importance_TLN.shape[2]
    segments: list[Segment] = []
    for kind, run in itertools.groupby(enumerate(keeps), key=lambda block: _kind(block[1], least, N)):
        blocks = list(run)
        start, stop = blocks[0][0], blocks[-1][0] + 1
        if kind == "partial":
            segments += [_kept(scores, step, b, keep, order) for b, keep in blocks]
        else:
            segments.append(compute(start, stop) if kind == "compute" else skip(start, stop, order))
    return tuple(segments)


def tokencache_v2_plan(
    signature: ModelSignature,
    sampler: SamplerTable,
    guidance: Guidance,
    scores: Scores,
    *,
    full_steps: Sequence[int],
    total: int,
    order: int = 0,
    least_share: float = 0.05,
) -> CachePlan:
    """The plan for given I-steps and number of recomputed tokens.

    Args:
        signature: the model.
        sampler: the sampler.
        guidance: guidance scale and channels.
        scores: importances, and the content predictor if they are its means.
        full_steps: the I-steps.
        total: tokens recomputed in a P-step, over all blocks: (1 - r) L N.
        order: forecast order of what is not recomputed; the paper repeats (0).
        least_share: blocks that would recompute a smaller share of their tokens are skipped.

    Raises:
        PlanError: if step 0 is not an I-step, or the scores belong to another model or number of steps.
    """
    T, L, N = len(sampler), signature.depth, signature.tokens
    if scores.importance_TLN.shape != (T, L, N):
        raise PlanError(f"scores of shape {scores.importance_TLN.shape} are not for {T} steps, {L} blocks and {N} tokens.")
    pruned = [i for i in range(T) if i not in full_steps]
    keeps = block_keeps(scores.importance_TLN[pruned].mean(0), total) if pruned else []
    least = max(1, round(least_share * N))
    steps = tuple((compute(0, L),) if i in full_steps else kept_segments(scores, i, keeps, order, least) for i in range(T))
    arguments = {"full_steps": list(full_steps), "total": total, "order": order, "least_share": least_share}
    provenance = {"policy": "tokencache_v2", "arguments": arguments, "scores": scores.digest}
    chosen = any(s.is_content for segments in steps for s in segments)
    return CachePlan(signature, sampler, guidance, steps, provenance, selector=scores.selector if chosen else "")


class _Candidate(NamedTuple):
    plan: CachePlan
    order: int
    total: int


class TokenCacheV2Policy(Policy):
    """Percentile I-steps and a global budget of tokens; deterministic.

    Args:
        target_speedup: in MACs, at least.
        full_shares: shares of the steps that are I-steps, to try.
        orders: forecast orders to try: 0 repeats (the paper), 1 and 2 extrapolate.
        least_share: blocks that would recompute a smaller share of their tokens are skipped.
        screen_images: held-out images of the first round.
        finalists: plans measured on all images.
        progress: show a progress bar.

    Raises:
        PlanError: if an argument is out of range.
    """

    def __init__(
        self,
        target_speedup: float = 2.5,
        full_shares: tuple[float, ...] = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35),
        orders: tuple[int, ...] = (0, 1, 2),
        least_share: float = 0.05,
        screen_images: int = 8,
        finalists: int = 4,
        progress: bool = True,
    ) -> None:
        if target_speedup <= 1.0:
            raise PlanError(f"target_speedup {target_speedup:g} asks for nothing: choose a value above 1, for example 2.5.")
        if not full_shares or not all(0.0 < share < 1.0 for share in full_shares) or not 0.0 <= least_share <= 1.0:
            raise PlanError("full_shares must lie between 0 and 1, at least one of them, and least_share in 0 to 1.")
        if not orders or not all(0 <= order <= MAX_ORDER for order in orders) or min(screen_images, finalists) < 1:
            raise PlanError(f"orders must be of 0 to {MAX_ORDER}, at least one; screen_images and finalists at least 1.")
        self.target_speedup, self.full_shares, self.orders = target_speedup, tuple(full_shares), tuple(orders)
        self.least_share, self.screen_images, self.finalists, self.progress = least_share, screen_images, finalists, progress

    def check(self, signature: ModelSignature, sampler: SamplerTable) -> None:
        """Whether the target can be reached: the cheapest plan skips everything in P-steps.

        Raises:
            PlanError: if it cannot, with the largest target that can.
        """
        T, count = len(sampler), self._counts(len(sampler))[0]
        steps = tuple((compute(0, signature.depth),) if i < count else (skip(0, signature.depth),) for i in range(T))
        most = macs_speedup(CachePlan(signature, sampler, Guidance(), steps))
        if most < self.target_speedup:
            raise PlanError(
                f"target_speedup {self.target_speedup:g} is not reachable with {T} steps of which {count} are full: "
                f"choose above 1, up to {most:.2f}, or lower full_shares."
            )

    def plan(self, context: PlanningContext) -> PlanChoice:
        """Choose a plan; the table lists the finalists first, then the others, each by error.

        Raises:
            PlanError: if no candidate reaches the target, or all of them diverge.
        """
        self.check(context.signature, context.sampler)
        found = self._candidates(context)
        bar = tqdm(found, desc="screening plans", unit="plan", disable=not self.progress)
        screened = [context.evaluate(c.plan, self.screen_images) for c in bar]
        by_error = sorted(range(len(found)), key=screened.__getitem__)
        bar = tqdm(by_error[: self.finalists], desc="measuring finalists", unit="plan", disable=not self.progress)
        finals = {j: context.evaluate(found[j].plan, None) for j in bar}
        order = [*sorted(finals, key=finals.__getitem__), *by_error[self.finalists :]]
        if finals[order[0]] == float("inf"):
            raise PlanError("every plan that was tried makes the latents NaN or infinite: lower target_speedup, or use orders 0, 1.")
        return PlanChoice(found[order[0]].plan, [_row(found[j], screened[j], finals.get(j), j == order[0]) for j in order])

    def _candidates(self, context: PlanningContext) -> list[_Candidate]:
        """For every number of I-steps and every order, the plan that recomputes as many tokens as the target allows."""
        found = {}
        for count in self._counts(len(context.sampler)):
            full_steps = percentile_steps(context.scores.importance_TLN, count)
            for order in self.orders:
                if (candidate := self._fill(context, full_steps, order)) is not None:
                    found[candidate.plan.steps] = candidate
        return list(found.values())

    def _fill(self, context: PlanningContext, full_steps: Sequence[int], order: int) -> _Candidate | None:
        """Bisection for the largest number of recomputed tokens within the target; None if even none are too many."""

        def build(total: int) -> CachePlan:
            where = (context.signature, context.sampler, context.guidance, context.scores)
            return tokencache_v2_plan(*where, full_steps=full_steps, total=total, order=order, least_share=self.least_share)

        plan, low, high = build(0), 0, context.signature.depth * context.signature.tokens + 1
        if macs_speedup(plan) < self.target_speedup:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if macs_speedup(candidate := build(middle)) >= self.target_speedup:
                plan, low = candidate, middle
            else:
                high = middle
        return _Candidate(plan, order, low)

    def _counts(self, num_steps: int) -> list[int]:
        return sorted({max(1, round(share * num_steps)) for share in self.full_shares})


def _kind(keep: int, least: int, num_tokens: int) -> str:
    if keep < least:
        return "skip"
    return "compute" if keep == num_tokens else "partial"


def _kept(scores: Scores, step: int, block: int, keep: int, order: int) -> Segment:
    """One block that recomputes `keep` tokens."""
    if scores.selector:
        return content(block, block + 1, keep, order)
    return partial(block, block + 1, top_tokens(scores.importance_TLN[step, block], keep), order)


def _row(candidate: _Candidate, screened: float, mse: float | None, chosen: bool) -> dict[str, Any]:
    """A line of the table; `psnr` is that of the mean error, which is at most the mean over images."""
    plan = candidate.plan
    return {
        "order": candidate.order,
        "kept_share": candidate.total / (plan.model.depth * plan.model.tokens),
        "full_steps": len(plan.full_steps),
        "macs_speedup": macs_speedup(plan),
        "mse_screen": screened,
        "mse": mse,
        "psnr": None if mse is None else psnr_db(mse),
        "chosen": chosen,
    }
