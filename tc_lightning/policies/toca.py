"""ToCa: attention is reused, a share of the tokens is recomputed in the MLPs (Zou et al., arXiv 2410.05317).

The shares and the places of the full steps are the authors' (their code for DiT): more tokens in front blocks than in rear ones, more
at late steps, and full steps that grow denser towards the end. Which tokens is ours: those that the Cache Predictor holds important,
where ToCa scores attention received and age at run time. What a step recomputes serves that step alone.
"""

from __future__ import annotations

from collections.abc import Callable

from tc_lightning.errors import PlanError
from tc_lightning.plan.costs import step_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute, partial, reuse
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.pruned_steps import top_tokens
from tc_lightning.policies.targeted import MAX_INTERVAL, Offer, TargetedPolicy, largest, require_attention

STEP_WEIGHT, BLOCK_WEIGHT, MLP_WEIGHT = 0.4, 0.8, 2.5  # the last holds attention's part, too: there nothing is recomputed
RATIOS = 1000  # fineness of the search for a ratio


class ToCaPolicy(TargetedPolicy):
    """Full steps at intervals that shrink from noise to image; in between, MLPs of the most important tokens.

    With a target, every interval that can reach it is tried, with the largest ratio that does.

    Args:
        target_speedup: in MACs, at least; None takes interval and ratio as they are given.
        interval: nominal distance of full steps (the paper's N; 4 for DiT).
        ratio: nominal share of tokens that are recomputed (0.07 for DiT: "R = 93 %" are cached); 2.5 times as many in MLPs.
        max_interval: largest interval that is tried.
        max_ratio: largest ratio that is tried.
        images: held-out images on which intervals are compared.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "toca"
    cuts = True
    needs = ("importance_TLN",)

    def __init__(
        self,
        target_speedup: float | None = None,
        interval: int = 4,
        ratio: float = 0.07,
        max_interval: int = MAX_INTERVAL,
        max_ratio: float = 0.4,
        images: int = 4,
    ) -> None:
        super().__init__(target_speedup, images)
        if min(interval, max_interval) < 2 or not 0.0 <= ratio <= 1.0 or not 0.0 < max_ratio <= 1.0:
            raise PlanError("intervals must be at least 2, and ratios lie between 0 and 1.")
        self.interval, self.ratio, self.max_interval, self.max_ratio = interval, ratio, max_interval, max_ratio

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """No token, at the largest interval."""
        return _macs(signature, sampler, self.max_interval, 0.0)

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return [_offer(context, self.interval, self.ratio)]

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        offers = []
        for interval in range(2, self.max_interval + 1):
            macs = _macs_of_ratio(context.signature, context.sampler, interval)
            found = largest(macs, 0, round(self.max_ratio * RATIOS), budget)
            if found:  # 0: nothing would be recomputed, which is another method
                offers.append(_offer(context, interval, found / RATIOS))
        return offers or [_offer(context, self.max_interval, 0.0)]


def toca_full_steps(num_steps: int, interval: int) -> list[int]:
    """Full steps of the authors' scheduler, which counts steps down to 0: each sets the divisor of those that follow."""
    full, divisor = [], interval
    for left in range(num_steps - 1, -1, -1):
        if left == num_steps - 1 or left % divisor == 0:
            full.append(num_steps - 1 - left)
            divisor = max(1, round(interval / (1 + STEP_WEIGHT - 2 * STEP_WEIGHT * left / num_steps)))
    return full


def toca_tokens(signature: ModelSignature, num_steps: int, ratio: float, step: int, block: int) -> int:
    """Tokens of the image whose MLP is recomputed in one block of one step, 0 to N."""
    step_factor = 1 + STEP_WEIGHT - 2 * STEP_WEIGHT * (num_steps - 1 - step) / num_steps
    block_factor = 1 + BLOCK_WEIGHT - 2 * BLOCK_WEIGHT * block / max(signature.depth - 1, 1)
    return min(signature.image_tokens, round(ratio * MLP_WEIGHT * step_factor * block_factor * signature.image_tokens))


def _segment(signature: ModelSignature, block: int, tokens: tuple[int, ...]) -> Segment:
    """One block: all branches reused without tokens, attention alone with all of them."""
    if len(tokens) == signature.image_tokens:
        return reuse(block, block + 1, signature.block.attending)
    if tokens:
        return partial(block, block + 1, signature.kept(tokens), 0, signature.block.tokenwise)
    return reuse(block, block + 1, signature.block.names)


def _steps(
    signature: ModelSignature, num_steps: int, interval: int, ratio: float, choose: Callable[[int, int, int], tuple[int, ...]]
) -> tuple[tuple[Segment, ...], ...]:
    """All steps; `choose(step, block, count)` names tokens."""
    require_attention(signature, "toca")
    full = set(toca_full_steps(num_steps, interval))

    def pruned(i: int) -> tuple[Segment, ...]:
        counts = [toca_tokens(signature, num_steps, ratio, i, b) for b in range(signature.depth)]
        return tuple(_segment(signature, b, choose(i, b, count)) for b, count in enumerate(counts))

    return tuple((compute(0, signature.depth),) if i in full else pruned(i) for i in range(num_steps))


def _macs(signature: ModelSignature, sampler: SamplerTable, interval: int, ratio: float) -> float:
    steps = _steps(signature, len(sampler), interval, ratio, lambda i, b, count: tuple(range(count)))
    return sum(step_macs(signature, segments) for segments in steps)


def _macs_of_ratio(signature: ModelSignature, sampler: SamplerTable, interval: int) -> Callable[[int], float]:
    return lambda thousandths: _macs(signature, sampler, interval, thousandths / RATIOS)


def _offer(context: PlanningContext, interval: int, ratio: float) -> Offer:
    def choose(step: int, block: int, count: int) -> tuple[int, ...]:
        return top_tokens(context.scores.importance_TLN[step, block], count)

    steps = _steps(context.signature, len(context.sampler), interval, ratio, choose)
    return Offer(steps, {"interval": interval, "ratio": ratio, **context.scores.provenance([0])})
