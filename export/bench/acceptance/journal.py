"""What an acceptance run found, a JSON line at a time: each is on the disk before the next thing is tried. Standard library only.

    {"run": {...}}                                               the first line: what was asked for
    {"stage": 2, "name": "precisions", "part": "fp16", ...}      a part of a stage, as soon as it is known
    {"stage": 2, "name": "precisions", "part": "", ...}          the stage itself, when it has ended, however it did

A part or a stage has `held` true or false, or null for what was not looked at; `reason`, unless it is true; `figures`; `seconds`; and
`cut`, whether it was time that ran out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from tc_lightning.errors import TokenCacheError

NAME = "acceptance.jsonl"
LIMIT = ", limit"  # ends the name of a figure that is the limit of another
FIGURES_ALONE = "figures alone"  # the reason of a part in which nothing is required
DIGITS = 6  # of a figure, that are written down


@dataclasses.dataclass(frozen=True)
class Line:
    """What is known of a stage or of a part of it; see the module.

    Args:
        stage: number of the stage.
        name: its name.
        part: which part of it; empty for the stage itself.
        held: None if it was not looked at.
        reason: why it is not true.
        figures: plain JSON values.
        seconds: what it took.
        cut: time ran out before it was known.
    """

    stage: int
    name: str
    part: str
    held: bool | None
    reason: str = ""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    cut: bool = False

    @property
    def verdict(self) -> str:
        """In words."""
        if self.held is None and not self.cut:
            return "figures" if self.reason == FIGURES_ALONE else "not looked at"
        if self.held is None:
            return "cut off"
        return "held" if self.held else "FELL SHORT"


@dataclasses.dataclass(frozen=True)
class Record:
    """A run's lines: what was asked for, and what was found, in order."""

    asked: dict[str, Any]
    lines: tuple[Line, ...]

    def parts(self, stage: int) -> list[Line]:
        """The parts of a stage."""
        return [line for line in self.lines if line.stage == stage and line.part]

    def outcome(self, stage: int) -> Line | None:
        """The stage's own line; None if the run did not get to its end."""
        return next((line for line in self.lines if line.stage == stage and not line.part), None)


class Journal:
    """The file of a run, to which several processes append, one at a time.

    Args:
        folder: where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def begin(self, asked: dict[str, Any]) -> None:
        """Start a run: what an earlier one found in this folder goes."""
        self.path.unlink(missing_ok=True)
        self._append({"run": asked})

    def add(self, line: Line) -> None:
        """Write a line; it is on the disk when this returns."""
        self._append(dataclasses.asdict(line))

    def read(self) -> Record:
        """All lines; those that were being written when their process was killed do not count.

        Raises:
            TokenCacheError: if there is no such file, or it is another one.
        """
        try:
            first, *rest = self.path.read_text(encoding="utf-8").splitlines()
            return Record(json.loads(first)["run"], tuple(Line(**fields) for fields in map(_whole, rest) if fields is not None))
        except FileNotFoundError as error:
            raise TokenCacheError(f"{self.path} does not exist: name the folder of an acceptance run with --out.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise TokenCacheError(f"{self.path} is no record of an acceptance run ({error}): name the folder of one.") from error

    def _append(self, fields: dict[str, Any]) -> None:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            ended = size == 0 or os.pread(handle, 1, size - 1) == b"\n"
            os.write(handle, f"{'' if ended else chr(10)}{json.dumps(_plain(fields), allow_nan=False)}\n".encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def _whole(line: str) -> Any:
    """A line's content; None if only a part of it was written."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _plain(value: Any) -> Any:
    """JSON values: floats to a few digits, those that JSON has not as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    return value
