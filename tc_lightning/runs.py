"""Run folders: what `lightning fit` leaves behind, and how the exporter finds it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tc_lightning.atomic import write_atomically
from tc_lightning.errors import RunError
from tc_lightning.models.checkpoints import TeacherSpec
from tc_lightning.models.dit import DiTConfig

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
        raw: dict[str, Any] = json.loads(path.read_text())
        if raw["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {raw['format_version']} is not {FORMAT_VERSION}")
        teacher = dict(raw["teacher"])
        if teacher["dit"] is not None:
            teacher["dit"] = DiTConfig(**teacher["dit"])
        spec = TeacherSpec(**teacher)
        if not isinstance(spec.weights, str | Path) or Path(raw["name"]).name != raw["name"]:
            raise ValueError("teacher.weights must be a path, and name a plain name")
        content = folder / raw["content"] if "content" in raw else None
        return Run(folder, raw["name"], spec, raw["teacher_digest"], folder / raw["plan"], folder / raw["scores"], content)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error!r}): run `lightning fit` again.") from error
