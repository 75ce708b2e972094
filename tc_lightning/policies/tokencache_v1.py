"""TokenCache, first version, with hand-set schedule: which tokens, which blocks, which timesteps (arXiv 2409.18523, version 1).

Two-Phase Round-Robin places the full steps. At the others, blocks of least importance (the mean of their tokens' weights in the Cache
Predictor) are left out, and in the rest the tokens of highest weight are recomputed. The paper gives neither intervals nor boundary
nor shares: those here are ours, set once and not searched; `TPRRPolicy` is the search.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.measure.scores import Scores
from tc_lightning.plan.costs import step_macs
from tc_lightning.plan.forecasts import KV_ORDER, MAX_ORDER
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute, partial, skip
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.pruned_steps import top_tokens
from tc_lightning.policies.targeted import MAX_INTERVAL, Offer, TargetedPolicy, largest, reference_macs
from tc_lightning.policies.tprr import Rounds


class TokenCacheV1Policy(TargetedPolicy):
    """Two-Phase Round-Robin in which P-steps recompute the most important tokens of the most important blocks.

    With a target, k2 and k1 = k2 + 1 are tried from 1 and 2 upwards, each with the most tokens that the budget pays for, at least
    `token_share`.

    Args:
        target_speedup: in MACs, at least; None takes intervals and shares as they are given.
        k1: interval of the first, noisy phase.
        k2: interval of the second.
        boundary_share: share of the steps in the first phase.
        block_share: share of the blocks in which P-steps recompute tokens; the least important others reuse their residual.
        token_share: share of the image's tokens that P-steps recompute in those blocks.
        images: held-out images on which intervals are compared.
        kv_order: forecast order of the keys and values that are not recomputed (the paper repeats them: 0).

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "tokencache_v1"
    cuts = True
    needs = ("importance_TLN",)

    def __init__(
        self,
        target_speedup: float | None = None,
        k1: int = 4,
        k2: int = 3,
        boundary_share: float = 0.5,
        block_share: float = 0.75,
        token_share: float = 0.1,
        images: int = 4,
        kv_order: int = KV_ORDER,
    ) -> None:
        super().__init__(target_speedup, images)
        if not all(0.0 < share <= 1.0 for share in (block_share, token_share)) or not 0.0 <= boundary_share <= 1.0:
            raise PlanError("block_share and token_share must lie above 0 and at most 1, boundary_share between 0 and 1.")
        if not 0 <= kv_order <= MAX_ORDER:
            raise PlanError(f"kv_order is {kv_order}: choose from 0 to {MAX_ORDER}.")
        self.k1, self.k2, self.boundary_share, self.kv_order = k1, k2, boundary_share, kv_order
        self.block_share, self.token_share = block_share, token_share
        self._rounds(1, k1, k2)

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """The fewest tokens, at the largest intervals."""
        return self._macs(signature, sampler, MAX_INTERVAL - 1, self._tokens(signature))

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return [self._offer(context, self.k1, self.k2, self._tokens(context.signature))]

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        signature, sampler, offers = context.signature, context.sampler, []
        for k2 in range(1, MAX_INTERVAL):
            tokens = largest(
                functools.partial(self._macs, signature, sampler, k2), self._tokens(signature), signature.image_tokens, budget
            )
            if tokens is not None:
                offers.append(self._offer(context, k2 + 1, k2, tokens))
        return offers

    def _tokens(self, signature: ModelSignature) -> int:
        return max(1, round(self.token_share * signature.image_tokens))

    def _blocks(self, signature: ModelSignature) -> int:
        return max(1, round(self.block_share * signature.depth))

    def _rounds(self, num_steps: int, k1: int, k2: int) -> Rounds:
        return Rounds(round(self.boundary_share * num_steps), k1, k2)

    def _macs(self, signature: ModelSignature, sampler: SamplerTable, k2: int, tokens: int) -> float:
        """They do not depend on which blocks and tokens are chosen."""
        pruned = _segments(signature, range(self._blocks(signature)), lambda start, stop: tuple(range(tokens)), self.kv_order)
        full = len(self._rounds(len(sampler), k2 + 1, k2).full_steps(len(sampler)))
        spared = reference_macs(signature, sampler) / len(sampler) - step_macs(signature, pruned)
        return reference_macs(signature, sampler) - (len(sampler) - full) * spared

    def _offer(self, context: PlanningContext, k1: int, k2: int, tokens: int) -> Offer:
        rounds, T = self._rounds(len(context.sampler), k1, k2), len(context.sampler)
        steps = tuple(self._step(context, rounds, i, tokens) for i in range(T))
        arguments = {
            "k1": k1,
            "k2": k2,
            "boundary_share": self.boundary_share,
            "block_share": self.block_share,
            "token_share": tokens / context.signature.image_tokens,
            "kv_order": self.kv_order,
            "scores": context.scores.digest,
        }
        return Offer(steps, arguments)

    def _step(self, context: PlanningContext, rounds: Rounds, i: int, tokens: int) -> tuple[Segment, ...]:
        T, signature, scores = len(context.sampler), context.signature, context.scores
        if i in rounds.full_steps(T):
            return (compute(0, signature.depth),)
        kept = important_blocks(scores, rounds.phase(i, T), self._blocks(signature))
        return _segments(signature, kept, lambda a, b: top_tokens(scores.importance_TLN[i, a:b].mean(0), tokens), self.kv_order)


def _segments(
    signature: ModelSignature, kept: Sequence[int], choose: Callable[[int, int], tuple[int, ...]], kv_order: int
) -> tuple[Segment, ...]:
    """Neighbouring blocks of one kind make a segment; `choose(start, stop)` names the image's tokens of one that is kept."""
    segments = []
    for is_kept, group in itertools.groupby(range(signature.depth), key=set(kept).__contains__):
        blocks = list(group)
        start, stop = blocks[0], blocks[-1] + 1
        tokens = signature.kept(choose(start, stop)) if is_kept else ()
        segments.append(partial(start, stop, tokens, 0, signature.block.names, kv_order) if is_kept else skip(start, stop))
    return tuple(segments)


def important_blocks(scores: Scores, phase: list[int], count: int) -> list[int]:
    """The blocks of highest mean importance over the steps of a phase, which share them and hence a step program."""
    importance_L = scores.importance_TLN[phase].mean((0, 2))
    return sorted(np.argsort(-importance_L, kind="stable")[:count].tolist())
