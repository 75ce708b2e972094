"""What the unconditional half of a guided request is of: the artefact's stored null values, or the request's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.runtime.manifest import AGAIN, NULLS, ArtefactError
from export.runtime.request import Row
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import Conditions
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.nulls import checked_negative, nulls_needed, require_together
from tc_lightning.plan.rows_file import read_nulls


def stored_nulls(folder: Path, manifest: Mapping[str, Any], conditions: Conditions) -> dict[str, np.ndarray]:
    """The null values that an artefact stores, [1, ...] each; none if it needs none.

    Raises:
        ArtefactError: if they are not what its conditions can have.
    """
    if not nulls_needed(conditions, Guidance(**manifest["guidance"])):
        return {}
    try:
        return read_nulls(folder / NULLS, conditions)
    except TokenCacheError as error:
        raise ArtefactError(f"{error} {AGAIN}") from error


def nulls_of(
    conditions: Conditions, stored: Mapping[str, np.ndarray], negative: Mapping[str, Any] | None, rows: Sequence[Row]
) -> dict[str, np.ndarray]:
    """Null values of a request's images, [B, ...] each, or [1, ...] for all of them, where they are no numbers of the conditions.

    Args:
        conditions: of the model.
        stored: the artefact's.
        negative: the request's own, a row of each for all images or for each; None: it has none.
        rows: what else is asked for.

    Raises:
        TokenCacheError: if it has some, and no image is guided; or if they are not what the conditions can have, or not all
            of those that the model stores.
    """
    if negative is not None and all(row.scale == 1.0 for row in rows):
        raise TokenCacheError("negative was given, and guidance is 1, which leads away from nothing: leave it out, or set guidance.")
    own = checked_negative(conditions, negative or {}, len(rows))
    require_together(conditions, own)
    return {**stored, **own}
