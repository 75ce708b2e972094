"""Conditions that several images of a batch share are computed once. Needs numpy alone.

Shape suffixes: M rows of the (doubled) batch, U distinct rows of conditions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tc_lightning.plan.conditions import Conditions
from tc_lightning.plan.given import Arrays
from tc_lightning.plan.nulls import with_nulls


class DistinctRows(NamedTuple):
    """Conditions without repetition: place of each batch entry among the distinct rows [M], and these rows by name, [U, ...] each."""

    places_M: np.ndarray
    rows: dict[str, np.ndarray]


def distinct_rows(conditions: Conditions, doubled: bool, given: Arrays, nulls: Arrays | None = None) -> DistinctRows:
    """The distinct rows of conditions of a batch, both halves of guidance if it is `doubled`; equal null ones are one."""
    rows = with_nulls(conditions, given, nulls) if doubled else dict(given)
    first_of: dict[bytes, int] = {}  # by the bytes of a row: numpy.unique would make a field of each byte of a text
    firsts_M = []
    for m in range(len(next(iter(rows.values())))):
        row = b"".join(np.ascontiguousarray(value[m]).tobytes() for value in rows.values())
        firsts_M.append(first_of.setdefault(row, m))
    first_U = list(first_of.values())
    return DistinctRows(np.searchsorted(first_U, firsts_M), {name: value[first_U] for name, value in rows.items()})
