"""Reading JSON that a person may have edited: every mistake is told where it is."""

from __future__ import annotations

import dataclasses
from typing import Any

from tc_lightning.errors import PlanError


def check_keys(raw: Any, required: set[str], optional: set[str], where: str) -> None:
    """Check that a JSON value is an object with these keys.

    Raises:
        PlanError: naming what is missing or unknown, at `where`.
    """
    if not isinstance(raw, dict):
        raise PlanError(f"{where}: expected an object, found {type(raw).__name__}.")
    if missing := required - set(raw):
        raise PlanError(f"{where}: missing {', '.join(sorted(missing))}.")
    if unknown := set(raw) - required - optional:
        raise PlanError(f"{where}: unknown {', '.join(sorted(unknown))}.")


def from_fields(cls: Any, raw: Any, where: str, optional: frozenset[str] | set[str] = frozenset()) -> Any:
    """A dataclass of plain numbers and strings from its JSON object, from which `optional` keys may be absent.

    Raises:
        PlanError: naming the key that is missing, unknown or of another type.
    """
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    check_keys(raw, set(types) - optional, {*optional}, where)
    allowed: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
    for name, kind in ((name, types[name]) for name in raw):
        if type(raw[name]) not in allowed[str(kind)]:
            raise PlanError(f"{where}.{name}: expected {kind}, found {raw[name]!r}.")
    return cls(**raw)


def as_list(raw: Any, where: str) -> list[Any]:
    """The value, if it is a list.

    Raises:
        PlanError: if it is not.
    """
    if not isinstance(raw, list):
        raise PlanError(f"{where}: expected a list, found {type(raw).__name__}.")
    return raw


def is_ints(raw: Any) -> bool:
    """Whether a value is a list of integers, none of them a boolean."""
    return isinstance(raw, list) and all(type(value) is int for value in raw)
