"""Values of conditions as arrays, [B, ...] each by name: checked and drawn. Needs numpy, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import Condition, Conditions

TRAINING, PLANNING, REPORTING = "training", "planning", "reporting"  # what examples of conditions are for
_PARTS = {TRAINING: (0, 1), PLANNING: (2,), REPORTING: (3,)}  # of every four rows, those of each
_TURN = 4
LABEL_STREAM = 2**63 - 1  # Philox counter of the labels; the noise counts up from 0
NUMPY_TYPES: dict[str, type[np.generic]] = {"int64": np.int64, "fp32": np.float32}

Arrays = Mapping[str, np.ndarray]  # name of a condition -> its value for each image, [B, ...]


def checked_value(c: Condition, value: Any, images: int | None = None) -> np.ndarray:
    """A condition's value for each image, [B, ...], in its own type.

    Raises:
        TokenCacheError: if type, shape, number or range are others.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise TokenCacheError(f"{c.name} cannot be read as numbers ({error}): give {c.in_words} for each image.") from error
    kinds = "iu" if c.dtype == "int64" else "iuf"
    if array.size and array.dtype.kind not in kinds:
        raise TokenCacheError(f"{c.name} has the type {array.dtype}: give {c.in_words} for each image.")
    if array.ndim != 1 + len(c.shape) or array.shape[1:] != c.shape:
        raise TokenCacheError(f"{c.name} has the shape {list(array.shape)}: give [images, ...], {c.in_words} for each image.")
    if images is not None and len(array) != images:
        raise TokenCacheError(f"{c.name} has {len(array)} rows for {images} images: give one for each.")
    if c.dtype == "fp32":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise TokenCacheError(f"{c.name} holds NaN or infinite values, first in row {row}: give finite numbers.")
    elif c.classes and len(bad := array[(array < 0) | (array >= c.classes)]):
        raise TokenCacheError(f"{c.name} {int(bad[0])} is out of range: the model has {c.in_words}.")
    if c.mask:
        _require_mask(c, array)
    return np.ascontiguousarray(array, dtype=NUMPY_TYPES[c.dtype])


def _require_mask(c: Condition, array: np.ndarray) -> None:
    if not np.isin(array, (0, 1)).all():
        raise TokenCacheError(f"{c.name} holds {int(array[~np.isin(array, (0, 1))][0])}: a mask is of 0 and 1.")
    marked_B = array.reshape(len(array), -1).any(1)
    if not marked_B.all():
        raise TokenCacheError(
            f"{c.name} marks nothing in row {int(np.argmin(marked_B))}: there must be a 1 for something to be attended to."
        )


def checked(conditions: Conditions, given: Mapping[str, Any], images: int | None = None) -> dict[str, np.ndarray]:
    """The values of all conditions, each [B, ...] in its own type.

    Raises:
        TokenCacheError: if a condition is missing or unknown, or a value is not one that it can have.
    """
    names = [condition.name for condition in conditions]
    wanted = ", ".join(f"{c.name} ({c.in_words})" for c in conditions)
    if missing := [name for name in names if name not in given]:
        raise TokenCacheError(f"the condition {', '.join(missing)} is missing: the model takes {wanted}.")
    if unknown := [name for name in given if name not in names]:
        raise TokenCacheError(f"the model has no condition {', '.join(unknown)}: it takes {wanted}.")
    found: dict[str, np.ndarray] = {}
    for condition in conditions:
        rows = images if images is not None else next((len(array) for array in found.values()), None)
        found[condition.name] = checked_value(condition, given[condition.name], rows)
    return found


def drawn(conditions: Conditions, seed: int, indices: Sequence[int], table: Arrays | None = None) -> dict[str, np.ndarray]:
    """Conditions of images that nobody gave any.

    Args:
        conditions: of the model.
        seed: the user's seed, 0 <= seed < 2**63.
        indices: global index of each image.
        table: examples of conditions that cannot be drawn, [rows, ...] each: image i takes row i, and begins again after the last.

    Raises:
        TokenCacheError: if a condition can neither be drawn nor is in the table.
    """
    known = table or {}
    if missing := [c.name for c in conditions if not c.classes and c.name not in known]:
        raise TokenCacheError(
            f"the condition {', '.join(missing)} cannot be drawn, as class labels can: give examples of it, a .npz file with an array "
            "[rows, ...] of each name (`conditions` of the teacher, or --conditions)."
        )
    return {
        c.name: known[c.name][np.asarray(indices) % len(known[c.name])] if c.name in known else drawn_labels(seed, indices, c.classes)
        for c in conditions
    }


def part_for(table: Arrays | None, use: str) -> dict[str, np.ndarray] | None:
    """The rows of a table of examples that are for one use alone: of every four the first two are for recorded trajectories, which are
    trained on, the third is for planning, and the last for reports and verification.

    Raises:
        TokenCacheError: if there are too few rows for every use to have one.
    """
    if table is None:
        return None
    rows = min((len(value) for value in table.values()), default=_TURN)
    if rows < _TURN:
        raise TokenCacheError(
            f"the examples of conditions have {rows} rows: training, planning and reporting take rows of their own, so that none is "
            f"judged by what it was made for: give {_TURN} of each condition at least."
        )
    return {name: value[np.isin(np.arange(len(value)) % _TURN, _PARTS[use])] for name, value in table.items()}


def digest_of(table: Arrays | None) -> str:
    """sha256 of examples of conditions; empty if there are none."""
    if table is None:
        return ""
    hasher = hashlib.sha256()
    for name in sorted(table):
        hasher.update(f"\n{name} {table[name].dtype} {table[name].shape}\n".encode() + np.ascontiguousarray(table[name]).tobytes())
    return hasher.hexdigest()


def drawn_labels(seed: int, indices: Sequence[int], classes: int) -> np.ndarray:
    """Class of each image, [len(indices)] int64: every class once, in random order, then again in another order.

    Args:
        seed: the user's seed, 0 <= seed < 2**63.
        indices: global index of each image.
        classes: classes of the model.
    """
    orders = {turn: _class_order(seed, turn, classes) for turn in {index // classes for index in indices}}
    return np.array([orders[index // classes][index % classes] for index in indices], dtype=np.int64)


def _class_order(seed: int, turn: int, classes: int) -> np.ndarray:
    """Raw Philox output, whose stream numpy guarantees, ranked."""
    raw = np.random.Philox(key=[seed, turn], counter=[0, 0, 0, LABEL_STREAM]).random_raw(classes)
    return np.argsort(raw, kind="stable")
