"""Why weights do not fit a shape: the fields that differ, as far as tensors tell them, before any key."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.state import State
from tc_lightning.models.dit import DiT, DiTConfig, preset
from tc_lightning.models.network import Network

LABELS = "y_embedder.embedding_table.weight"
CONFIGURATION = "the configuration"
_LISTED = 5  # keys named
_PRESETS = tuple(f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8))


REMEDY = "These are the weights of another network, or some are lost: fetch the file again, or write it with `save_teacher`."


def require_weights(network: Network, state: State, path: Path, remedy: str = REMEDY) -> None:
    """Check the same of a network whose shape no tensors tell.

    Args:
        network: of the shape that weights should have.
        state: the weights.
        path: where they are from, for messages.
        remedy: what to do if they do not fit.

    Raises:
        TeacherError: naming the keys.
    """
    if faults := _differences(network, state):
        more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        told = "; ".join(faults[:_LISTED]) + more
        raise TeacherError(f"{path} does not fit a {network.family} of its shape: {told}. {remedy}")


def require_match(config: DiTConfig, state: State, path: Path, asker: str) -> None:
    """Check that every key is there, none is left over and every shape is right.

    Args:
        config: the shape that weights should have.
        state: the weights.
        path: where they are from, for messages.
        asker: who says that they have it: the configuration, or a file.

    Raises:
        TeacherError: naming the fields of the shape that differ; and keys, as far as these do not explain them.
    """
    if not _faults(config, state):
        return
    seen = {name: value for name, value in observed(state, config.null_label).items() if value != getattr(config, name)}
    if "mlp_ratio" in seen and int(config.hidden_size * seen["mlp_ratio"]) == config.mlp_size:
        del seen["mlp_ratio"]
    causes = [f"{n} is {value}{_or_more(n, value)} in the weights and {getattr(config, n)} in {asker}" for n, value in seen.items()]
    try:
        rest = _faults(dataclasses.replace(config, **seen, num_heads=1), state)  # the number of heads changes no tensor
    except TeacherError:  # the fields contradict each other: keys must tell
        rest = _faults(config, state)
    more = f"; and {len(rest) - _LISTED} more" if len(rest) > _LISTED else ""
    told = "; ".join([*causes, *rest[:_LISTED]]) + more
    like = f"; the weights look like {known}" if asker == CONFIGURATION and (known := likeness(state)) else ""
    where = "`preset`, `dit` or `input_size`" if asker == CONFIGURATION else asker
    remedy = f"Correct {where}{like}." if causes else "These are the weights of another network, or some are lost."
    raise TeacherError(f"{path} does not fit the model: {told}. {remedy}")


def observed(state: State, null_label: bool = True) -> dict[str, Any]:
    """Fields of a shape that the tensors tell, the deepest consequence first; those that cannot be told are absent.

    Args:
        state: weights under the release's names.
        null_label: whether the last row of the label table is the null label.
    """
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    fields: dict[str, Any] = {"depth": len(blocks)} if blocks == set(range(len(blocks))) != set() else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    patches, table = shapes.get("x_embedder.proj.weight", ()), shapes.get("pos_embed", ())
    labels, inner, out = shapes.get(LABELS, ()), shapes.get("blocks.0.mlp.fc1.weight", ()), shapes.get("final_layer.linear.weight", ())
    if len(patches) == 4 and min(patches):
        width, channels, patch = patches[:3]
        fields |= {"hidden_size": width, "patch_size": patch, "in_channels": channels}
        if len(table) == 3 and math.isqrt(table[1]) ** 2 == table[1]:
            fields["input_size"] = math.isqrt(table[1]) * patch
        if len(inner) == 2:
            fields["mlp_ratio"] = inner[0] / width
        if len(out) == 2 and out[0] in (channels * patch**2, 2 * channels * patch**2):
            fields["learn_sigma"] = out[0] == 2 * channels * patch**2
    if len(labels) == 2:
        fields["num_classes"] = labels[0] - null_label
    return fields


def likeness(state: State) -> str:
    """The preset that the weights could be of, as settings to copy; empty if there is none."""
    seen = observed(state)
    for name in _PRESETS:
        shape = preset(name)
        if all(seen.get(field) == getattr(shape, field) for field in ("depth", "hidden_size", "patch_size")):
            return f"`preset: {name}`" + (f" with `input_size: {seen['input_size']}`" if "input_size" in seen else "")
    return ""


def _or_more(name: str, value: Any) -> str:
    return f" (or {value + 1} if the label table has no row for a null label)" if name == "num_classes" else ""


def _faults(config: DiTConfig, state: State) -> list[str]:
    with torch.device("meta"):
        return _differences(DiT(config), state)


def _differences(network: Network, state: State) -> list[str]:
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    faults += [f"unexpected {name} {shape}" for name, shape in found.items() if name not in expected]
    return faults + [f"{n} should be {s}, is {found[n]}" for n, s in expected.items() if n in found and found[n] != s]
