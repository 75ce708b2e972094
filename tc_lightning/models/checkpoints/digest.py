"""The name of a teacher's weights: a sha256 that no file format, precision of the file or device changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch
from torch import Tensor

from tc_lightning.models.checkpoints.state import State
from tc_lightning.models.dit import DiT, DiTConfig


def teacher_digest(model: DiT) -> str:
    """sha256 of the shape and of every weight in fp32, wherever the model lives."""
    return digest(config_json(model.config), model.state_dict())


def config_json(config: DiTConfig) -> str:
    """Canonical JSON of a shape; a null label goes without saying, as it did when there was no field for it, and what the output is for
    is no part of it: the same weights compute the same."""
    said = {k: v for k, v in dataclasses.asdict(config).items() if k != "output" and (k, v) != ("null_label", True)}
    return json.dumps(said, sort_keys=True)


def digest(config: str, state: State) -> str:
    """sha256 of the text of a shape and of weights in fp32, in the order of their names."""
    hasher = hashlib.sha256(config.encode())
    for name in sorted(state):
        tensor = plain(state[name])
        hasher.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.numpy().data)
    return hasher.hexdigest()


def plain(tensor: Tensor) -> Tensor:
    """The tensor in fp32 on the CPU, contiguous."""
    return tensor.detach().to("cpu", torch.float32).contiguous()
