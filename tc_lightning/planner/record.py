"""The memory of a search: a line for every trial, so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tc_lightning.errors import RunError


class TrialRecord:
    """Errors of recipes by their digest, kept in a file of JSON lines.

    Args:
        path: the file; it is made, or added to. None remembers for as long as the object lives.
        search: names all that the errors depend on beside the recipe; lines of other searches are passed over.

    Raises:
        RunError: if the file cannot be read.
    """

    def __init__(self, path: Path | None, search: str) -> None:
        self._path, self._search = path, search
        self._mse: dict[str, float] = {}
        if path is not None and path.is_file():
            try:
                lines = path.read_text().splitlines()
            except OSError as error:
                raise RunError(f"cannot read {path} ({error.strerror}): delete it, and the search starts afresh.") from error
            for line in lines:
                self._take(line)

    def __contains__(self, recipe: str) -> bool:
        return recipe in self._mse

    def __getitem__(self, recipe: str) -> float:
        return self._mse[recipe]

    def __len__(self) -> int:
        return len(self._mse)

    def add(self, recipe: str, mse: float, write: bool) -> None:
        """Remember an error, in the file too if `write` (one process of several does)."""
        self._mse[recipe] = mse
        if write and self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"search": self._search, "recipe": recipe, "mse": mse if math.isfinite(mse) else None}) + "\n")

    def _take(self, line: str) -> None:
        try:
            row = json.loads(line)
            if row["search"] == self._search:
                self._mse[row["recipe"]] = math.inf if row["mse"] is None else float(row["mse"])
        except (ValueError, KeyError, TypeError):  # the last line of a run that was killed while writing it
            return
