"""The teacher that ships: it loads, and what it draws is what was asked for.

TC_TEACHER_SAMPLES=1000 pytest tests/test_digits_teacher.py runs the check at the size that the card reports (4 minutes on 2 cores).
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

SAMPLES = int(os.environ.get("TC_TEACHER_SAMPLES", "200"))
PATH = "data/digits_dit.safetensors"


@pytest.fixture(scope="module")
def teacher() -> DiT:
    return load_teacher(TeacherSpec(PATH))


def test_it_is_small_deep_and_described(teacher: DiT) -> None:
    assert (ROOT / PATH).stat().st_size <= 12e6
    assert teacher.config.depth >= 12
    assert teacher.config.num_tokens >= 64
    card = (ROOT / "data" / "digits_dit.md").read_text(encoding="utf-8")
    assert model_signature(teacher).teacher in card


def test_its_guided_samples_are_recognised(teacher: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = load_digits(teacher.config.input_size)
    half = len(images) // 2
    judge = SVC(C=10.0)  # held out, it must itself be good enough to judge
    flat = images.flatten(1).numpy()
    assert judge.fit(flat[:half], labels[:half]).score(flat[half:], labels[half:]) > 0.93
    judge.fit(flat, labels)
    plan = full_plan(model_signature(teacher), make_sampler("ddim", 50), Guidance(1.5, 1))
    asked = torch.arange(SAMPLES) % 10
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    drawn = [
        sample(teacher, plan, noise_for(2024, range(i, min(i + 50, SAMPLES)), teacher), asked[i : i + 50])
        for i in range(0, SAMPLES, 50)
    ]
    torch.set_num_threads(threads)
    recognised = judge.predict(torch.cat(drawn).clamp(-1, 1).flatten(1).numpy())
    assert (recognised == asked.numpy()).mean() >= 0.95
