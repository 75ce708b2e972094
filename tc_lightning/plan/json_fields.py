"""Reading JSON that a person may have edited: every mistake is told where it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tc_lightning.errors import PlanError

MOST = 2**53  # beyond it not every integer is a floating-point number
MOST_SHOWN = 60


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


def from_fields(
    cls: Any,
    raw: Any,
    where: str,
    optional: frozenset[str] | set[str] = frozenset(),
    made: Mapping[str, Callable[[Any, str], Any]] | None = None,
) -> Any:
    """A dataclass of plain numbers and strings from its JSON object, from which `optional` keys may be absent.

    Fields of any other type are made by the functions `made`, of the JSON value and where it stands.

    Raises:
        PlanError: naming the key that is missing, unknown or of another type.
    """
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    check_keys(raw, set(types) - optional, {*optional}, where)
    fits = {"int": is_int, "float": is_number, "str": is_name, "bool": lambda value: isinstance(value, bool)}
    made = made or {}
    for name, kind in ((name, types[name]) for name in raw if name not in made):
        if not fits[str(kind)](raw[name]):
            raise PlanError(f"{where}.{name}: expected {kind}, found {shown(raw[name])}.")
    return cls(**{name: made[name](value, f"{where}.{name}") if name in made else value for name, value in raw.items()})


def shown(value: Any) -> str:
    """A value as a message quotes it: its beginning, if it is long."""
    text = ascii(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def is_int(value: Any) -> bool:
    """Whether a value is an integer, no boolean, that floating-point arithmetic can hold."""
    return type(value) is int and abs(value) <= MOST


def is_number(value: Any) -> bool:
    """Whether a value is a number that floating-point arithmetic can hold, finite or not."""
    return is_int(value) or type(value) is float


def is_name(value: Any) -> bool:
    """Whether a value is text that can be printed and written to any file."""
    return isinstance(value, str) and not any(0xD800 <= ord(letter) < 0xE000 for letter in value)


def as_list(raw: Any, where: str) -> list[Any]:
    """The value, if it is a list.

    Raises:
        PlanError: if it is not.
    """
    if not isinstance(raw, list):
        raise PlanError(f"{where}: expected a list, found {type(raw).__name__}.")
    return raw


def is_ints(raw: Any) -> bool:
    """Whether a value is a list of integers; see `is_int`."""
    return isinstance(raw, list) and all(map(is_int, raw))
