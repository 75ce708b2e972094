"""What an artefact needs of the machine that it is taken to: a version of onnxruntime, and files however they are laid out."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from artefacts import rewrite_manifest

from export.compiler.symbolic import ONNXRUNTIME
from export.runtime.manifest import ArtefactError, read_manifest
from export.runtime.sampler import CachedSampler

LABELS = [0, 3, 1]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sampler(artefact: Path) -> CachedSampler:
    return CachedSampler(artefact)


def test_an_older_onnxruntime_is_named_before_anything_is_loaded(artefact, tmp_path, monkeypatch):
    copied = Path(shutil.copytree(artefact, tmp_path / "copy"))
    (copied / "step_00.onnx").write_bytes(b"written by a newer onnx")
    needs = read_manifest(artefact, check_files=False)["needs"]
    monkeypatch.setattr(ort, "InferenceSession", None)
    for wanted, found in ((needs["onnxruntime"], "1.24.1"), ("99.1", ort.__version__), ("1.30", "1.29.5"), ("1.24.10", "1.24.9")):
        rewrite_manifest(copied, needs=needs | {"onnxruntime": wanted})
        monkeypatch.setattr(ort, "__version__", found)
        with pytest.raises(ArtefactError, match=rf"needs onnxruntime >= {wanted}, found {found}: update it here") as caught:
            CachedSampler(copied)
        assert "Export it again" not in str(caught.value)


@pytest.mark.parametrize("found", ["1.24.2", "1.24.2.dev20260101", "1.31.0", "2.0"])
def test_a_newer_onnxruntime_will_do(artefact, monkeypatch, found):
    monkeypatch.setattr(ort, "__version__", found)
    assert CachedSampler(artefact, preload=False).manifest["needs"]["onnxruntime"] == "1.24.2"


@pytest.mark.parametrize("needs", [None, [], {}, {"onnxruntime": 1.24}, {"onnxruntime": "new"}, {"onnxruntime": "1" * 5000 + ".0"}])
def test_needs_that_say_nothing(artefact, tmp_path, needs):
    copied = Path(shutil.copytree(artefact, tmp_path / "copy"))
    rewrite_manifest(copied, needs=needs)
    with pytest.raises(ArtefactError, match="does not say which onnxruntime it needs"):
        CachedSampler(copied)


def test_the_package_asks_for_the_onnxruntime_that_its_artefacts_need():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert f"onnxruntime-gpu>={ONNXRUNTIME}" in declared


def test_files_may_be_symbolic_links(artefact, tmp_path, sampler):
    """As model hubs lay them out: a folder of links into one of files that are named by their contents."""
    linked, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    linked.mkdir()
    blobs.mkdir()
    for name, entry in read_manifest(artefact)["files"].items():
        shutil.copy(artefact / name, blobs / entry["sha256"])
        (linked / name).symlink_to(Path("..", "blobs", entry["sha256"]))
    shutil.copy(artefact / "manifest.json", blobs / "manifest")
    (linked / "manifest.json").symlink_to(Path("..", "blobs", "manifest"))
    assert np.array_equal(CachedSampler(linked).sample(LABELS, seed=7).latents, sampler.sample(LABELS, seed=7).latents)
