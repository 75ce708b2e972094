"""Run folders: what `lightning fit` leaves behind, and how the exporter finds it.

A run says what it is for. Only what a user fitted is found without being named: `ablate` trains runs of its own in the same tree.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tc_lightning.errors import RunError, TokenCacheError
from tc_lightning.models.checkpoints import TeacherSpec
from tc_lightning.models.families import family_of
from tc_lightning.plan.atomic import write_atomically
from tc_lightning.plan.json_fields import check_keys, from_fields, is_int, is_name, shown

FORMAT_VERSION = 2  # 2: a run says what it is for
UNSTATED = 1  # the version before, which can be read and is not found by itself
NAME = "run.json"
CONTENT = "content.safetensors"
CORRECTOR = "corrector.safetensors"
FIT, ABLATION = "fit", "ablation"
PURPOSES = (FIT, ABLATION)


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
        purpose: what it was made for: `fit`, for its plan, or `ablation`, to be compared with others.
        corrector: path of the corrector; None if there is none.
    """

    folder: Path
    name: str
    teacher: TeacherSpec
    teacher_digest: str
    plan: Path
    scores: Path
    content: Path | None = None
    purpose: str = FIT
    corrector: Path | None = None

    @property
    def companions(self) -> tuple[Path | None, Path | None]:
        """Paths of the content predictor and of the corrector."""
        return self.content, self.corrector


def write_run(
    folder: Path,
    name: str,
    teacher: TeacherSpec,
    teacher_digest: str,
    content: bool = False,
    purpose: str = FIT,
    corrector: bool = False,
) -> None:
    """Write `run.json`, atomically and last: a folder that has one is complete; `content` and `corrector` say that it holds them."""
    listing = {
        "format_version": FORMAT_VERSION,
        "purpose": purpose,
        "name": name,
        "teacher": _lasting(teacher),
        "teacher_digest": teacher_digest,
        "plan": "plan.json",
        "scores": "scores.safetensors",
    } | {name: file for name, file, held in (("content", CONTENT, content), ("corrector", CORRECTOR, corrector)) if held}
    write_atomically(folder / NAME, json.dumps(listing, indent=1).encode())


_MAY_LACK = ("conditions", "text_tokens")  # of a teacher's description; written only where they say something


def _lasting(teacher: TeacherSpec) -> dict[str, Any]:
    """A teacher's description, with paths that hold anywhere."""
    said = dataclasses.asdict(teacher) | {"weights": _anywhere(teacher.weights)}
    said |= {"conditions": teacher.conditions and _anywhere(teacher.conditions)}
    return {name: value for name, value in said.items() if value is not None or name not in _MAY_LACK}


def _anywhere(weights: str) -> str:
    """A path that another working directory does not change; what is not in this one is found in the repository from all."""
    here = Path(weights).expanduser().absolute()
    return str(here) if here.exists() else weights


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
        return _run_from_json(raw, folder)
    except (OSError, ValueError, RecursionError, TokenCacheError) as error:
        raise _damaged(path, error) from error


def _read(path: Path) -> dict[str, Any]:
    """What a `run.json` says."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise RunError(f"expected an object, found {type(raw).__name__}")
        return raw
    except (OSError, ValueError, RecursionError, RunError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RunError:
    what = str(error).rstrip(".")
    return RunError(f"{path} is damaged ({what}): run `lightning fit` again, or name another run with --run.")


def _run_from_json(raw: dict[str, Any], folder: Path) -> Run:
    version = raw.get("format_version")
    if not is_int(version) or version not in (UNSTATED, FORMAT_VERSION):
        raise RunError(f"format version {shown(version)} is not {FORMAT_VERSION}")
    stated = {"purpose"} if version == FORMAT_VERSION else set()
    check_keys(raw, {"format_version", "name", "teacher", "teacher_digest", "plan", "scores"} | stated, {"content", "corrector"}, "run")
    purpose = raw.get("purpose", FIT)
    if purpose not in PURPOSES:
        raise RunError(f"purpose {shown(purpose)} is none of {', '.join(PURPOSES)}")
    if not is_name(raw["teacher_digest"]):
        raise RunError(f"teacher_digest is {shown(raw['teacher_digest'])}; a sha256 was expected")
    for key in ("name", "plan", "scores", "content", "corrector"):
        if key in raw and not _is_file_name(raw[key]):
            raise RunError(f"{key} is {shown(raw[key])}; it must be a plain name")
    content, corrector = (folder / raw[key] if key in raw else None for key in ("content", "corrector"))
    files = (folder / raw["plan"], folder / raw["scores"], content)
    return Run(folder, raw["name"], _teacher(raw["teacher"]), raw["teacher_digest"], *files, purpose, corrector)


def _teacher(raw: Any) -> TeacherSpec:
    check_keys(raw, {"weights", "preset", "dit", "input_size"}, {"family", *_MAY_LACK}, "teacher")
    weights, preset, size, family = raw["weights"], raw["preset"], raw["input_size"], raw.get("family")
    if not is_name(weights) or not weights or "\0" in weights:
        raise RunError(f"teacher.weights is {shown(weights)}; it must be a path")
    if not (preset is None or is_name(preset)) or not (size is None or is_int(size)):
        found = f"teacher.preset is {shown(preset)} and teacher.input_size {shown(size)}"
        raise RunError(f"{found}; a name and a number were expected, or null")
    if not (family is None or is_name(family)):
        raise RunError(f"teacher.family is {shown(family)}; a name was expected, or null")
    dit = None if raw["dit"] is None else from_fields(family_of("dit").config, raw["dit"], "teacher.dit", {"output"})
    tokens = raw.get("text_tokens")
    if not (tokens is None or (is_int(tokens) and tokens > 0)):
        raise RunError(f"teacher.text_tokens is {shown(tokens)}; a positive number was expected, or null")
    return TeacherSpec(weights, preset, dit, size, family, _path(raw.get("conditions")), tokens)


def _path(value: Any) -> str | None:
    if value is not None and (not is_name(value) or not value or "\0" in value):
        raise RunError(f"teacher.conditions is {shown(value)}; it must be a path, or null")
    return value


def _is_file_name(value: Any) -> bool:
    return is_name(value) and Path(value).name == value not in ("", "..") and "\0" not in value
