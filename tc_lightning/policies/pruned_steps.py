"""What a P-step of Two-Phase Round-Robin does: four kinds, filled in from a teacher's scores.

    skip     the residual of all blocks comes from the cache, as one tensor
    edges    the a first and b last blocks are computed, the span between them is skipped
    branch   as edges, but the branch that matters less comes from the cache in the blocks at the edges
    partial  in a window of blocks the tokens that matter most are recomputed, the blocks before and after are skipped

A segment is a contiguous span, so blocks are chosen as edges or windows: the ones whose summed sensitivity is highest. Shape
suffixes: T steps, L blocks, 2 branches (attn, mlp), N tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.measure.scores import Scores
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.segments import Segment, compute, partial, reuse, skip
from tc_lightning.plan.signature import ModelSignature


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


def best_edges(sensitivity_L: np.ndarray, count: int) -> tuple[int, int]:
    """Split `count` blocks into a first and b last ones of the highest summed sensitivity; of equals, the most at the end."""
    total = np.concatenate([[0.0], np.cumsum(sensitivity_L)])
    L = len(sensitivity_L)
    start = max(range(count + 1), key=lambda a: (total[a] + total[L] - total[L - count + a], -a))
    return start, count - start


def best_window(sensitivity_L: np.ndarray, width: int) -> tuple[int, int]:
    """First and one past the last of `width` neighbouring blocks of the highest summed sensitivity; of equals, the last."""
    total = np.concatenate([[0.0], np.cumsum(sensitivity_L)])
    start = max(range(len(sensitivity_L) - width + 1), key=lambda s: (total[s + width] - total[s], s))
    return start, start + width


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
    a, b = best_edges(sensitivity_L, _rounded(p.block_share, L))
    return compute(0, a), skip(a, L - b, p.order), compute(L - b, L)


def _branch(p: PrunedStep, signature: ModelSignature, scores: Scores, phase: Sequence[int], step: int) -> tuple[Segment, ...]:
    L = signature.depth
    sensitivity_L2 = scores.sensitivity_TL2[list(phase)].sum(0)
    a, b = best_edges(sensitivity_L2.sum(1), _rounded(p.block_share, L))
    sensitivity_2 = sensitivity_L2[[*range(a), *range(L - b, L)]].sum(0)
    least = (signature.block.names[int(np.argmin(sensitivity_2))],)
    return reuse(0, a, least, p.order), skip(a, L - b, p.order), reuse(L - b, L, least, p.order)


def _partial(p: PrunedStep, signature: ModelSignature, scores: Scores, phase: Sequence[int], step: int) -> tuple[Segment, ...]:
    L, N = signature.depth, signature.image_tokens
    sensitivity_L = scores.sensitivity_TL2[list(phase)].sum((0, 2))
    start, stop = best_window(sensitivity_L, _rounded(p.block_share, L))
    tokens = top_tokens(scores.importance_TLN[step, start:stop].mean(0), _rounded(p.token_share, N))
    kept = partial(start, stop, signature.kept(tokens), p.order, signature.block.names)
    return skip(0, start, p.order), kept, skip(stop, L, p.order)


_KINDS: dict[str, Callable[[PrunedStep, ModelSignature, Scores, Sequence[int], int], tuple[Segment, ...]]] = {
    "skip": _skip,
    "edges": _edges,
    "branch": _branch,
    "partial": _partial,
}
KINDS = tuple(_KINDS)
