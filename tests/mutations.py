"""Damage to JSON values that a careless edit, a faulty tool or a flipped bit might do: what the tests of readers draw from."""

from __future__ import annotations

import copy
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# FUZZ_EXAMPLES=10000 for a thorough run; the same examples every time.
quickly = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "300")),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53, 2**63, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1.0, -1.5, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")),
    *("", "x", "compute", "content", "attn", "fp16", "..", "../x", "a/b", "\0", "\ud800", "9" * 50),
    *([], [[]], [0], [1, 2], [None], ["attn", "mlp"], {}, {"a": 1}, {"": []}),
)


@st.composite
def damaged(draw: st.DrawFn, intact: Any) -> Any:
    """A JSON value with one to three places changed."""
    box = [copy.deepcopy(intact)]
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        _damage(draw, box)
    return box[0]


def _damage(draw: st.DrawFn, box: list[Any]) -> None:
    holder, key = _place(draw, box)
    value = holder[key]
    kinds = ["replace", "replace", "near", "elsewhere"]
    kinds += ["delete", "swap", "duplicate"] if holder is not box and len(holder) > 1 else []
    kind = draw(st.sampled_from(kinds))
    if kind == "replace":
        holder[key] = copy.deepcopy(draw(st.sampled_from(STRANGE)))
    elif kind == "near":
        holder[key] = draw(st.sampled_from(_near(value)))
    elif kind == "elsewhere":
        other, place = _place(draw, box)
        holder[key] = copy.deepcopy(other[place])
    elif kind == "delete":
        del holder[key]
    elif kind == "swap":
        other = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
        holder[key], holder[other] = holder[other], holder[key]
    elif isinstance(holder, dict):
        holder[f"{key}{draw(st.sampled_from(('', ' ', '2')))}"] = copy.deepcopy(value)
    else:
        holder.insert(key, copy.deepcopy(value))


def _place(draw: st.DrawFn, box: list[Any]) -> tuple[Any, Any]:
    """A container and a key of it, by a walk from the root, so that long lists do not take every turn."""
    holder: Any = box
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 15)):
        holder = holder[key]
        key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    return holder, key


def _near(value: Any) -> list[Any]:
    """What is almost the value."""
    if isinstance(value, bool) or value is None:
        return [int(bool(value)), not value, [value]]
    if isinstance(value, int | float):
        return [value + 1, value - 1, -value, 2 * value, float(value) if abs(value) < 2**60 else 0.5, str(value), [value], bool(value)]
    if isinstance(value, str):
        return [value + "x", value[:-1], value.upper(), [value], {value: value}, value[::-1]]
    if isinstance(value, list):
        return [value[::-1], value[:-1], value * 2, [value], {"0": value}]
    return [list(value), list(value.values()), [value], {**value, "unknown": 1}]
