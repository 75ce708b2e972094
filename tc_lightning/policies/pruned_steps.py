"""What a P-step of Two-Phase Round-Robin does: four kinds, filled in from a teacher's scores.

    skip     the residual of all blocks comes from the cache, as one tensor
    edges    the a first and b last blocks are computed, the span between them is skipped
    branch   as edges, but the branch that matters less comes from the cache in the blocks at the edges
    partial  in a window of blocks the tokens that matter most are recomputed, the blocks before and after are skipped

A segment is a contiguous span, so blocks are chosen as edges or windows: the ones whose summed sensitivity is highest. Long skips may
not be cut in two: in a network that has some, as few blocks more are taken as that needs. Shape suffixes: T steps, L blocks, 2 branches
(attn, mlp), N tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.measure.scores import Scores
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.forecasts import KV_ORDER
from tc_lightning.plan.segments import Segment, compute, partial, reuse, skip
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.plan.skips import NO_SKIPS, LongSkips


@dataclasses.dataclass(frozen=True)
class PrunedStep:
    """Description of a P-step.

    Args:
        kind: skip, edges, branch or partial.
        order: forecast order of what comes from the cache.
        block_share: share of the blocks that are not skipped (not used by skip); at least one block.
        token_share: share of the image's tokens recomputed (partial alone); at least one token.

    Raises:
        PlanError: if the kind is unknown, or a share that it uses is not above 0 and at most 1.
    """

    kind: str
    order: int
    block_share: float = 0.0
    token_share: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise PlanError(f"unknown kind of P-step {self.kind!r}: choose one of {', '.join(_KINDS)}.")
        shares = {"skip": (), "partial": (self.block_share, self.token_share)}.get(self.kind, (self.block_share,))
        if not all(0.0 < share <= 1.0 for share in shares):
            raise PlanError(f"a {self.kind} P-step needs shares above 0 and at most 1; found {shares}.")

    def segments(self, signature: ModelSignature, scores: Scores, phase: Sequence[int], step: int) -> tuple[Segment, ...]:
        """Segments of one P-step.

        Args:
            signature: the model.
            scores: importance of tokens and sensitivity of branches.
            phase: all P-steps of the phase: blocks are chosen once for them, so that they share one step program.
            step: the step itself: tokens are chosen for each step.
        """
        return tuple(s for s in _KINDS[self.kind](self, signature, scores, phase, step) if s.start < s.stop)

    def cost(self, signature: ModelSignature, scores: Scores) -> float:
        """MACs of such a step over those of a full one; they do not depend on which blocks or tokens are chosen."""
        dearest = max(step_macs(signature, self.segments(signature, scores, [i], i)) for i in range(len(scores.sensitivity_TL2)))
        return dearest / full_step_macs(signature)


def best_edges(sensitivity_L: np.ndarray, count: int, skips: LongSkips = NO_SKIPS) -> tuple[int, int]:
    """Split `count` blocks into a first and b last ones of the highest summed sensitivity; of equals, the most at the end.

    Where every span between such edges would cut a long skip, more blocks are split.
    """
    total, L = np.concatenate([[0.0], np.cumsum(sensitivity_L)]), len(sensitivity_L)
    edges = [(a, computed - a) for computed in range(count, L + 1) for a in range(computed + 1)]
    whole = [(a, b) for a, b in edges if skips.cut_by(a, L - b) is None]
    fewest = [pair for pair in whole if sum(pair) == sum(whole[0])]
    return max(fewest, key=lambda pair: (total[pair[0]] + total[L] - total[L - pair[1]], pair[1]))


def best_window(sensitivity_L: np.ndarray, width: int, skips: LongSkips = NO_SKIPS) -> tuple[int, int]:
    """First and one past the last of `width` neighbouring blocks of the highest summed sensitivity; of equals, the last.

    Where every such window, or what is left before and after it, would cut a long skip, it is wider.
    """
    total, L = np.concatenate([[0.0], np.cumsum(sensitivity_L)]), len(sensitivity_L)
    windows = [(start, start + size) for size in range(width, L + 1) for start in range(L - size + 1)]
    whole = [w for w in windows if not any(skips.cut_by(a, b) for a, b in itertools.pairwise((0, *w, L)))]
    narrowest = [w for w in whole if w[1] - w[0] == whole[0][1] - whole[0][0]]
    return max(narrowest, key=lambda w: (total[w[1]] - total[w[0]], w[0]))


def top_tokens(importance_N: np.ndarray, count: int) -> tuple[int, ...]:
    """The most important tokens of the image, ascending; of equals, the first."""
    return tuple(sorted(np.argsort(-importance_N, kind="stable")[:count].tolist()))


def _rounded(share: float, total: int) -> int:
    return min(max(round(share * total), 1), total)


def _skip(p: PrunedStep, signature: ModelSignature, scores: Scores, phase: Sequence[int], step: int) -> tuple[Segment, ...]:
    return (skip(0, signature.depth, p.order),)


def _edges(p: PrunedStep, signature: ModelSignature, scores: Scores, phase: Sequence[int], step: int) -> tuple[Segment, ...]:
    L = signature.depth
    sensitivity_L = scores.sensitivity_TL2[list(phase)].sum((0, 2))
    a, b = best_edges(sensitivity_L, _rounded(p.block_share, L), signature.skips)
    return compute(0, a), skip(a, L - b, p.order), compute(L - b, L)


def _branch(p: PrunedStep, signature: ModelSignature, scores: Scores, phase: Sequence[int], step: int) -> tuple[Segment, ...]:
    L = signature.depth
    sensitivity_L2 = scores.sensitivity_TL2[list(phase)].sum(0)
    a, b = best_edges(sensitivity_L2.sum(1), _rounded(p.block_share, L), signature.skips)
    sensitivity_2 = sensitivity_L2[[*range(a), *range(L - b, L)]].sum(0)
    least = (signature.block.names[int(np.argmin(sensitivity_2))],)
    return reuse(0, a, least, p.order), skip(a, L - b, p.order), reuse(L - b, L, least, p.order)


def _partial(p: PrunedStep, signature: ModelSignature, scores: Scores, phase: Sequence[int], step: int) -> tuple[Segment, ...]:
    L, N = signature.depth, signature.image_tokens
    sensitivity_L = scores.sensitivity_TL2[list(phase)].sum((0, 2))
    start, stop = best_window(sensitivity_L, _rounded(p.block_share, L), signature.skips)
    tokens = top_tokens(scores.importance_TLN[step, start:stop].mean(0), _rounded(p.token_share, N))
    kept = partial(start, stop, signature.kept(tokens), p.order, signature.block.names, KV_ORDER)
    return skip(0, start, p.order), kept, skip(stop, L, p.order)


_KINDS: dict[str, Callable[[PrunedStep, ModelSignature, Scores, Sequence[int], int], tuple[Segment, ...]]] = {
    "skip": _skip,
    "edges": _edges,
    "branch": _branch,
    "partial": _partial,
}
KINDS = tuple(_KINDS)
