"""The memory of a search: a line for every trial and every refined plan, so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from tc_lightning.errors import RunError


@functools.cache
def code_digest() -> str:
    """Names this version of the package: sha256 of all of its modules. Errors that other code measured are not this code's."""
    root = Path(__file__).parents[1]
    parts = (f"{path.relative_to(root)}\n".encode() + path.read_bytes() for path in sorted(root.rglob("*.py")))
    return hashlib.sha256(b"".join(parts)).hexdigest()


class TrialRecord:
    """Errors of recipes, and the theta that refining has found, by the recipe's digest, kept in a file of JSON lines.

    Args:
        path: the file; it is made, or added to. None remembers for as long as the object lives.
        search: names all that the errors depend on beside the recipe; lines of other searches are passed over.

    Raises:
        RunError: if the file cannot be read.
    """

    def __init__(self, path: Path | None, search: str) -> None:
        self._path, self._search = path, search
        self._errors: dict[str, float] = {}
        self._refined: dict[str, list[float]] = {}
        self._cut = False  # whether the file ends within a line
        if path is not None and path.exists():
            try:
                text = path.read_text(errors="replace", encoding="utf-8")
            except OSError as error:
                raise RunError(f"cannot read {path} ({error.strerror}): delete it, and the search starts afresh.") from error
            self._cut = not text.endswith("\n") and bool(text)
            for line in text.splitlines():
                self._take(line)

    def __contains__(self, recipe: str) -> bool:
        return recipe in self._errors

    def get(self, recipe: str) -> float:
        """The error of a recipe; NaN if it is not known."""
        return self._errors.get(recipe, math.nan)

    def know(self, recipe: str, error: float) -> None:
        """Remember an error that is in the file, or in that of another process."""
        self._errors[recipe] = error

    def add(self, recipe: str, error: float, write: bool) -> None:
        """Remember an error, in the file too if `write` (one process of several does)."""
        self.know(recipe, error)
        if write:
            self._write({"search": self._search, "recipe": recipe, "error": error if math.isfinite(error) else None})

    def refined(self, recipe: str, size: int) -> list[float] | None:
        """The theta that refining has found (`tc_lightning.planner.theta`), of so many places; None if it is not known."""
        theta = self._refined.get(recipe, [])
        return theta if len(theta) == size and all(map(math.isfinite, theta)) else None

    def add_refined(self, recipe: str, theta: list[float], write: bool) -> None:
        """Remember what refining has found, in the file too if `write`."""
        self._refined[recipe] = theta
        if write:
            self._write({"search": self._search, "recipe": recipe, "theta": theta})

    def _write(self, row: dict[str, Any]) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._cut + json.dumps(row) + "\n")
        self._cut = False

    def _take(self, line: str) -> None:
        try:
            row = json.loads(line)
            if row["search"] != self._search:
                return
            if "theta" in row:
                self._refined[row["recipe"]] = [float(value) for value in row["theta"]]
                return
            error = math.inf if row["error"] is None else float(row["error"])
            if not math.isnan(error):
                self._errors[row["recipe"]] = error
        except (ValueError, KeyError, TypeError):  # the last line of a run that was killed while writing it
            return
