"""Run folders: what `lightning fit` leaves behind, and how the exporter finds it.

A run says what it is for. Only what a user fitted is found without being named: `ablate` trains runs of its own in the same tree.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tc_lightning.atomic import write_atomically
from tc_lightning.errors import RunError
from tc_lightning.models.checkpoints import TeacherSpec
from tc_lightning.models.dit import DiTConfig

FORMAT_VERSION = 2  # 2: a run says what it is for
UNSTATED = 1  # the version before, which can be read and is not found by itself
NAME = "run.json"
CONTENT = "content.safetensors"
FIT, ABLATION = "fit", "ablation"
PURPOSES = (FIT, ABLATION)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: where it is.
        name: its name, for example `digits`.
        teacher: the teacher that it used.
        teacher_digest: sha256 of that teacher's weights.
        plan: path of the plan.
        scores: path of the scores.
        content: path of the content predictor; None if there is none.
        purpose: what it was made for: `fit`, for its plan, or `ablation`, to be compared with others.
    """

    folder: Path
    name: str
    teacher: TeacherSpec
    teacher_digest: str
    plan: Path
    scores: Path
    content: Path | None = None
    purpose: str = FIT


def write_run(folder: Path, name: str, teacher: TeacherSpec, teacher_digest: str, content: bool = False, purpose: str = FIT) -> None:
    """Write `run.json`, atomically and last: a folder that has one is complete; `content` says that it holds a content predictor."""
    listing = {
        "format_version": FORMAT_VERSION,
        "purpose": purpose,
        "name": name,
        "teacher": dataclasses.asdict(teacher),
        "teacher_digest": teacher_digest,
        "plan": "plan.json",
        "scores": "scores.safetensors",
    } | ({"content": CONTENT} if content else {})
    write_atomically(folder / NAME, json.dumps(listing, indent=1).encode())


def find_run(root: Path) -> Path:
    """The newest finished run of `lightning fit` under a folder.

    Raises:
        RunError: if there is none, or a newer one's `run.json` cannot be read: an older run is never taken in its place.
    """
    newest_first = sorted(root.rglob(NAME), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest_first:
        if _read(path).get("purpose") == FIT:
            return path.parent
    others = f" ({len(newest_first)} of other purposes, or of an older version, must be named)" if newest_first else ""
    raise RunError(
        f"no finished run under {root.resolve()}{others}: run `lightning fit -c lightning_configs/digits.yaml` there first, "
        "or name a run folder with --run."
    )


def read_run(folder: Path) -> Run:
    """Read `run.json`.

    Raises:
        RunError: if the folder is not a finished run, or its `run.json` is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise RunError(f"{folder} is not a finished run: it holds no {NAME}. Name the folder that `lightning fit` printed.")
    raw = _read(path)
    try:
        if raw["format_version"] not in (UNSTATED, FORMAT_VERSION):
            raise ValueError(f"format version {raw['format_version']} is not {FORMAT_VERSION}")
        purpose = raw["purpose"] if raw["format_version"] == FORMAT_VERSION else FIT
        if purpose not in PURPOSES:
            raise ValueError(f"purpose {purpose!r} is none of {', '.join(PURPOSES)}")
        teacher = dict(raw["teacher"])
        if teacher["dit"] is not None:
            teacher["dit"] = DiTConfig(**teacher["dit"])
        spec = TeacherSpec(**teacher)
        if not isinstance(spec.weights, str | Path) or Path(raw["name"]).name != raw["name"]:
            raise ValueError("teacher.weights must be a path, and name a plain name")
        content = folder / raw["content"] if "content" in raw else None
        return Run(folder, raw["name"], spec, raw["teacher_digest"], folder / raw["plan"], folder / raw["scores"], content, purpose)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _read(path: Path) -> dict[str, Any]:
    """What a `run.json` says."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise TypeError("it is not an object")
        return raw
    except (ValueError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RunError:
    return RunError(f"{path} is damaged ({error!r}): run `lightning fit` again, or name another run with --run.")
