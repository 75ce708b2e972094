"""The digits teachers that ship: they load, and what they draw is what was asked for.

TC_TEACHER_SAMPLES=1000 pytest tests/test_digits_teacher.py runs the check of the cards: 50 steps (some 8 minutes of one core each).
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from data.captions import CAPTIONS
from data.digits import load_digits
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.models.checkpoints import ROOT, TeacherSpec, load_teacher
from tc_lightning.models.conditions import Given, drawn_given
from tc_lightning.models.network import Network
from tc_lightning.plan.guidance import Guidance
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample

ASKED_FOR = os.environ.get("TC_TEACHER_SAMPLES")
SAMPLES = int(ASKED_FOR or 200)
PATHS = {  # and the sampler that their cards name
    "data/digits_dit.safetensors": "ddim",
    "data/digits_sit.safetensors": "euler",
    "data/digits_captions.safetensors": "ddim",
}
DEPTH = {"data/digits_captions.safetensors": 8}  # of those that have not 12
FLOOR = {"data/digits_captions.safetensors": 0.9}  # of samples that are recognised, where it is not 0.95


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def teacher(path: str) -> Network:
    rows = path.replace(".safetensors", ".npz")
    return load_teacher(TeacherSpec(path, conditions=rows if (ROOT / rows).exists() else None))


def asked(teacher: Network, path: str) -> tuple[Given, np.ndarray]:
    """Conditions of all samples, and the digits that they ask for."""
    digits = list(CAPTIONS.values()) if teacher.examples else list(range(10))
    table = teacher.examples or {"label": np.arange(10)}
    return drawn_given(teacher.conditions, 0, range(SAMPLES), table), np.array(digits)[np.arange(SAMPLES) % len(digits)]


def test_it_is_small_deep_and_described(teacher: Network, path: str) -> None:
    assert (ROOT / path).stat().st_size <= 9e6
    assert teacher.config.depth >= DEPTH.get(path, 12)
    assert teacher.config.num_tokens >= 64
    card = (ROOT / path).with_suffix(".md").read_text(encoding="utf-8")
    assert model_signature(teacher).teacher in card


def test_its_guided_samples_are_recognised(teacher: Network, path: str) -> None:
    images, labels = load_digits(teacher.config.input_size)
    half = len(images) // 2
    judge = SVC(C=10.0)  # held out, it must itself be good enough to judge
    flat = images.flatten(1).numpy()
    assert judge.fit(flat[:half], labels[:half]).score(flat[half:], labels[half:]) > 0.93
    judge.fit(flat, labels)
    schedule = teacher.schedule
    sampler = make_sampler(schedule, PATHS[path], 50) if ASKED_FOR else make_sampler(schedule, "dpmpp_2m", 10, "logsnr")
    plan = full_plan(model_signature(teacher), sampler, Guidance(1.5, 1))
    given, digits = asked(teacher, path)
    drawn = [
        sample(teacher, plan, noise_for(2024, range(i, min(i + 50, SAMPLES)), teacher), given.part(slice(i, i + 50)))
        for i in range(0, SAMPLES, 50)
    ]
    recognised = judge.predict(torch.cat(drawn).clamp(-1, 1).flatten(1).numpy())
    assert (recognised == digits).mean() >= FLOOR.get(path, 0.95)
