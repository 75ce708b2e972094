"""A state dict whose every value was checked, and the reading of JSON beside it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tc_lightning.errors import TeacherError

State = dict[str, Tensor]


def to_state(tensors: dict[str, Tensor], path: Path) -> State:
    """Own fp32 copies of named tensors.

    Raises:
        TeacherError: if one is quantised, sparse or not finite.
    """
    return {name: _checked(name, tensor, path) for name, tensor in tensors.items()}


def _checked(name: str, tensor: Tensor, path: Path) -> Tensor:
    """An own fp32 copy, so that the model does not hang on the file."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise TeacherError(f"{path}: tensor {name} is {tensor.dtype} ({tensor.layout}); dense floating-point weights are expected.")
    own = tensor.to(torch.float32, copy=True)
    if not torch.isfinite(own).all():
        raise TeacherError(f"{path}: tensor {name} holds NaN or infinite values. The checkpoint is damaged or its training diverged.")
    return own


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        TeacherError: if it is anything else.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise TeacherError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise TeacherError(f"{path}: a JSON object was expected, found {type(raw).__name__}.")
    return raw


def sample_values(shape: Any) -> dict[str, Any]:
    """A value of each field's type, of a dataclass of plain values: its default if it has one."""
    plain = {"int": 0, "float": 0.0, "str": "", "bool": False}
    fields = dataclasses.fields(shape)
    return {
        f.name: plain.get(f.type if isinstance(f.type, str) else f.type.__name__) if f.default is dataclasses.MISSING else f.default
        for f in fields
    }


def fits(value: Any, default: Any) -> bool:
    """Whether a value of JSON has the type of a field, of which a value is known."""
    return type(value) is type(default) or (type(default) is float and type(value) is int)
