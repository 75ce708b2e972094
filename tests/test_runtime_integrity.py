"""Artefacts that were damaged or edited are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from artefacts import rewrite_manifest

from export.runtime.manifest import ArtefactError, read_manifest
from export.runtime.sampler import CachedSampler


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["weights.data", "condition.onnx", "step_00.onnx", "step_full.onnx", "plan.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip_a_bit, "is damaged: its sha256"), (truncate, "it is truncated or replaced"), (Path.unlink, "is missing")],
)
def test_damaged_files_are_named(copied, name, damage: Callable[[Path], None], message):
    damage(copied / name)
    with pytest.raises(ArtefactError, match=f"{name} .*{message}|{name} {message}") as caught:
        CachedSampler(copied)
    assert "Export it again" in str(caught.value)


def test_no_manifest(copied, tmp_path):
    (copied / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match=r"holds no manifest\.json"):
        CachedSampler(copied)
    with pytest.raises(ArtefactError, match="nowhere does not exist"):
        CachedSampler(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[]", "is not of format version 7"),
        ('{"format_version": 6}', "is not of format version 7"),
        ('{"format_version": 7}', "was edited or damaged"),
        ('{"format_version": true}', "is not of format version 7"),
        ('{"format_version": 8}', "is of format version 8, which is newer than this package's 7: update tc-lightning"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_damaged_manifest(copied, text, message):
    (copied / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtefactError, match=rf"manifest\.json {message}"):
        CachedSampler(copied)


@pytest.mark.parametrize("files", [[], None, {}, {"weights.data": 3}, {"weights.data": {"bytes": 1}}])
def test_damaged_file_list(copied, files):
    """A list that leaves out a file would leave it unchecked."""
    rewrite_manifest(copied, files=files)
    with pytest.raises(ArtefactError, match=r"manifest\.json"):
        CachedSampler(copied)


@pytest.mark.parametrize("name", ["weights.data", "condition.onnx", "step_00.onnx", "plan.json"])
def test_a_file_that_is_not_listed_is_not_trusted(copied, name):
    files = read_manifest(copied)["files"]
    del files[name]
    rewrite_manifest(copied, files=files)
    with pytest.raises(ArtefactError, match=rf"manifest\.json.*{name}"):
        CachedSampler(copied)


def test_edited_manifest_is_refused(copied):
    text = (copied / "manifest.json").read_text(encoding="utf-8")
    (copied / "manifest.json").write_text(text.replace('"steps": 8', '"steps": 7'), encoding="utf-8")
    with pytest.raises(ArtefactError, match="was edited or damaged"):
        CachedSampler(copied)
