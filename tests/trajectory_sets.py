"""What the tests of trajectories share: a tiny teacher, and a set that it recorded."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import vp_sampler

from data.recording import prepare, record
from data.shards import SetOrigin
from tc_lightning.models.checkpoints import teacher_digest
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.plan.guidance import Guidance

CPU = torch.device("cpu")
STEPS = 4
GUIDANCE = Guidance(1.5, 1)


def tiny_teacher(seed: int = 0) -> DiT:
    config = DiTConfig(8, 2, 2, 32, 2, 2, num_classes=5, learn_sigma=False)
    return randomise_(DiT(config), seed).eval().requires_grad_(False)


def recipe_for(teacher: DiT, seed: int = 0, sampler: str = "ddim", steps: int = STEPS) -> SetOrigin:
    return SetOrigin(teacher_digest(teacher), vp_sampler(sampler, steps), GUIDANCE, seed, (2, 8, 8), teacher.conditions)


def record_set(root: Path, num: int = 40) -> tuple[DiT, SetOrigin]:
    teacher = tiny_teacher()
    recipe = recipe_for(teacher)
    prepare(root, recipe, num)
    record(root, recipe, teacher, num, CPU)
    return teacher, recipe


def contents(root: Path) -> dict[str, str]:
    """sha256 of every file, hidden ones included."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.iterdir())}


def full_disk(fd: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    record_set(root)
    return root


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))
