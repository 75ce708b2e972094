"""Rows of several requests in one batch: what every serving backend does with the items that it is given.

A backend makes a `Row` of each item, and `answers` gives one answer for each: the image that the row would get alone, or an error of
its own. Needs the runtime alone. Shape suffixes: C H W latent or image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from export.runtime.receipt import receipt_of_one
from export.runtime.request import rows_asked_for
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan import given
from tc_lightning.plan.conditions import conditions_from_json

OnStep = Callable[[Sequence[int], int, int], None]


class RowError(TokenCacheError):
    """Latents or pixels of one row became NaN or infinite; the others of its batch are whole."""


class BadRowError(TokenCacheError):
    """A row asks for what the artefact cannot make; it joins no batch."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One image that is asked for.

    Args:
        conditions: one row of each condition, without the batch axis; a class label is a single number.
        seed: its seed.
        index: its index.
        guidance: its guidance scale; None takes the plan's.
        full: run the reference instead of the plan.
    """

    conditions: Mapping[str, Any]
    seed: int = 0
    index: int = 0
    guidance: float | None = None
    full: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a row gets.

    Args:
        latent: the model's own output, [C, H, W] float32.
        image: pixels in [-1, 1], [C, H, W] float32; None where the artefact makes none.
        receipt: what ran, in plain JSON values: the batch's, and of what was asked for this row's part alone.
    """

    latent: np.ndarray
    image: np.ndarray | None
    receipt: dict[str, Any]


def checked(manifest: dict[str, Any], row: Row) -> Row:
    """The row with its conditions as arrays of their own type and its guidance scale as a number, before it joins a batch.

    Args:
        manifest: the artefact's.
        row: what is asked for.

    Raises:
        TokenCacheError: if a condition is missing, unknown or not what it can be, seed, index or guidance cannot be used, or `full`
            is neither true nor false.
    """
    if not isinstance(row.full, bool | np.bool_):
        raise TokenCacheError(f"full {row.full!r} is neither true nor false.")
    if isinstance(row.guidance, bool | np.bool_ | str | bytes):
        raise TokenCacheError(f"guidance {row.guidance!r} is not a number that can be used.")
    conditions = conditions_from_json(manifest["model"]["conditions"], "conditions")
    rows = given.checked(conditions, {name: [value] for name, value in row.conditions.items()}, 1)
    scale = manifest["guidance"]["scale"] if row.guidance is None else row.guidance
    (asked,) = rows_asked_for(manifest, 1, [row.seed], [row.index], [scale])
    return Row({name: value[0] for name, value in rows.items()}, asked.seed, asked.index, asked.scale, bool(row.full))


def answers(sampler: CachedSampler, rows: Sequence[Row], on_step: OnStep | None = None) -> list[Answer | TokenCacheError]:
    """Make the images of rows that came together, those that can share a batch in one run.

    Args:
        sampler: the loaded artefact.
        rows: what is asked for, in any mixture.
        on_step: called after each step with the places of the rows that run (counted from 0 in `rows`), the steps done and the steps in
            all, of this run: the plan's rows come first, those of full compute after them. A TokenCacheError that it raises ends the
            run of these rows, and is their answer.

    Returns:
        For each row its answer, or why it has none. A row that is bad fails alone with a BadRowError, one whose latents or pixels
        became NaN or infinite with a RowError. Any other error is none of the rows': the run of all of them failed, or was ended.
    """
    found: dict[int, Answer | TokenCacheError] = {}
    runs: dict[bool, dict[int, Row]] = {False: {}, True: {}}
    for place, row in enumerate(rows):
        try:
            usable = checked(sampler.manifest, row)
        except TokenCacheError as error:
            found[place] = BadRowError(str(error))
        else:
            runs[usable.full][place] = usable
    for full, together in runs.items():
        if together:
            found |= zip(together, _made(sampler, together, full, on_step), strict=True)
    return [found[place] for place in range(len(rows))]


def _made(sampler: CachedSampler, rows: Mapping[int, Row], full: bool, on_step: OnStep | None) -> list[Answer | TokenCacheError]:
    """Answers of checked rows that can share a batch, by their places."""
    places, asked = tuple(rows), list(rows.values())

    def done(step: int, steps: int) -> None:
        if on_step is not None:
            on_step(places, step, steps)

    try:
        result = sampler.sample(
            conditions={name: np.stack([row.conditions[name] for row in asked]) for name in asked[0].conditions},
            seed=[row.seed for row in asked],
            indices=[row.index for row in asked],
            guidance=[row.guidance for row in asked if row.guidance is not None],  # checked rows have one
            full=full,
            on_step=done,
            strict=False,
        )
    except TokenCacheError as error:
        return [error for _ in asked]
    images = [None] * len(asked) if result.images is None else list(result.images)
    return [
        RowError(result.failed[k])
        if k in result.failed
        else Answer(result.latents[k], images[k], receipt_of_one(result.receipt, sampler.manifest, k))
        for k in range(len(asked))
    ]
