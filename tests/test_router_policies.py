from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import SIGNATURE, VP, make_teacher, vp_sampler

from tc_lightning.errors import PlanError
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import block_macs, full_step_macs, plan_macs, step_macs
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, reuse
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.harmonica import HarmoniCaPolicy
from tc_lightning.policies.learning_to_cache import LearningToCachePolicy
from tc_lightning.policies.routers import RouterPolicy, lowest_within_budget, router_steps
from tc_lightning.rollout.evaluation import RolloutEvaluator
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample

T, L, N = 6, SIGNATURE.depth, SIGNATURE.tokens
SAMPLER, GUIDANCE = vp_sampler("ddim", T), Guidance(1.5, 3)
ROUTER = np.random.default_rng(3).permutation(T * L * 2).reshape(T, L, 2) / (T * L * 2)
ROUTER[0] = 1.0
BRANCH = {branch: block_macs(SIGNATURE, N, (branch,)) for branch in ("attn", "mlp")}


def context(router: np.ndarray | None = ROUTER) -> PlanningContext:
    scores = Scores(np.ones((T, L, N)), np.zeros((T, L, 2)), SIGNATURE.teacher, sampler_digest(SAMPLER), router)
    return PlanningContext(SIGNATURE, VP, SAMPLER, GUIDANCE, scores, SAMPLER, lambda plan, images: 0.25)


def router_plan(mask: np.ndarray, signature: ModelSignature = SIGNATURE) -> CachePlan:
    return CachePlan(signature, SAMPLER, GUIDANCE, router_steps(mask), SAMPLER)


def reused(plan: CachePlan) -> np.ndarray:
    """Which branches a plan reuses, [T, L, 2]."""
    mask = np.zeros((T, L, 2), dtype=bool)
    for i, segments in enumerate(plan.steps):
        for segment in segments:
            for branch in segment.branches:
                mask[i, segment.start : segment.stop, ("attn", "mlp").index(branch)] = True
    return mask


def test_neighbouring_blocks_that_reuse_alike_share_a_segment() -> None:
    mask = np.zeros((T, L, 2), dtype=bool)
    mask[2, :2] = True
    mask[3, :, 0] = True
    mask[4, 3, 1] = True
    plan = router_plan(mask)
    assert plan.steps[1] == (compute(0, 4),)
    assert plan.steps[2] == (reuse(0, 2, ("attn", "mlp")), compute(2, 4))
    assert plan.steps[3] == (reuse(0, 4, ("attn",)),)
    assert plan.steps[4] == (compute(0, 3), reuse(3, 4, ("mlp",)))
    assert np.array_equal(reused(plan), mask)


def test_reusing_nothing_is_full_compute_bit_for_bit() -> None:
    teacher = make_teacher()
    signature, x, y = model_signature(teacher), noise_for(0, range(2), teacher), torch.tensor([0, 3])
    nothing = router_plan(np.zeros((T, L, 2), dtype=bool), signature)
    latents = sample(teacher, full_plan(signature, SAMPLER, GUIDANCE), x, y)
    assert torch.equal(sample(teacher, nothing, x, y), latents)
    assert RolloutEvaluator(teacher, x, y, latents)(router_plan(ROUTER < 0.3, signature)) > 0


@pytest.mark.parametrize(("policy", "steps"), [(LearningToCachePolicy(), [1, 3, 5]), (HarmoniCaPolicy(), [1, 2, 3, 4, 5])])
def test_the_published_threshold_decides(policy: RouterPolicy, steps: list[int]) -> None:
    choice = policy.plan(context())
    expected = np.zeros((T, L, 2), dtype=bool)
    expected[steps] = ROUTER[steps] <= 0.1
    assert expected.any()
    assert np.array_equal(reused(choice.plan), expected)
    assert choice.plan.provenance["policy"] == policy.name
    assert choice.plan.provenance["arguments"]["threshold"] == pytest.approx(ROUTER[expected].max())
    assert choice.plan.provenance["arguments"]["scores"] == context().scores.digest
    (row,) = choice.candidates
    assert row["chosen"]
    assert CachePlan.from_json(choice.plan.to_json()) == choice.plan


@pytest.mark.parametrize("target", [1.1, 1.4, 1.7])
@pytest.mark.parametrize("policy", [LearningToCachePolicy, HarmoniCaPolicy])
def test_a_target_reuses_the_lowest_weights_and_no_more_than_it_must(policy: type[RouterPolicy], target: float) -> None:
    mask = reused(policy(target).plan(context()).plan)
    may = policy().may_reuse(T)
    assert not mask[~may].any()
    threshold = ROUTER[mask].max()
    assert np.array_equal(mask, may[:, None, None] & (threshold >= ROUTER))
    budget = T * full_step_macs(SIGNATURE) / target
    assert plan_macs(router_plan(mask)) <= budget
    assert plan_macs(router_plan(mask & (threshold > ROUTER))) > budget


def test_of_equal_weights_the_earlier_are_reused() -> None:
    everything, full = np.ones((T, L, 2), dtype=bool), T * full_step_macs(SIGNATURE)
    for saved, count in ((0, 0), (1, 1), (BRANCH["attn"], 1), (BRANCH["attn"] + 1, 2), (BRANCH["attn"] + BRANCH["mlp"], 2)):
        mask = lowest_within_budget(SIGNATURE, np.ones((T, L, 2)), everything, full - saved)
        assert np.flatnonzero(mask).tolist() == list(range(count))


def test_what_each_method_can_reach() -> None:
    full, none = full_step_macs(SIGNATURE), step_macs(SIGNATURE, (reuse(0, L, ("attn", "mlp")),))
    for policy, may in ((LearningToCachePolicy, 3), (HarmoniCaPolicy, 5)):
        most = T * full / ((T - may) * full + may * none)
        assert full * T / policy().least_macs(SIGNATURE, SAMPLER) == pytest.approx(most)
        policy(most * (1 - 1e-9)).check(SIGNATURE, SAMPLER)
        assert reused(policy(most * (1 - 1e-9)).plan(context()).plan).sum() == may * L * 2
        with pytest.raises(PlanError, match=rf"not reachable with {policy.name} and 6 steps: choose above 1, up to {most:.2f}"):
            policy(most * 1.01).check(SIGNATURE, SAMPLER)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(PlanError, match=r"harmonica: the run has no router: train one with `model\.init_args\.router`"):
        HarmoniCaPolicy().plan(context(None))
    assert "has no router" in (LearningToCachePolicy(1.5).unavailable(context(None)) or "")
    assert "up to 1." in (LearningToCachePolicy(3.0).unavailable(context()) or "")
    assert LearningToCachePolicy(1.2).unavailable(context()) is None
    with pytest.raises(PlanError, match="asks for nothing"):
        HarmoniCaPolicy(1.0)
    with pytest.raises(PlanError, match="threshold 1"):
        LearningToCachePolicy(threshold=1.0)
