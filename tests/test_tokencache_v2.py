from __future__ import annotations

import numpy as np
import pytest
from conftest import SIGNATURE, VP, vp_sampler

from tc_lightning.errors import PlanError
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs, macs_speedup, selector_macs, step_macs
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, content, partial, skip
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.tokencache_v2 import TokenCacheV2Policy, block_keeps, kept_segments, percentile_steps

T, L, N = 10, 4, 16
SAMPLER, GUIDANCE = vp_sampler("ddim", T), Guidance(1.5, 3)


def by_step(*values: float) -> np.ndarray:
    """Importances that are equal within a step."""
    return np.broadcast_to(np.array(values)[:, None, None], (len(values), 2, 3))


def make_scores(importance_TLN: np.ndarray, selector: str = "") -> Scores:
    sensitivity = np.zeros((*importance_TLN.shape[:2], 2))
    return Scores(importance_TLN, sensitivity, SIGNATURE.teacher, sampler_digest(SAMPLER), selector=selector)


def blocks_differ(selector: str = "") -> Scores:
    """Block 0 wants nothing, block 1 a quarter of its tokens, block 2 half, block 3 everything; step 0 is all ones."""
    importance = np.full((T, L, N), 0.1)
    importance[:, 1, [3, 5, 7, 11]] = 0.8
    importance[:, 2, ::2] = 0.9
    importance[:, 3] = 1.0
    importance[0] = 1.0
    return make_scores(importance, selector)


def test_full_steps_stand_at_equal_percentiles_by_hand() -> None:
    assert percentile_steps(by_step(1, *[0.5] * 9), 5) == [0, 2, 4, 6, 8]  # 4.5 in all; 0.9, 1.8, 2.7, 3.6 are first reached there
    assert percentile_steps(by_step(1, 0.1, 0.1, 0.1, 0.1, 0.4, 0.4, 0.4, 0.4), 4) == [
        0,
        5,
        6,
        7,
    ]  # 2.0: 0.5, 1.0, 1.5 of 0.8, 1.2, 1.6
    assert percentile_steps(by_step(1, 0.2, 0.2, 0.2, 0.2), 2) == [0, 2]  # exactly half is reached
    assert percentile_steps(by_step(1, 0.0, 0.0, 1.0, 0.0), 4) == [0, 3]  # one step takes all percentiles
    assert percentile_steps(by_step(1, 0.3, 0.3), 1) == [0]


def test_a_global_budget_splits_into_block_shares_by_hand() -> None:
    importance = np.array([[0.9, 0.1, 0.8], [0.3, 0.2, 0.7], [0.6, 0.6, 0.6]])
    assert block_keeps(importance, 0) == [0, 0, 0]
    assert block_keeps(importance, 3) == [2, 1, 0]
    assert block_keeps(importance, 5) == [2, 1, 2]  # of equals, the first
    assert block_keeps(importance, 9) == [3, 3, 3]


def test_segments_of_a_pruned_step() -> None:
    scores = blocks_differ()
    assert kept_segments(SIGNATURE, scores, 4, [0, 2, 16, 16], 1, 1) == (skip(0, 1, 1), partial(1, 2, (3, 5), 1), compute(2, 4))
    assert kept_segments(SIGNATURE, scores, 4, [0, 2, 3, 16], 0, 3) == (skip(0, 2), partial(2, 3, (0, 2, 4)), compute(3, 4))
    assert kept_segments(SIGNATURE, blocks_differ("1" * 64), 4, [5, 2, 0, 0], 2, 1) == (
        content(0, 1, 5, 2),
        content(1, 2, 2, 2),
        skip(2, 4, 2),
    )


def context(scores: Scores, wrong: float = 1.0) -> PlanningContext:
    """Errors fall with the share of recomputed tokens."""

    def evaluate(plan: CachePlan, images: int | None) -> float:
        return wrong / sum(step_macs(SIGNATURE, segments) for segments in plan.steps)

    return PlanningContext(SIGNATURE, VP, SAMPLER, GUIDANCE, scores, SAMPLER, evaluate)


def test_plan_of_the_paper() -> None:
    """Three of ten steps, at equal percentiles; 28 of 64 tokens: 4, 8 and 16 of blocks 1, 2 and 3."""
    selector = "1" * 64
    scores = blocks_differ(selector)
    plan = TokenCacheV2Policy(full_share=0.3, keep_share=28 / 64, kv_order=0).plan(context(scores)).plan
    pruned = (skip(0, 1), content(1, 2, 4), content(2, 3, 8), compute(3, 4))
    assert plan.full_steps == percentile_steps(scores.importance_TLN, 3) == [0, 3, 6]
    assert {plan.steps[i] for i in range(T) if i not in (0, 3, 6)} == {pruned}
    assert (plan.selector, plan.provenance["policy"]) == (selector, "tokencache_v2")
    assert plan.provenance["arguments"]["scores"] == scores.digest
    everything = full_step_macs(SIGNATURE)
    cheap = step_macs(SIGNATURE, (skip(0, 1), partial(1, 2, range(4)), partial(2, 3, range(8)), compute(3, 4)))
    assert macs_speedup(plan) == pytest.approx(T * everything / (3 * everything + 7 * (cheap + selector_macs(SIGNATURE) / 2)))


def test_no_token_is_chosen_where_none_is_left() -> None:
    plan = TokenCacheV2Policy(full_share=0.1, keep_share=0.25).plan(context(blocks_differ("1" * 64))).plan
    assert plan.steps[1] == (skip(0, 3), compute(3, 4))
    assert plan.selector == ""


@pytest.mark.parametrize(("selector", "target"), [("", 1.8), ("1" * 64, 1.3)])  # a predictor of one block in four is dear
def test_policy_spends_what_the_target_allows(selector: str, target: float) -> None:
    policy = TokenCacheV2Policy(target, full_shares=(0.1, 0.2, 0.3, 0.9), orders=(0, 1))
    choice = policy.plan(context(blocks_differ(selector)))
    assert target <= macs_speedup(choice.plan) < 1.15 * target
    assert bool(choice.plan.selector) == bool(selector)
    assert all(row["macs_speedup"] >= target for row in choice.candidates)
    assert len(choice.candidates) == 6  # nine full steps of ten are too many
    errors = [row["mse_screen"] for row in choice.candidates]
    assert errors == sorted(errors)
    arguments, count = choice.plan.provenance["arguments"], len(choice.plan.full_steps)
    more = TokenCacheV2Policy(full_share=count / T, keep_share=arguments["keep_share"] + 1 / (L * N), orders=(arguments["order"],))
    assert macs_speedup(more.plan(context(blocks_differ(selector))).plan) < target


def test_what_the_policy_refuses() -> None:
    with pytest.raises(
        PlanError, match=r"target_speedup 30 is not reachable with tokencache_v2 and 10 steps: choose above 1, up to \d"
    ):
        TokenCacheV2Policy(30.0).check(SIGNATURE, SAMPLER)
    for wrong in ({"target_speedup": 1.0}, {"full_shares": ()}, {"full_shares": (1.0,)}, {"orders": (3,)}, {"keep_share": 1.1}):
        with pytest.raises(PlanError):
            TokenCacheV2Policy(**wrong)
    with pytest.raises(PlanError, match="NaN or infinite"):
        TokenCacheV2Policy(1.5).plan(context(blocks_differ(), wrong=float("inf")))
