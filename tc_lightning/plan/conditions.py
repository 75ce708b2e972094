"""What a request must bring to a network: named conditions. Plain data; their values are in `tc_lightning.plan.given`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.plan.json_fields import MOST, as_list, check_keys, is_int, is_ints, is_name, is_number, shown

DTYPES = ("int64", "fp32")
STORED, SAME = "stored", "same"  # null values that are no number: a row that the network holds, and the request's own value
_ASKED = ("labels", "conditions", "seed", "guidance", "first_index", "indices", "negative")
_MANNER = ("full", "on_step", "timing", "pixels", "strict")
_RECORDED = ("x", "x_prev", "eps", "step", "index", "latent", "noise")
RESERVED = (*_ASKED, *_MANNER, *_RECORDED, "t")  # words that a request, a recorded set or a network uses for something else


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition of a network.

    Args:
        name: what requests, recorded sets and graphs call it.
        dtype: int64 or fp32.
        shape: shape for one image.
        null: the null value of classifier-free guidance: a number that fills it, `stored` (the network holds a row of it, and a request
            may bring its own), or `same` (both halves of guidance have the image's own). None: there is none, and guidance must be 1.
        classes: of a class label, how many there are: labels are 0 to classes - 1. 0 for any other condition.
        mask: whether it marks with 1, among zeros, what of another condition is there: something in every row.

    Raises:
        PlanError: if a field is not possible.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    null: float | str | None = None
    classes: int = 0
    mask: bool = False

    def __post_init__(self) -> None:
        where = f"condition {self.name!r}"
        if not self.name.isidentifier() or self.name in RESERVED:
            raise PlanError(f"{where}: a name of letters and digits was expected, and none of {', '.join(RESERVED)}.")
        if self.dtype not in DTYPES:
            raise PlanError(f"{where}: unknown dtype {self.dtype!r}, choose one of {', '.join(DTYPES)}.")
        if not all(1 <= size <= MOST for size in self.shape):
            raise PlanError(f"{where}: its shape {list(self.shape)} must hold sizes of at least 1.")
        if isinstance(self.null, str):
            if self.null not in (STORED, SAME):
                raise PlanError(f"{where}: its null value {self.null!r} is neither a number nor one of {STORED}, {SAME}.")
        elif self.null is not None and not (math.isfinite(self.null) and (self.dtype == "fp32" or is_int(self.null))):
            raise PlanError(f"{where}: its null value {self.null} is not a {self.dtype}.")
        if not 0 <= self.classes <= MOST or (self.classes and (self.dtype, self.shape) != ("int64", ())):
            raise PlanError(f"{where}: {self.classes} classes are those of an int64 label without a shape, at least 1; others have 0.")
        if self.mask and (self.dtype != "int64" or not self.shape):
            raise PlanError(f"{where}: a mask is int64 with a shape.")

    @property
    def in_words(self) -> str:
        """What a value for each image is, for a person."""
        if self.mask:
            return f"0 and 1 of shape {list(self.shape)}"
        return f"classes 0 to {self.classes - 1}" if self.classes else f"{self.dtype} of shape {list(self.shape)}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; whether it is a mask where it is one."""
        plain = dataclasses.asdict(self) | {"shape": list(self.shape)}
        return plain if plain.pop("mask") is False else plain | {"mask": True}

    @classmethod
    def from_json(cls, raw: Any, where: str) -> Condition:
        """Inverse of `to_json`.

        Raises:
            PlanError: if a key is missing or unknown, or a value has the wrong type.
        """
        check_keys(raw, {"name", "dtype", "shape", "null", "classes"}, {"mask"}, where)
        if not (is_name(raw["name"]) and is_name(raw["dtype"]) and is_ints(raw["shape"]) and is_int(raw["classes"])):
            raise PlanError(f"{where}: name and dtype must be names, shape a list of integers, and classes an integer.")
        if raw["null"] not in (None, STORED, SAME) and not is_number(raw["null"]):
            raise PlanError(f"{where}.null: expected a number, {STORED}, {SAME} or null, found {shown(raw['null'])}.")
        if raw.get("mask", True) is not True:
            raise PlanError(f"{where}.mask: expected true, or nothing, found {shown(raw['mask'])}.")
        return cls(raw["name"], raw["dtype"], tuple(raw["shape"]), raw["null"], raw["classes"], "mask" in raw)


Conditions = tuple[Condition, ...]


def conditions_from_json(raw: Any, where: str) -> Conditions:
    """The conditions of a model from their JSON list.

    Raises:
        PlanError: if one is damaged, or two have one name.
    """
    found = tuple(Condition.from_json(one, f"{where} {j}") for j, one in enumerate(as_list(raw, where)))
    require_distinct(found)
    return found


def require_distinct(conditions: Conditions) -> None:
    """Refuse two conditions of one name.

    Raises:
        PlanError: naming them all.
    """
    names = [condition.name for condition in conditions]
    if len({*names}) < len(names):
        raise PlanError(f"the model's conditions are {', '.join(names)}: each needs a name to itself.")


def class_label(conditions: Conditions) -> Condition:
    """The class label of a model whose only condition that is.

    Raises:
        TokenCacheError: if the model takes anything else.
    """
    if len(conditions) == 1 and conditions[0].classes:
        return conditions[0]
    names = ", ".join(f"{c.name} ({c.in_words})" for c in conditions) or "none"
    raise TokenCacheError(
        f"labels are for models whose one condition is a class; this model's conditions are {names}: give those by name."
    )
