"""The plans that are compared. Within a group they cost the same, the content predictor apart, and differ in one choice.

tokens   which tokens P-steps recompute: those of the predictors, or random ones; and how many in which block
blocks   which blocks P-steps compute: those of high sensitivity, or any others
context  not of equal cost: no tokens at all, and full steps for the price of the tokens

Suffixes: T steps, L blocks, N tokens, B images, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.measure.scores import Scores
from tc_lightning.models.content_predictor import RandomPredictor, Selector
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.segments import Segment, content, partial, skip
from tc_lightning.policies.pruned_steps import best_edges, best_window, top_tokens
from tc_lightning.policies.tokencache_v1 import important_blocks
from tc_lightning.policies.tokencache_v2 import block_keeps, kept_segments
from tc_lightning.runs.ablation.equal_cost import EqualCost, Segments, blocks_computed, without_predictor

GROUPS = ("tokens", "blocks", "context")
EQUAL = 0.005  # largest relative difference of MACs within a group


@dataclasses.dataclass(frozen=True)
class Variant:
    """A plan of the comparison; those of one name are draws of one variant. `selector` chooses its tokens, if they need one."""

    group: str
    name: str
    plan: CachePlan
    selector: Selector | None = None


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a training seed has learned.

    Args:
        v1: importances by step, and sensitivities.
        v2: mean importances of the content predictor.
        selector: the content predictor.
    """

    v1: Scores
    v2: Scores
    selector: Selector


def all_variants(layout: EqualCost, config: Any, learned: Learned, seed: int, draws: int) -> list[Variant]:
    """Everything that is compared for one training seed, each random choice `draws` times.

    Raises:
        PlanError: if plans of a group differ in cost.
    """
    found = list(_learned_tokens(layout, learned))
    found += _sensitive_blocks(layout, learned.v1)
    for draw in range(draws):
        found += _random_tokens(layout, config, learned, [seed, draw])
        found += _random_blocks(layout, [seed, draw])
    require_equal_cost(found)
    found += _context(layout, without_predictor(found[0].plan))
    return found


def require_equal_cost(variants: Sequence[Variant]) -> None:
    """Check that the plans of each group cost the same.

    Raises:
        PlanError: naming two that don't.
    """
    for group in GROUPS:
        costs = sorted((without_predictor(v.plan), v.name) for v in variants if v.group == group)
        if costs and costs[-1][0] > costs[0][0] * (1 + EQUAL):
            (least, cheap), (most, dear) = costs[0], costs[-1]
            raise PlanError(
                f"{dear!r} and {cheap!r} are to be compared at equal cost, and take {most:.4g} and {least:.4g} MACs. "
                "Choose shares that are whole numbers of tokens and blocks."
            )


def _learned_tokens(layout: EqualCost, learned: Learned) -> Iterator[Variant]:
    v1, v2, digest = learned.v1, learned.v2, learned.selector.digest
    a, b = _window(layout, v1)
    mean_N = v1.importance_TLN[layout.pruned, a:b].mean((0, 1))

    def chosen(name: str, segments: Callable[[int], Segments]) -> Variant:
        return Variant("tokens", name, layout.plan(name, segments, digest), learned.selector)

    def static(scores: Scores) -> Callable[[int], Segments]:
        return lambda i: _in_window(layout, v1, _static(layout, v1, scores.importance_TLN[i, a:b].mean(0)))

    yield chosen("v1", static(v1))
    yield chosen("v1, one set for all steps", lambda i: _in_window(layout, v1, _static(layout, v1, mean_N)))
    yield chosen("v2", lambda i: _in_window(layout, v1, _content(layout, v1)))
    yield chosen("v2, mean of images", static(v2))
    for name, scores in (("v1", v1), ("v2", v2)):
        yield chosen(f"{name} by block, even split", _split(layout, scores, _even(layout, v1)))
        yield chosen(f"{name} by block, own split", _split(layout, scores, _own(layout, scores)))
    yield chosen("v2 by block, even but for the last", _split(layout, v2, _even_but_uncached(layout, v2)))


def _random_tokens(layout: EqualCost, config: Any, learned: Learned, seed: Sequence[int]) -> Iterator[Variant]:
    v1, rng = learned.v1, np.random.default_rng([*seed, 0])
    digest = hashlib.sha256(f"random {seed}".encode()).hexdigest()

    def drawn(name: str, segments: Callable[[int], Segments]) -> Variant:
        fresh = RandomPredictor(config, [*seed, 1])  # draws of its own, whatever was evaluated before it
        return Variant("tokens", name, layout.plan(name, segments, digest), Selector(fresh, digest))

    yield drawn("random", lambda i: _in_window(layout, v1, _static(layout, v1, rng.random(config.num_tokens))))
    fixed_N = rng.random(config.num_tokens)
    yield drawn("random, one set for all steps", lambda i: _in_window(layout, v1, _static(layout, v1, fixed_N)))
    yield drawn("random for each image", lambda i: _in_window(layout, v1, _content(layout, v1)))
    by_image = dataclasses.replace(learned.v2, selector=digest)
    yield drawn("random by block, even split", _split(layout, by_image, _even(layout, v1)))
    yield drawn("random by block, v2's split", _split(layout, by_image, _own(layout, learned.v2)))


