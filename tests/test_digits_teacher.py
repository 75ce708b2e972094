"""The digits teachers that ship: they load, and what they draw is what was asked for.

TC_TEACHER_SAMPLES=1000 pytest tests/test_digits_teacher.py runs the check of the cards: 50 steps (some 8 minutes of one core each).
"""

from __future__ import annotations

import os

import pytest
import torch
from sklearn.svm import SVC

from data.digits import load_digits
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.models.checkpoints import ROOT, TeacherSpec, load_teacher
from tc_lightning.models.dit import DiT
from tc_lightning.plan.guidance import Guidance
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample

ASKED_FOR = os.environ.get("TC_TEACHER_SAMPLES")
SAMPLES = int(ASKED_FOR or 200)
PATHS = {"data/digits_dit.safetensors": "ddim", "data/digits_sit.safetensors": "euler"}  # and the sampler that their cards name


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def teacher(path: str) -> DiT:
    return load_teacher(TeacherSpec(path))


def test_it_is_small_deep_and_described(teacher: DiT, path: str) -> None:
    assert (ROOT / path).stat().st_size <= 9e6
    assert teacher.config.depth >= 12
    assert teacher.config.num_tokens >= 64
    card = (ROOT / path).with_suffix(".md").read_text(encoding="utf-8")
    assert model_signature(teacher).teacher in card


def test_its_guided_samples_are_recognised(teacher: DiT, path: str) -> None:
    images, labels = load_digits(teacher.config.input_size)
    half = len(images) // 2
    judge = SVC(C=10.0)  # held out, it must itself be good enough to judge
    flat = images.flatten(1).numpy()
    assert judge.fit(flat[:half], labels[:half]).score(flat[half:], labels[half:]) > 0.93
    judge.fit(flat, labels)
    schedule = teacher.schedule
    sampler = make_sampler(schedule, PATHS[path], 50) if ASKED_FOR else make_sampler(schedule, "dpmpp_2m", 10, "logsnr")
    plan = full_plan(model_signature(teacher), sampler, Guidance(1.5, 1))
    asked = torch.arange(SAMPLES) % 10
    drawn = [
        sample(teacher, plan, noise_for(2024, range(i, min(i + 50, SAMPLES)), teacher), asked[i : i + 50])
        for i in range(0, SAMPLES, 50)
    ]
    recognised = judge.predict(torch.cat(drawn).clamp(-1, 1).flatten(1).numpy())
    assert (recognised == asked.numpy()).mean() >= 0.95
