"""Null values of conditions, which guidance leads away from: numbers, stored rows, and a request's own. Needs numpy, no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import SAME, STORED, Condition, Conditions
from tc_lightning.plan.given import Arrays, checked_value
from tc_lightning.plan.guidance import Guidance

PREFIX = "null."  # of a null value's name among other arrays


def with_nulls(conditions: Conditions, given: Arrays, nulls: Arrays | None = None) -> dict[str, np.ndarray]:
    """The rows that a guided step computes: those given, then as many null values.

    Args:
        conditions: of the model.
        given: conditions, [B, ...] each.
        nulls: null values by name, [1, ...] or [B, ...] each, of stored ones and of those that a request brings.

    Raises:
        TokenCacheError: if a stored one is not there.
    """
    return {c.name: np.concatenate([given[c.name], _null_of(c, given[c.name], nulls or {})]) for c in conditions}


def _null_of(condition: Condition, given: np.ndarray, nulls: Arrays) -> np.ndarray:
    if condition.name in nulls:
        return np.broadcast_to(nulls[condition.name], given.shape)
    if condition.null == STORED:
        raise TokenCacheError(missing_in_words(condition.name))
    return given if condition.null == SAME else np.full_like(given, condition.null)


def missing_in_words(name: str) -> str:
    """What to do about a stored null value that is not there."""
    return (
        f"guidance needs a null value of {name}, and none is there: put a row of it, named {PREFIX}{name}, into the .npz file of "
        "conditions (`conditions` of the teacher), or set `guidance_scale` to 1."
    )


def stored(conditions: Conditions) -> list[str]:
    """Names of the conditions whose null value is a stored row."""
    return [condition.name for condition in conditions if condition.null == STORED]


def nulls_needed(conditions: Conditions, guidance: Guidance) -> bool:
    """Whether runs need stored null values."""
    return guidance.doubles_batch and bool(stored(conditions))


def checked_stored(conditions: Conditions, rows: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Null values by name, [1, ...] each in its own type, as a network holds them; of some of those that are stored, or of all.

    Raises:
        TokenCacheError: if one is none that is stored, or not a single row that the condition can have.
    """
    names = stored(conditions)
    if other := [name for name in rows if name not in names]:
        raise TokenCacheError(f"a null value of {', '.join(other)} was given; the model stores those of {', '.join(names) or 'none'}.")
    return {c.name: _checked(c, rows[c.name], 1) for c in conditions if c.name in rows}


def checked_negative(conditions: Conditions, negative: Mapping[str, Any], images: int) -> dict[str, np.ndarray]:
    """Null values that a request brings, [B, ...] each in its own type, or [1, ...] for all images.

    Args:
        conditions: of the model.
        negative: by name, a row for each image or one for all.
        images: B, how many there are.

    Raises:
        TokenCacheError: if one is of no condition that has a null value of its own, or is not what the condition can be.
    """
    able = [c.name for c in conditions if c.null not in (None, SAME)]
    if other := [name for name in negative if name not in able]:
        raise TokenCacheError(
            f"negative names {', '.join(other)}, of which the model has no null value: it has those of {', '.join(able) or 'none'}."
        )
    return {c.name: _checked(c, negative[c.name], images) for c in conditions if c.name in negative}


def require_together(conditions: Conditions, named: Collection[str]) -> None:
    """Refuse some stored null values without the others: a text of one prompt and the mask of another are neither's.

    Raises:
        TokenCacheError: naming those that are missing.
    """
    names = stored(conditions)
    there, missing = [name for name in names if name in named], [name for name in names if name not in named]
    if there and missing:
        raise TokenCacheError(
            f"a null value of {', '.join(there)} was given, and none of {', '.join(missing)}: they belong together, give all of them."
        )


def require_the_same(conditions: Conditions, nulls: Arrays, held: Arrays) -> None:
    """Refuse null values that are others than those which guidance leads away from where nobody brings any.

    Args:
        conditions: of the model.
        nulls: as `checked_negative` gives them, a row of each.
        held: the stored ones, [1, ...] each.

    Raises:
        TokenCacheError: naming the first that differs.
    """
    for c in conditions:
        if c.name not in nulls:
            continue
        own = held[c.name] if c.null == STORED else np.full_like(nulls[c.name], c.null)
        if not np.array_equal(nulls[c.name], own):
            raise TokenCacheError(
                f"{PREFIX}{c.name} is another null value than the artefact's own, which all images here are led away from: leave "
                f"{PREFIX}{c.name} out, export the artefact with it, or give it to `sample` as `negative`."
            )


def _checked(condition: Condition, value: Any, images: int) -> np.ndarray:
    try:
        rows = checked_value(condition, value)
    except TokenCacheError as error:
        raise TokenCacheError(f"the null value: {error}") from error
    if len(rows) not in (1, images):
        wanted = "one" if images == 1 else f"one for all, or one for each of the {images} images"
        raise TokenCacheError(f"the null value of {condition.name} has {len(rows)} rows: give {wanted}.")
    return rows
