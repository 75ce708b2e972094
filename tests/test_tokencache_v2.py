from __future__ import annotations

import numpy as np
import pytest
from conftest import SIGNATURE

from tc_lightning.costs import full_step_macs, macs_speedup, selector_macs, step_macs
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import PlanError
from tc_lightning.plan import CachePlan, Guidance, compute, content, partial, skip
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.tokencache_v2 import TokenCacheV2Policy, block_keeps, kept_segments, percentile_steps, tokencache_v2_plan
from tc_lightning.scores import Scores, sampler_digest

T, L, N = 10, 4, 16
SAMPLER, GUIDANCE = make_sampler("ddim", T), Guidance(1.5, 3)


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
    assert kept_segments(scores, 4, [0, 2, 16, 16], 1, 1) == (skip(0, 1, 1), partial(1, 2, (3, 5), 1), compute(2, 4))
    assert kept_segments(scores, 4, [0, 2, 3, 16], 0, 3) == (skip(0, 2), partial(2, 3, (0, 2, 4)), compute(3, 4))
    assert kept_segments(blocks_differ("1" * 64), 4, [5, 2, 0, 0], 2, 1) == (content(0, 1, 5, 2), content(1, 2, 2, 2), skip(2, 4, 2))


def test_plan_of_the_paper() -> None:
    selector = "1" * 64
    arguments = {"full_steps": [0, 4, 7], "total": 4 + 8 + 16}
    plan = tokencache_v2_plan(SIGNATURE, SAMPLER, GUIDANCE, blocks_differ(selector), **arguments)
    pruned = (skip(0, 1), content(1, 2, 4), content(2, 3, 8), compute(3, 4))
    assert plan.full_steps == [0, 4, 7]
    assert {plan.steps[i] for i in range(T) if i not in (0, 4, 7)} == {pruned}
    assert (plan.selector, plan.provenance["policy"]) == (selector, "tokencache_v2")
    everything = full_step_macs(SIGNATURE)
    cheap = step_macs(SIGNATURE, (skip(0, 1), partial(1, 2, range(4)), partial(2, 3, range(8)), compute(3, 4)))
    assert macs_speedup(plan) == pytest.approx(T * everything / (3 * everything + 7 * (cheap + selector_macs(SIGNATURE) / 2)))


def test_no_token_is_chosen_where_none_is_left() -> None:
    plan = tokencache_v2_plan(SIGNATURE, SAMPLER, GUIDANCE, blocks_differ("1" * 64), full_steps=[0], total=16)
    assert plan.steps[1] == (skip(0, 3), compute(3, 4))
    assert plan.selector == ""
    with pytest.raises(PlanError, match="are not for 10 steps, 4 blocks and 16 tokens"):
        tokencache_v2_plan(SIGNATURE, SAMPLER, GUIDANCE, make_scores(np.ones((T, 3, N))), full_steps=[0], total=16)


def context(selector: str = "", wrong: float = 1.0) -> PlanningContext:
    """Errors fall with the share of recomputed tokens."""

    def evaluate(plan: CachePlan, images: int | None) -> float:
        return wrong * sum(step_macs(SIGNATURE, segments) for segments in plan.steps) ** -1.0

    return PlanningContext(SIGNATURE, SAMPLER, GUIDANCE, blocks_differ(selector), evaluate)


@pytest.mark.parametrize(("selector", "target"), [("", 1.8), ("1" * 64, 1.3)])  # a predictor of one block in four is dear
def test_policy_spends_what_the_target_allows(selector: str, target: float) -> None:
    policy = TokenCacheV2Policy(target_speedup=target, full_shares=(0.1, 0.2, 0.3, 0.9), orders=(0, 1), progress=False)
    choice = policy.plan(context(selector))
    assert target <= macs_speedup(choice.plan) < 1.15 * target
    assert bool(choice.plan.selector) == bool(selector)
    assert choice.plan.provenance["scores"] == blocks_differ(selector).digest
    assert [row["chosen"] for row in choice.candidates] == [True] + [False] * (len(choice.candidates) - 1)
    assert all(row["macs_speedup"] >= target for row in choice.candidates)
    assert len(choice.candidates) == 6  # nine full steps of ten are too many
    best = [row["mse"] for row in choice.candidates[:4]]
    assert best == sorted(best)
    assert choice.plan == policy.plan(context(selector)).plan
    more = dict(choice.plan.provenance["arguments"])
    more["total"] += 1
    dearer = tokencache_v2_plan(SIGNATURE, SAMPLER, GUIDANCE, blocks_differ(selector), **more)
    assert macs_speedup(dearer) < target


def test_what_the_policy_refuses() -> None:
    with pytest.raises(
        PlanError, match=r"target_speedup 30 is not reachable with 10 steps of which 1 are full: choose above 1, up to \d"
    ):
        TokenCacheV2Policy(30.0).check(SIGNATURE, SAMPLER)
    for wrong in ({"target_speedup": 1.0}, {"full_shares": ()}, {"full_shares": (1.0,)}, {"orders": (3,)}, {"finalists": 0}):
        with pytest.raises(PlanError):
            TokenCacheV2Policy(**wrong)
    with pytest.raises(PlanError, match="NaN or infinite"):
        TokenCacheV2Policy(1.5, progress=False).plan(context(wrong=float("inf")))
