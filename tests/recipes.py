"""What the tests of policies share: the shape of DiT-XL/2, scores, and a context in which nothing can be measured."""

from __future__ import annotations

import numpy as np
from conftest import VP, signature_for, vp_sampler

from tc_lightning.measure.calibration import Calibration
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.dit import preset
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext, Policy

XL = signature_for(preset("DiT-XL/2"))


def some_scores(signature: ModelSignature, sampler: SamplerTable) -> Scores:
    rng = np.random.default_rng(0)
    sensitivity = rng.random((len(sampler), signature.depth, 2))
    sensitivity[0] = 0.0
    importance, router = (rng.random((len(sampler), signature.depth, n)) for n in (signature.tokens, 2))
    router[0] = 1.0
    return Scores(importance, sensitivity, signature.teacher, sampler_digest(sampler), router)


def xl_context(num_steps: int = 50, drift_TG2: np.ndarray | None = None) -> PlanningContext:
    """A context in which nothing can be measured but a given drift."""
    num_steps = num_steps if drift_TG2 is None else len(drift_TG2)
    sampler = vp_sampler("ddim", num_steps)

    def evaluate(plan: CachePlan, images: int | None) -> float:
        assert "eps_scale" in plan.provenance["arguments"], "a recipe without a free parameter has nothing to compare"
        return float(bool(plan.eps_scale))

    def given() -> Calibration:
        assert drift_TG2 is not None
        T, G = drift_TG2.shape[:2]
        return Calibration(drift_TG2[:, :, None], np.zeros((T, G, G, 3)), np.ones(T), XL.teacher, sampler_digest(sampler))

    return PlanningContext(XL, VP, sampler, Guidance(1.5, 3), some_scores(XL, sampler), sampler, evaluate, calibrate=given)


def published(policy: Policy, num_steps: int = 50) -> CachePlan:
    return policy.plan(xl_context(num_steps)).plan
