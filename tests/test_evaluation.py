from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import vp_sampler

from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.models.conditions import Given
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, skip
from tc_lightning.rollout.evaluation import BATCH, RolloutEvaluator, final_latents
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample

CONFIG = DiTConfig(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=3, num_heads=2, num_classes=5, learn_sigma=False)
GUIDANCE = Guidance(1.5, 2)
SAMPLER = vp_sampler("ddim", 4)
IMAGES = BATCH + 3


@pytest.fixture(scope="module")
def model() -> DiT:
    return randomise_(DiT(CONFIG), seed=0, std=0.1).eval()


@pytest.fixture(scope="module")
def evaluator(model: DiT) -> RolloutEvaluator:
    x_T, labels = noise_for(0, range(IMAGES), model), torch.arange(IMAGES) % 5
    return RolloutEvaluator(model, x_T, labels, sample(model, full_plan(model_signature(model), SAMPLER, GUIDANCE), x_T, labels))


def caching_plan(model: DiT, signature_changes: dict[str, str] | None = None) -> CachePlan:
    signature = dataclasses.replace(model_signature(model), **(signature_changes or {}))
    full, skipped = (compute(0, 3),), (skip(0, 3),)
    return CachePlan(signature, SAMPLER, GUIDANCE, (full, skipped, full, skipped), SAMPLER)


def test_full_compute_has_no_error_but_rounding(model: DiT, evaluator: RolloutEvaluator):
    assert evaluator(full_plan(model_signature(model), SAMPLER, GUIDANCE)) < 1e-10


def test_errors_are_those_of_the_first_images_whatever_the_batches(model: DiT, evaluator: RolloutEvaluator):
    plan = caching_plan(model)
    x_0 = sample(model, plan, evaluator.x_T, evaluator.given)  # all in one batch
    expected_B = (x_0 - evaluator.x_0).square().mean((1, 2, 3))
    assert expected_B.min() > 1e-8  # caching did something
    torch.testing.assert_close(evaluator.mse_per_image(plan), expected_B, rtol=1e-3, atol=1e-9)
    assert evaluator(plan, 2) == pytest.approx(expected_B[:2].mean().item(), rel=1e-3)


def test_more_images_than_there_are_means_all(model: DiT, evaluator: RolloutEvaluator):
    assert evaluator(caching_plan(model), IMAGES + 1) == evaluator(caching_plan(model))


def test_a_plan_that_diverges_scores_infinity(model: DiT, evaluator: RolloutEvaluator):
    steps = list(SAMPLER.steps)
    steps[2] = dataclasses.replace(steps[2], next_x=1e38, next_m=1e38)
    sampler = dataclasses.replace(SAMPLER, steps=tuple(steps))
    assert evaluator(full_plan(model_signature(model), sampler, GUIDANCE)) == math.inf


def test_mistakes_are_not_taken_for_divergence(model: DiT, evaluator: RolloutEvaluator):
    x_T, labels, x_0 = evaluator.x_T, evaluator.given, evaluator.x_0
    with pytest.raises(PlanError, match="another model"):
        evaluator(caching_plan(model, {"family": "other"}))
    with pytest.raises(TokenCacheError, match="ddpm"):
        evaluator(full_plan(model_signature(model), vp_sampler("ddpm", 4), GUIDANCE))
    with pytest.raises(TokenCacheError, match="out of range"):
        RolloutEvaluator(model, x_T, Given({"label": labels["label"] + 5}), x_0)
    with pytest.raises(TokenCacheError, match="same images"):
        RolloutEvaluator(model, x_T, labels.part(slice(3)), x_0)
    with pytest.raises(TokenCacheError, match="NaN"):
        RolloutEvaluator(model, x_T, labels, x_0 * torch.nan)


def test_no_batch_is_larger_than_was_asked_for(model: DiT, evaluator: RolloutEvaluator, monkeypatch: pytest.MonkeyPatch):
    """Images of a large set go through the model in parts, and what they become does not depend on it."""
    plan, seen = caching_plan(model), []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda x, start: (seen.append(len(x)), embed(x, start))[1])
    steps: list[int] = []
    parts = final_latents(model, plan, evaluator.x_T, evaluator.given, batch=4, on_step=steps.append)
    assert max(seen) == 2 * 4  # both halves of guidance
    assert sum(steps) == IMAGES * plan.num_steps
    whole = sample(model, plan, evaluator.x_T, evaluator.given)
    assert torch.allclose(parts, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
