"""Values of a network's conditions in torch, [B, ...] each: taken apart, checked, drawn, and doubled for guidance, here alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tc_lightning.errors import TeacherError
from tc_lightning.plan.conditions import Conditions, class_label
from tc_lightning.plan.given import Arrays, checked, drawn
from tc_lightning.plan.guidance import Guidance


class Given(Mapping[str, Tensor]):
    """The conditions of some images, by name, each [B, ...]."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = dict(values)

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
        return Given({name: value[images] for name, value in self.items()})

    def split(self, size: int) -> list[Given]:
        """Those of every `size` images in turn."""
        return [self.part(slice(start, start + size)) for start in range(0, self.images, size)]

    def to(self, device: torch.device | str) -> Given:
        """The same on a device."""
        return Given({name: value.to(device) for name, value in self.items()})

    def with_nulls(self, conditions: Conditions) -> Given:
        """The rows that a guided step computes: these, then as many null values."""
        return Given({c.name: torch.cat([self[c.name], torch.full_like(self[c.name], c.null or 0)]) for c in conditions})


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
    checked(conditions, {name: value.detach().cpu().numpy() for name, value in given.items()})


def require_null(conditions: Conditions, guidance: Guidance) -> None:
    """Refuse guidance where there is nothing to guide away from.

    Raises:
        TeacherError: if the guidance scale is not 1 and a condition has no null value.
    """
    for condition in conditions if guidance.doubles_batch else ():
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


def null_rows(conditions: Conditions, like_B: Tensor) -> Given:
    """Null values of all conditions, a row for each of `like_B`, where it is."""
    types = {"int64": torch.int64, "fp32": torch.float32}
    return Given(
        {c.name: torch.full((len(like_B), *c.shape), c.null or 0, dtype=types[c.dtype], device=like_B.device) for c in conditions}
    )


def drawn_given(
    conditions: Conditions, seed: int, indices: Sequence[int], table: Arrays | None = None, device: torch.device | str = "cpu"
) -> Given:
    """Conditions of images `indices` that nobody gave any (`tc_lightning.plan.given.drawn`)."""
    found = drawn(conditions, seed, indices, table)
    return Given({name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in found.items()})
