"""The release's MDTv2 (github.com/sail-sg/MDT): a state dict whose names tell that it is one, and its shape."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.mismatch import observed
from tc_lightning.models.checkpoints.state import State, to_state
from tc_lightning.models.checkpoints.state_choice import ReadState
from tc_lightning.models.mdt import MDTConfig, relative_positions

_ENCODER, _OUT, _DECODER, _SIDE = "en_inblocks", "en_outblocks", "de_blocks", "sideblocks"
_BIAS = "attn.rel_pos_bias."
_INDEX = "relative_position_index"
_TABLE = "relative_position_bias_table"  # of each block here, and of no other family's
_CONVENTIONS = ("freq_shift", "mlp_norm_eps", "null_label", "output")  # the release has them as they are by default
_PLACE = r"blocks\.(\d+)\.pos_embed"
_MASKED_ALONE = f"left out the mask token and `{_SIDE}.*`, which nothing goes through when no token is masked"


def is_mdt(weights: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of a released MDTv2."""
    return any(name.startswith(f"{_ENCODER}.") for name in weights)


def tells_mdt(state: State) -> bool:
    """Whether weights are what `read_mdt` made."""
    return any(name.endswith(f".{_TABLE}") for name in state)


def read_mdt(weights: Mapping[str, Tensor], path: Path) -> ReadState:
    """The weights that act when nothing is masked, under the names of `tc_lightning.models.mdt`, and what was left out.

    Raises:
        TeacherError: if a value cannot be a weight, or positions are not related as the release relates them.
    """
    counts = {stem: _count(weights, stem) for stem in (_ENCODER, _OUT)}
    first = {_ENCODER: 0, _OUT: counts[_ENCODER], _DECODER: sum(counts.values())}
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{_SIDE}.") and name != "mask_token"}
    indices = {name: kept.pop(name) for name in list(kept) if name.endswith(_BIAS + _INDEX)}
    for name, index in indices.items():
        _require_index(index, name, path)
    state = {_renamed(name, first): tensor for name, tensor in to_state(kept, path).items()}
    for name in [name for name in state if re.fullmatch(_PLACE, name)]:
        state[name] = state[name].flatten(0, -2)  # [1, N, D] there
    return ReadState(state, [_MASKED_ALONE] if len(kept) + len(indices) < len(weights) else [])


def mdt_shape(state: State, path: Path) -> MDTConfig:
    """The shape of weights from `read_mdt`: all of it is told by tensors.

    Raises:
        TeacherError: if a tensor that tells of it is missing, or tells what cannot be.
    """
    fields: dict[str, Any] = observed(state)
    table = state.get(f"blocks.0.{_TABLE}")
    placed = [int(match[1]) for name in state if (match := re.fullmatch(_PLACE, name))]
    if table is not None and table.ndim == 2:
        fields["num_heads"] = table.shape[1]
    if placed and "depth" in fields:
        fields["decode_layers"] = fields["depth"] - placed[0]
    untold = [field.name for field in dataclasses.fields(MDTConfig) if field.name not in (*fields, *_CONVENTIONS)]
    if untold:
        raise TeacherError(
            f"{path} holds an MDTv2, but its tensors do not tell {', '.join(untold)}: some are lost. Fetch it again, whole."
        )
    return MDTConfig(**fields)


def _count(weights: Mapping[str, Tensor], stem: str) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith(f"{stem}.")})


def _renamed(name: str, first: Mapping[str, int]) -> str:
    """The name of a weight here; `first` are the numbers of the blocks that the release counts from 0 each."""
    if name == "decoder_pos_embed":
        return f"blocks.{first[_DECODER]}.pos_embed"
    stem, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    if stem not in first or not number.isdigit():
        return name
    return f"blocks.{first[stem] + int(number)}.{part.removeprefix(_BIAS)}"


def _require_index(index: Tensor, name: str, path: Path) -> None:
    """Check that pairs of tokens have the rows of the table that they have in the release."""
    grid = round(index.numel() ** 0.25)
    if index.numel() != grid**4 or not torch.equal(index.reshape(grid**2, grid**2), relative_positions(grid)):
        raise TeacherError(f"{path}: {name} relates positions otherwise than the release of MDTv2 does, and cannot be read as one.")
