"""`run.json`: what it names holds wherever it is read, and what is wrong with it is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tc_lightning.errors import RunError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, save_teacher, teacher_digest
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.runs.folder import read_run, write_run

TINY = DiTConfig(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=1, num_classes=2)


def test_the_teacher_is_found_from_another_working_directory(tmp_path, monkeypatch):
    model, elsewhere = randomise_(DiT(TINY), seed=0), tmp_path / "elsewhere"
    save_teacher(model, tmp_path / "models" / "tiny.safetensors")
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    write_run(Path(), "tiny", TeacherSpec("models/tiny.safetensors"), teacher_digest(model))
    monkeypatch.chdir(elsewhere)
    assert teacher_digest(load_teacher(read_run(Path("..")).teacher)) == teacher_digest(model)


def test_the_home_folder_is_found_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny.pt").touch()
    write_run(tmp_path, "tiny", TeacherSpec("~/tiny.pt"), "")
    assert read_run(tmp_path).teacher.weights == str(tmp_path / "tiny.pt")


def test_a_teacher_of_the_repository_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "digits", TeacherSpec("data/digits_dit.safetensors"), "")
    assert load_teacher(read_run(tmp_path).teacher).config.num_classes == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format version 3 is not 2"),
        ({"format_version": True}, "format version True is not 2"),
        ({"purpose": "play"}, "purpose 'play' is none of fit, ablation"),
        ({"name": ".."}, "name is '..'; it must be a plain name"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"name": ""}, "name is ''"),
        ({"name": None}, "name is None"),
        ({"plan": "../plan.json"}, "plan is '../plan.json'"),
        ({"scores": 3}, "scores is 3"),
        ({"content": "\0"}, "content is "),
        ({"teacher_digest": 3}, "teacher_digest is 3"),
        ({"teacher": "digits"}, "teacher: expected an object, found str"),
        ({"teacher": {"weights": "w"}}, "teacher: missing dit, input_size, preset"),
        ({"teacher": {"weights": "w", "preset": 3, "dit": None, "input_size": None}}, "teacher.preset is 3"),
        ({"teacher": {"weights": "", "preset": None, "dit": None, "input_size": None}}, "teacher.weights is ''"),
        ({"teacher": {"weights": "w", "preset": None, "dit": {}, "input_size": None}}, "teacher.dit: missing depth"),
    ],
)
def test_listings_that_are_refused(tmp_path, change, message):
    write_run(tmp_path, "tiny", TeacherSpec("w"), "0" * 64)
    raw = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    (tmp_path / "run.json").write_text(json.dumps(raw | change), encoding="utf-8")
    with pytest.raises(RunError) as caught:
        read_run(tmp_path)
    assert f"{tmp_path / 'run.json'} is damaged ({message}" in str(caught.value)
    assert "): run `lightning fit` again, or name" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("mlp_ratio", 0.0), ("mlp_ratio", float("nan")), ("mlp_norm_eps", -1e-6), ("freq_shift", 128.0)]
)
def test_shapes_that_no_model_has(tmp_path, name, value):
    spec = TeacherSpec("w", dit=TINY)
    write_run(tmp_path, "tiny", spec, "0" * 64)
    raw = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    raw["teacher"]["dit"][name] = value
    (tmp_path / "run.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(RunError, match=f"DiT {name} is {value}"):
        read_run(tmp_path)


def test_every_field_of_a_teacher_comes_back(tmp_path):
    """A field that is written and then refused makes a run that nothing can read."""
    told = {"family": "sd3", "preset": "DiT-S/2", "input_size": 8, "conditions": str(tmp_path / "c.npz"), "text_tokens": 7}
    teacher = TeacherSpec(str(tmp_path / "t.safetensors"), dit=DiTConfig(), **told)
    assert all(getattr(teacher, field.name) is not None for field in dataclasses.fields(teacher))
    (tmp_path / "plan.json").touch()
    (tmp_path / "scores.safetensors").touch()
    write_run(tmp_path, "tiny", teacher, "0" * 64)
    assert read_run(tmp_path).teacher == teacher


@pytest.mark.parametrize("tokens", [0, -3, 2.5, "7", True])
def test_a_number_of_text_tokens_that_cannot_be(tmp_path, tokens):
    write_run(tmp_path, "tiny", TeacherSpec(str(tmp_path / "t.safetensors")), "0" * 64)
    raw = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    raw["teacher"]["text_tokens"] = tokens
    (tmp_path / "run.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(RunError, match="text_tokens"):
        read_run(tmp_path)
