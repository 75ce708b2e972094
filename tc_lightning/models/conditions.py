"""Values of a network's conditions in torch, [B, ...] each: taken apart, checked, drawn, and doubled for guidance, here alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tc_lightning.errors import TeacherError, TokenCacheError
from tc_lightning.plan.conditions import SAME, STORED, Condition, Conditions, class_label
from tc_lightning.plan.given import NUMPY_TYPES, Arrays, checked, drawn
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.nulls import checked_negative, missing_in_words, require_together


class Given(Mapping[str, Tensor]):
    """The conditions of some images, by name, each [B, ...].

    Args:
        values: the conditions.
        negative: what guidance leads away from in place of the network's own null values, [B, ...] each; of some conditions, or none.
    """

    def __init__(self, values: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None = None) -> None:
        self._values, self.negative = dict(values), dict(negative or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def images(self) -> int:
        """B, the number of images."""
        return len(next(iter(self._values.values())))

    def part(self, images: slice | Tensor) -> Given:
        """Those of some images."""
        return Given(*({name: value[images] for name, value in part.items()} for part in (self, self.negative)))

    def split(self, size: int) -> list[Given]:
        """Those of every `size` images in turn."""
        return [self.part(slice(start, start + size)) for start in range(0, self.images, size)]

    def to(self, device: torch.device | str) -> Given:
        """The same on a device."""
        return Given(*({name: value.to(device) for name, value in part.items()} for part in (self, self.negative)))

    def with_nulls(self, conditions: Conditions, nulls: Arrays | None) -> Given:
        """The rows that a guided step computes: these, then as many null values, of which `nulls` are the network's stored ones.

        Raises:
            TeacherError: if a stored one is neither there nor brought along.
        """
        return Given({c.name: torch.cat([self[c.name], self._null_of(c, nulls or {})]) for c in conditions})

    def _null_of(self, condition: Condition, nulls: Arrays) -> Tensor:
        own = self[condition.name]
        if condition.name in self.negative:
            return self.negative[condition.name].to(own)
        if condition.null == SAME:
            return own
        if condition.null != STORED:
            return torch.full_like(own, condition.null or 0)  # type: ignore[arg-type]
        if condition.name not in nulls:
            raise TeacherError(missing_in_words(condition.name))
        return torch.from_numpy(nulls[condition.name]).to(own).expand_as(own)


Asked = Given | Mapping[str, Tensor] | Tensor  # a bare tensor is the labels [B] of a class-conditional network


def given_of(conditions: Conditions, asked: Asked) -> Given:
    """Conditions by name, whichever way they were asked for.

    Raises:
        TokenCacheError: if labels are given to a network that takes anything else.
    """
    return asked if isinstance(asked, Given) else Given(by_name(conditions, asked))


def by_name(conditions: Conditions, asked: Asked) -> Mapping[str, Tensor]:
    """The same, as a network takes it."""
    return {class_label(conditions).name: asked} if isinstance(asked, Tensor) else asked


def require_given(conditions: Conditions, given: Given) -> None:
    """Refuse values that the network cannot take.

    Raises:
        TokenCacheError: if a condition is missing or unknown, or a value has another type or shape, or is out of range.
    """
    values, negative = ({name: value.detach().cpu().numpy() for name, value in part.items()} for part in (given, given.negative))
    checked(conditions, values)
    for name, rows in checked_negative(conditions, negative, given.images).items():
        if len(rows) != given.images:
            raise TokenCacheError(f"negative has {len(rows)} row of {name} for {given.images} images: give one for each.")
    require_together(conditions, negative)


def require_null(conditions: Conditions, guidance: Guidance, nulls: Arrays | None, negative: Collection[str] = ()) -> None:
    """Refuse guidance where there is nothing to guide away from, and a negative where there is no guidance.

    Args:
        conditions: of the network.
        guidance: that is asked for.
        nulls: the network's stored null values.
        negative: conditions of which a request brings a null value.

    Raises:
        TeacherError: if the guidance scale is not 1 and a condition has no null value.
        TokenCacheError: if it is 1, and a request brings null values.
    """
    if negative and not guidance.doubles_batch:
        raise TokenCacheError(
            f"negative ({', '.join(negative)}) was given, and guidance is 1, which leads away from nothing: leave it out, or set "
            "`guidance_scale`."
        )
    for condition in conditions if guidance.doubles_batch else ():
        if condition.null == STORED and condition.name not in {*(nulls or ()), *negative}:
            raise TeacherError(missing_in_words(condition.name))
        if condition.null is not None:
            continue
        if not condition.classes:
            raise TeacherError(
                f"guidance {guidance.scale:g} needs a null value of every condition, and the teacher's {condition.name} has none: "
                "set `guidance_scale` to 1."
            )
        classes = condition.classes
        other = f", or, if the last row is the null label, `num_classes` to {classes - 1}" if classes > 1 else ""
        raise TeacherError(
            f"guidance {guidance.scale:g} needs a null label, and the teacher has none: the rows of its label table are as many as its "
            f"classes ({classes}). Set `guidance_scale` to 1{other}."
        )


def labels_in(conditions: Conditions, given: Given) -> dict[str, list[int]]:
    """The classes that occur, as plans record them; nothing of a network that takes anything else."""
    found = [given[c.name].unique().tolist() for c in conditions if c.classes]
    return {"labels": found[0]} if found and len(conditions) == 1 else {}


def null_rows(conditions: Conditions, like_B: Tensor, nulls: Arrays | None = None) -> Given:
    """Null values of all conditions, a row for each of `like_B`, where it is; zeros where there is none, or `nulls` has none stored."""
    types = {"int64": torch.int64, "fp32": torch.float32}
    zeros = {c.name: torch.zeros(len(like_B), *c.shape, dtype=types[c.dtype], device=like_B.device) for c in conditions}
    held = zeros_for(conditions) | dict(nulls or {})
    return Given(zeros).with_nulls(conditions, held).part(slice(len(like_B), None))


def zeros_for(conditions: Conditions) -> dict[str, np.ndarray]:
    """What stands for stored null values where only shapes matter: a row of zeros of each."""
    return {c.name: np.zeros((1, *c.shape), NUMPY_TYPES[c.dtype]) for c in conditions if c.null == STORED}


def drawn_given(
    conditions: Conditions, seed: int, indices: Sequence[int], table: Arrays | None = None, device: torch.device | str = "cpu"
) -> Given:
    """Conditions of images `indices` that nobody gave any (`tc_lightning.plan.given.drawn`)."""
    found = drawn(conditions, seed, indices, table)
    return Given({name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in found.items()})
