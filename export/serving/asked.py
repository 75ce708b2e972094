"""The body of a request as a row: JSON in, refused in words where it is not what the artefact can take. No server is needed."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import zipfile
from typing import Any

import numpy as np

from export.serving.rows import Row, checked
from tc_lightning.errors import TokenCacheError, first_line
from tc_lightning.plan.conditions import Conditions, class_label, conditions_from_json
from tc_lightning.plan.given import Arrays
from tc_lightning.plan.nulls import PREFIX, checked_negative, require_the_same

FORMATS = ("png", "npy", "json")
_WAYS = ("label", "conditions", "npz", "example")
FIELDS = (*_WAYS, "seed", "index", "guidance", "full", "format")
_NUMBER, _HEADERS = 8, 4096  # bytes of the widest number in an .npz file, and room for the headers of an array
_KINDS = "biuf"  # of numbers; other types may take no bytes at all, whatever their shape
_TEXT, _LEAST = 32, 1 << 20  # characters of a number in JSON, and what any request may take


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Args:
        row: the image.
        form: `png`, `npy` or `json`.
        slot: where the server notes how far it is.
    """

    row: Row
    form: str
    slot: int = 0


def body_limit(conditions: Conditions) -> int:
    """Bytes that the body of a request may have: each condition once, as a list of numbers, and a MiB besides. An `.npz` file in base64
    with a null value of each takes less."""
    return _LEAST + _TEXT * sum(math.prod(c.shape) for c in conditions)


def read_asked(body: bytes, manifest: dict[str, Any], examples: Arrays | None = None, nulls: Arrays | None = None) -> Asked:
    """What the body of a request asks for.

    Args:
        body: a JSON object with some of `FIELDS`.
        manifest: the artefact's.
        examples: rows of conditions that a request may name by number, [rows, ...] each.
        nulls: null values that the artefact stores, [1, ...] each; a request may bring the same.

    Raises:
        TokenCacheError: if it is not JSON, has a field that is unknown or of another type, or asks for what the artefact cannot do.
    """
    raw = _object(body)
    if unknown := [name for name in raw if name not in FIELDS]:
        raise TokenCacheError(f"unknown field {', '.join(map(repr, unknown))}: a request has {', '.join(FIELDS)}.")
    form = raw.get("format", "png")
    if form not in FORMATS:
        raise TokenCacheError(f"unknown format {form!r}: choose one of {', '.join(FORMATS)}.")
    rest = {name: raw[name] for name in ("seed", "index", "guidance", "full") if name in raw}
    return Asked(checked(manifest, Row(_conditions(raw, manifest, examples or {}, nulls or {}), **rest)), form)


def _object(body: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise TokenCacheError(
            f'the body is not JSON ({first_line(error)}): send an object such as {{"label": 3, "seed": 7}}.'
        ) from error
    if not isinstance(raw, dict):
        raise TokenCacheError(f'the body is JSON, but no object: send one such as {{"label": 3, "seed": 7}}, with {", ".join(FIELDS)}.')
    return raw


def _conditions(raw: dict[str, Any], manifest: dict[str, Any], examples: Arrays, nulls: Arrays) -> dict[str, Any]:
    conditions = conditions_from_json(manifest["model"]["conditions"], "conditions")
    ways = [name for name in _WAYS if name in raw]
    if len(ways) != 1:
        given = f"{' and '.join(ways)} were given" if ways else "the image's conditions are missing"
        raise TokenCacheError(f"{given}: give one of {', '.join(_WAYS)}; the model takes {_in_words(conditions)}.")
    value = raw[ways[0]]
    match ways[0]:
        case "label":
            return {class_label(conditions).name: value}
        case "conditions":
            if not isinstance(value, dict):
                raise TokenCacheError(
                    f"conditions is no object: give one value for each name; the model takes {_in_words(conditions)}."
                )
            return value
        case "npz":
            return _without_nulls(_unpacked(value, conditions), manifest, conditions, nulls)
        case _:
            return _example(value, examples)


def _in_words(conditions: Conditions) -> str:
    return ", ".join(f"{c.name} ({c.in_words})" for c in conditions)


def _unpacked(value: Any, conditions: Conditions) -> dict[str, np.ndarray]:
    """Arrays of an `.npz` file in base64, without the batch axis: each is [1, ...] there, as in a file of conditions with one row."""
    if not isinstance(value, str):
        raise TokenCacheError("npz is no text: give the bytes of a .npz file in base64.")
    most = 2 * sum(_HEADERS + _NUMBER * math.prod(c.shape) for c in conditions)  # of each its value and a null value
    try:
        data = base64.b64decode(value, validate=True)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > most:  # before anything is unpacked
            raise TokenCacheError(
                f"npz unpacks to {size:,} bytes, and one row of {_in_words(conditions)} takes {most:,} at most, with null values."
            )
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            rows = {name: file[name] for name in file.files}
    except TokenCacheError:
        raise
    except Exception as error:  # whatever the readers of zip and npy files make of damage
        raise TokenCacheError(f"npz cannot be read ({first_line(error)}): give the bytes of a .npz file in base64.") from error
    for name, array in rows.items():
        if array.dtype.kind not in _KINDS:
            raise TokenCacheError(f"npz: {name} has the type {array.dtype}: give numbers, {_in_words(conditions)}.")
        if array.ndim == 0 or len(array) != 1:
            raise TokenCacheError(f"npz: {name} has the shape {list(array.shape)}: give one row, [1, ...], of each condition.")
    return {name: array[0] for name, array in rows.items()}


def _without_nulls(
    row: dict[str, np.ndarray], manifest: dict[str, Any], conditions: Conditions, nulls: Arrays
) -> dict[str, np.ndarray]:
    """The conditions; null values beside them, which `export/encode.py` writes, must be the artefact's."""
    given = {name.removeprefix(PREFIX): row[name][None] for name in row if name.startswith(PREFIX)}
    require_own_nulls(manifest, conditions, checked_negative(conditions, given, 1), nulls)
    return {name: value for name, value in row.items() if not name.startswith(PREFIX)}


def require_own_nulls(manifest: dict[str, Any], conditions: Conditions, given: Arrays, nulls: Arrays) -> None:
    """Refuse null values that are not the artefact's: every image of a server is led away from the same. Without guidance none act.

    Raises:
        TokenCacheError: if one is another.
    """
    if manifest["guidance"]["scale"] != 1.0:
        require_the_same(conditions, given, nulls)


def _example(value: Any, examples: Arrays) -> dict[str, np.ndarray]:
    count = min(map(len, examples.values()), default=0)
    if not count:
        raise TokenCacheError("example was given, and this server has none: start it with --conditions FILE.npz, or give conditions.")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise TokenCacheError(f"example {value!r} is none of this server's: it has 0 to {count - 1}.")
    return {name: rows[value] for name, rows in examples.items()}
