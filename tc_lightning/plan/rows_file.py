"""`.npz` files of conditions: rows of each, and null values beside them. Needs numpy, no torch."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import Conditions
from tc_lightning.plan.given import Arrays, checked
from tc_lightning.plan.nulls import PREFIX, checked_negative, checked_stored, stored


class Rows(NamedTuple):
    """Conditions by name, [rows, ...] each, and null values by name, [1, ...] each."""

    examples: dict[str, np.ndarray]
    nulls: dict[str, np.ndarray]


def read_rows(path: Path, conditions: Conditions) -> Rows:
    """What a `.npz` file holds: an array [rows, ...] of each condition, those of class labels optional, and, also optional, null
    values, a single row named `null.NAME` each.

    Raises:
        TokenCacheError: if the file is missing or damaged, or holds what the model cannot take.
    """
    raw = _arrays(path)
    nulls = {name.removeprefix(PREFIX): raw.pop(name) for name in list(raw) if name.startswith(PREFIX)}
    try:
        found = checked(tuple(c for c in conditions if c.name in raw or not c.classes), raw)
        rows = Rows(found, checked_negative(conditions, nulls, 1))
    except TokenCacheError as error:
        raise TokenCacheError(f"{path}: {error}") from error
    if not all(map(len, found.values())):
        raise TokenCacheError(f"{path} holds no rows: give one of each condition at least.")
    return rows


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays of conditions, rows or stored null values, by their names; the same values give the same bytes."""
    rows: dict[str, Any] = {name: arrays[name] for name in sorted(arrays)}
    np.savez(path, **rows)


def read_nulls(path: Path, conditions: Conditions) -> dict[str, np.ndarray]:
    """The null values that `write_arrays` wrote, all that the conditions say are stored.

    Raises:
        TokenCacheError: if the file is missing or damaged, lacks one, or holds what the model cannot take.
    """
    raw = _arrays(path)
    try:
        found = checked_stored(conditions, raw)
    except TokenCacheError as error:
        raise TokenCacheError(f"{path}: {error}") from error
    if missing := [name for name in stored(conditions) if name not in found]:
        raise TokenCacheError(f"{path} lacks the null value of {', '.join(missing)}.")
    return found


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise TokenCacheError(f"cannot read the conditions {path} ({error}): a .npz file of arrays was expected.") from error
