"""Run folders: what `lightning fit` leaves behind, and how the exporter finds it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tc_lightning.atomic import write_atomically
from tc_lightning.errors import RunError, TokenCacheError
from tc_lightning.models.checkpoints import TeacherSpec
from tc_lightning.models.dit import DiTConfig
from tc_lightning.plan_json import check_keys, from_fields, is_int, is_name, shown

FORMAT_VERSION = 1
NAME = "run.json"
CONTENT = "content.safetensors"


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: where it is.
        name: its name, for example `digits`.
        teacher: the teacher that it used; a path to its weights holds wherever the run is read from.
        teacher_digest: sha256 of that teacher's weights.
        plan: path of the plan.
        scores: path of the scores.
        content: path of the content predictor; None if there is none.
    """

    folder: Path
    name: str
    teacher: TeacherSpec
    teacher_digest: str
    plan: Path
    scores: Path
    content: Path | None = None


def write_run(folder: Path, name: str, teacher: TeacherSpec, teacher_digest: str, content: bool = False) -> None:
    """Write `run.json`, atomically and last: a folder that has one is complete; `content` says that it holds a content predictor."""
    listing = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "teacher": dataclasses.asdict(teacher) | {"weights": _anywhere(teacher.weights)},
        "teacher_digest": teacher_digest,
        "plan": "plan.json",
        "scores": "scores.safetensors",
    } | ({"content": CONTENT} if content else {})
    write_atomically(folder / NAME, json.dumps(listing, indent=1).encode())


def _anywhere(weights: str) -> str:
    """A path that another working directory does not change; what is not in this one is found in the repository from all."""
    here = Path(weights).expanduser().absolute()
    return str(here) if here.exists() else weights


def find_run(root: Path) -> Path:
    """The newest finished run under a folder.

    Raises:
        RunError: if there is none.
    """
    found = sorted(root.rglob(NAME), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RunError(
            f"no finished run under {root.resolve()}: run `lightning fit -c lightning_configs/digits.yaml` there first, "
            "or name a run folder with --run."
        )
    return found[-1].parent


def read_run(folder: Path) -> Run:
    """Read `run.json`.

    Raises:
        RunError: if the folder is not a finished run, or its `run.json` is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise RunError(f"{folder} is not a finished run: it holds no {NAME}. Name the folder that `lightning fit` printed.")
    try:
        return _run_from_json(json.loads(path.read_text(encoding="utf-8")), folder)
    except (OSError, ValueError, RecursionError, TokenCacheError) as error:
        raise RunError(f"{path} is damaged ({str(error).rstrip('.')}): run `lightning fit` again.") from error


def _run_from_json(raw: Any, folder: Path) -> Run:
    check_keys(raw, {"format_version", "name", "teacher", "teacher_digest", "plan", "scores"}, {"content"}, "run")
    if not is_int(raw["format_version"]) or raw["format_version"] != FORMAT_VERSION:
        raise RunError(f"format version {shown(raw['format_version'])} is not {FORMAT_VERSION}")
    if not is_name(raw["teacher_digest"]):
        raise RunError(f"teacher_digest is {shown(raw['teacher_digest'])}; a sha256 was expected")
    for key in ("name", "plan", "scores", "content"):
        if key in raw and not _is_file_name(raw[key]):
            raise RunError(f"{key} is {shown(raw[key])}; it must be a plain name")
    content = folder / raw["content"] if "content" in raw else None
    teacher = _teacher(raw["teacher"])
    return Run(folder, raw["name"], teacher, raw["teacher_digest"], folder / raw["plan"], folder / raw["scores"], content)


def _teacher(raw: Any) -> TeacherSpec:
    check_keys(raw, {"weights", "preset", "dit", "input_size"}, set(), "teacher")
    weights, preset, size = raw["weights"], raw["preset"], raw["input_size"]
    if not is_name(weights) or not weights or "\0" in weights:
        raise RunError(f"teacher.weights is {shown(weights)}; it must be a path")
    if not (preset is None or is_name(preset)) or not (size is None or is_int(size)):
        found = f"teacher.preset is {shown(preset)} and teacher.input_size {shown(size)}"
        raise RunError(f"{found}; a name and a number were expected, or null")
    dit = None if raw["dit"] is None else from_fields(DiTConfig, raw["dit"], "teacher.dit")
    return TeacherSpec(weights, preset, dit, size)


def _is_file_name(value: Any) -> bool:
    return is_name(value) and Path(value).name == value not in ("", "..") and "\0" not in value
