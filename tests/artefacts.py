"""What the tests of the runtime share: loaded artefacts, copies that may be damaged, and manifests rewritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FULL, make_plan, make_teacher

from export.compiler.compile import export_artefact
from export.runtime.manifest import _self_digest, read_manifest
from export.runtime.sampler import CachedSampler
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import skip

LABELS = [0, 3, 1]


@pytest.fixture(scope="session")
def sampler(artefact: Path) -> CachedSampler:
    """A loaded artefact; tests must not change its manifest."""
    return CachedSampler(artefact)


@pytest.fixture(scope="session")
def unguided(tmp_path_factory) -> Path:
    """Without guidance, three channels, two of three steps skipped."""
    out = tmp_path_factory.mktemp("artefacts") / "unguided"
    teacher = make_teacher(in_channels=3, output="pixels")
    plan = make_plan(teacher, (FULL, (skip(0, 4),), (skip(0, 4),)), Guidance())
    export_artefact(teacher, plan, out, "fp32", "cpu", images=1, report=lambda _: None)
    return out


@pytest.fixture
def copied(artefact: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(artefact, tmp_path / "copy"))


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b))


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """With a digest of its own that fits, as a careless tool would."""
    manifest = read_manifest(folder, check_files=False) | changes
    manifest["sha256"] = _self_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
