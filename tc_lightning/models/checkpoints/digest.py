"""The name of a teacher's weights: a sha256 that no file format, precision of the file or device changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from tc_lightning.models.checkpoints.state import State
from tc_lightning.models.dit import DiT
from tc_lightning.models.families import own_schedule
from tc_lightning.models.network import Network
from tc_lightning.plan.nulls import PREFIX

FAMILY, SCHEDULE = "family", "schedule"  # beside the fields of a shape
SHAPE = "dit_config"  # the key of both in the metadata of a file, whatever the family


def teacher_digest(model: Network) -> str:
    """sha256 of the shape, of a schedule that is not the family's, of every weight in fp32, wherever the model lives, and of the null
    values that it holds, without which a guided run would be another."""
    return digest(config_json(model.config, model.family, own_schedule(model)), {**model.state_dict(), **null_tensors(model)})


def null_tensors(model: Network) -> State:
    """The null values that a network holds, by the names that they have beside weights."""
    return {PREFIX + name: torch.from_numpy(value) for name, value in (model.nulls or {}).items()}


def config_json(config: Any, family: str = DiT.family, schedule: dict[str, Any] | None = None) -> str:
    """Canonical JSON of family, shape and `own_schedule`; a DiT, a null label and the family's schedule go without saying, as they did
    when there were no fields for them.

    What the output is for is no part of it: the same weights compute the same.
    """
    told = dataclasses.asdict(config) | {FAMILY: family, SCHEDULE: schedule}
    silent = (("null_label", True), (FAMILY, DiT.family), (SCHEDULE, None))
    return json.dumps({k: v for k, v in told.items() if k != "output" and (k, v) not in silent}, sort_keys=True)


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