def _sensitive_blocks(layout: EqualCost, scores: Scores) -> Iterator[Variant]:
    L, count = layout.signature.depth, layout.count
    sensitivity_L = _sensitivity(layout, scores)
    ranked = np.argsort(-sensitivity_L, kind="stable")
    yield _blocks(layout, "sensitive edges", _edges(L, best_edges(sensitivity_L, count)))
    yield _blocks(layout, "sensitive window", range(*best_window(sensitivity_L, count)))
    yield _blocks(layout, "sensitive blocks", ranked[:count].tolist())
    yield _blocks(layout, "least sensitive blocks", ranked[-count:].tolist())
    yield _blocks(layout, "v1's blocks", important_blocks(scores, layout.pruned, count))
    yield _blocks(layout, "evenly spaced blocks", [int((j + 0.5) * L / count) for j in range(count)])


def _random_blocks(layout: EqualCost, seed: Sequence[int]) -> Iterator[Variant]:
    L, count, rng = layout.signature.depth, layout.count, np.random.default_rng([*seed, 2])
    first, start = int(rng.integers(count + 1)), int(rng.integers(L - count + 1))
    yield _blocks(layout, "random edges", _edges(L, (first, count - first)))
    yield _blocks(layout, "random window", range(start, start + count))
    yield _blocks(layout, "random blocks", rng.choice(L, count, replace=False).tolist())


def _context(layout: EqualCost, macs: float) -> Iterator[Variant]:
    skipped = (skip(0, layout.signature.depth, layout.order),)
    yield Variant("context", "no tokens", layout.plan("no tokens", lambda i: skipped))
    full = layout.full_steps_for(macs)
    yield Variant("context", "full steps instead", layout.plan("full steps instead", lambda i: skipped, full=full))


def _blocks(layout: EqualCost, name: str, blocks: Sequence[int]) -> Variant:
    segments = blocks_computed(list(blocks), layout.signature.depth, layout.order)
    return Variant("blocks", name, layout.plan(name, lambda i: segments))


def _edges(depth: int, edges: tuple[int, int]) -> list[int]:
    return [*range(edges[0]), *range(depth - edges[1], depth)]


def _sensitivity(layout: EqualCost, scores: Scores) -> np.ndarray:
    return scores.sensitivity_TL2[layout.pruned].sum((0, 2))


def _window(layout: EqualCost, scores: Scores) -> tuple[int, int]:
    return best_window(_sensitivity(layout, scores), layout.width)


def _static(layout: EqualCost, v1: Scores, importance_N: np.ndarray) -> Segment:
    kept = layout.signature.kept(top_tokens(importance_N, layout.keep))
    return partial(*_window(layout, v1), kept, layout.order, kv_order=layout.kv_order)


def _content(layout: EqualCost, v1: Scores) -> Segment:
    return content(*_window(layout, v1), layout.keep, layout.order, kv_order=layout.kv_order)


def _in_window(layout: EqualCost, v1: Scores, segment: Segment) -> Segments:
    (a, b), L = _window(layout, v1), layout.signature.depth
    return tuple(s for s in (skip(0, a, layout.order), segment, skip(b, L, layout.order)) if s.start < s.stop)


def _split(layout: EqualCost, scores: Scores, keeps: list[int]) -> Callable[[int], Segments]:
    """Every block with a set of its own, of the given size."""
    return lambda i: kept_segments(layout.signature, scores, i, keeps, layout.order, 1, layout.kv_order)


def _even(layout: EqualCost, v1: Scores) -> list[int]:
    a, b = _window(layout, v1)
    return [layout.keep if a <= block < b else 0 for block in range(layout.signature.depth)]


def _own(layout: EqualCost, scores: Scores) -> list[int]:
    """The highest mean scores of all blocks: their number in each (TokenCache v2)."""
    return block_keeps(scores.importance_TLN[layout.pruned].mean(0), layout.keep * layout.width)


def _even_but_uncached(layout: EqualCost, scores: Scores) -> list[int]:
    """As `_own`, but blocks other than those that the predictor leaves uncached share evenly what is left."""
    importance_LN = scores.importance_TLN[layout.pruned].mean(0)
    uncached_L1 = importance_LN.min(1, keepdims=True) == 1.0
    return block_keeps(np.where(uncached_L1, 1.0, -np.arange(importance_LN.shape[1])), layout.keep * layout.width)
