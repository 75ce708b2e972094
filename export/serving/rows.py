"""Rows of requests, computed together: each has conditions, seed, index and guidance of its own, and an answer or error of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from export.runtime.request import rows_asked_for
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.given import checked as checked_conditions

OnStep = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """What one image is asked for by.

    Args:
        conditions: by name, without a batch dimension.
        seed: the image's.
        index: the image's number among those of its seed.
        guidance: guidance scale; None takes the plan's.
        full: compute everything at every step, the baseline.
    """

    conditions: Mapping[str, Any]
    seed: int = 0
    index: int = 0
    guidance: float | None = None
    full: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """One image.

    Args:
        latent: [C, H, W] float32.
        image: pixels in [-1, 1], [C, H, W] float32; None where there are none.
        receipt: of the run that it was a part of; rows that ran together share it.
    """

    latent: np.ndarray
    image: np.ndarray | None
    receipt: dict[str, Any]


def checked(sampler: CachedSampler, row: Row) -> tuple[dict[str, np.ndarray], float]:
    """A row's conditions, [1, ...] each, and its guidance scale.

    Raises:
        TokenCacheError: if it is not one that the artefact can make.
    """
    given = checked_conditions(sampler.conditions, {name: np.asarray(value)[None] for name, value in row.conditions.items()}, 1)
    (asked,) = rows_asked_for(sampler.manifest, 1, row.seed, row.index, row.guidance)
    return given, asked.scale


def answers(sampler: CachedSampler, rows: Sequence[Row], on_step: OnStep | None = None) -> list[Answer | TokenCacheError]:
    """Compute rows together; an error of one is its own, and the others are what they would be without it."""
    found: dict[int, Answer | TokenCacheError] = {}
    for full in (False, True):
        places = [place for place, row in enumerate(rows) if row.full == full]
        given: dict[int, tuple[dict[str, np.ndarray], float]] = {}
        for place in places:
            try:
                given[place] = checked(sampler, rows[place])
            except TokenCacheError as error:
                found[place] = error
        if given:
            found |= _run(sampler, {place: rows[place] for place in given}, given, full, on_step)
    return [found[place] for place in range(len(rows))]


def _run(
    sampler: CachedSampler,
    rows: Mapping[int, Row],
    given: Mapping[int, tuple[dict[str, np.ndarray], float]],
    full: bool,
    on_step: OnStep | None,
) -> dict[int, Answer | TokenCacheError]:
    """Rows that are in order, by their places."""
    result = sampler.sample(
        conditions={c.name: np.concatenate([values[c.name] for values, _ in given.values()]) for c in sampler.conditions},
        seed=[row.seed for row in rows.values()],
        indices=[row.index for row in rows.values()],
        guidance=[scale for _, scale in given.values()],
        full=full,
        on_step=on_step,
        strict=False,
    )
    images = [None] * len(rows) if result.images is None else list(result.images)
    return {
        place: TokenCacheError(result.failed[j]) if j in result.failed else Answer(result.latents[j], images[j], result.receipt)
        for j, place in enumerate(rows)
    }
