"""Conditions that are masks: what they may hold, and what plans say of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.models.pixart import PixArt, PixArtConfig
from tc_lightning.plan.conditions import STORED, Condition
from tc_lightning.plan.given import checked_value

MASK = Condition("heard", "int64", (3,), STORED, mask=True)


def test_a_mask_of_each_row() -> None:
    rows = [[1, 0, 0], [0, 1, 1]]
    assert checked_value(MASK, rows).tolist() == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 1, 0], [0, 0, 0]], "heard marks nothing in row 1: there must be a 1"),
        ([[1, 2, 0]], "heard holds 2: a mask is of 0 and 1"),
        ([[1, 0, -1]], "heard holds -1"),
        ([[1, 0]], "0 and 1 of shape .3. for each image"),
        ([[1.0, 0.0, 1.0]], "heard has the type float64"),
    ],
)
def test_masks_that_are_refused(rows: list[Any], message: str) -> None:
    with pytest.raises(TokenCacheError, match=message):
        checked_value(MASK, np.array(rows))


def test_plans_say_what_a_mask_is_and_nothing_of_others() -> None:
    assert MASK.to_json()["mask"] is True
    assert Condition.from_json(MASK.to_json(), "c") == MASK
    other = Condition("heard", "int64", (3,), 1)
    assert "mask" not in other.to_json()
    assert Condition.from_json(other.to_json(), "c") == other


@pytest.mark.parametrize("value", [False, None, 1, "yes"])
def test_damaged_words_of_a_mask(value: Any) -> None:
    with pytest.raises(PlanError, match=r"c\.mask: expected true"):
        Condition.from_json(MASK.to_json() | {"mask": value}, "c")


@pytest.mark.parametrize(("dtype", "shape"), [("fp32", (3,)), ("int64", ())])
def test_masks_that_cannot_be(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="a mask is int64 with a shape"):
        Condition("heard", dtype, shape, 1, mask=True)


def test_pixarts_is_one() -> None:
    model = PixArt(PixArtConfig(8, 2, 4, 8, 24, depth=1, num_heads=3, text_tokens=5, text_width=6))
    assert [condition.name for condition in model.conditions if condition.mask] == ["text_mask"]
