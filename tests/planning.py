"""What the tests of the planner share: a tiny teacher, a target, and a bench at which recipes are tried."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import VP, make_teacher, vp_sampler

from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.dit import DiT
from tc_lightning.plan.guidance import Guidance
from tc_lightning.planner.image_choice import images
from tc_lightning.planner.price import macs_price
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.planner.trials import TrialRunner
from tc_lightning.policies.subject import Subject
from tc_lightning.rollout.ranks import ALONE
from tc_lightning.rollout.sampling import model_signature

GUIDANCE = Guidance(1.5, 3)
STEPS = 12


@pytest.fixture(scope="module")
def model() -> DiT:
    return make_teacher(depth=2)


@pytest.fixture(scope="module")
def target(model: DiT) -> TargetRun:
    return run_target(model, vp_sampler("ddim", STEPS), GUIDANCE, *images(model, list(range(8))), batch=4)


def make_scores(model: DiT, steps: int = STEPS) -> Scores:
    L, N = model.config.depth, model.config.num_tokens
    importance = np.linspace(0, 1, steps * L * N).reshape(steps, L, N)
    sensitivity = np.ones((steps, L, 2))
    importance[0], sensitivity[0] = 1, 0
    return Scores(importance, sensitivity, model_signature(model).teacher, sampler_digest(vp_sampler("ddim", steps)))


@pytest.fixture(scope="module")
def subject(model: DiT) -> Subject:
    table = vp_sampler("ddim", STEPS)
    return Subject(model_signature(model), VP, table, GUIDANCE, make_scores(model), table)


@pytest.fixture
def bench(model: DiT, subject: Subject, target: TargetRun) -> TrialRunner:
    return TrialRunner(model, subject, macs_price, target, 4, ALONE)
