"""diffusers' `SD3Transformer2DModel`: Stable Diffusion 3 and 3.5. diffusers itself is not needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.diffusers_config import CONFIG, ConfigFields, ReadNetwork
from tc_lightning.models.checkpoints.diffusers_weights import read_state
from tc_lightning.models.checkpoints.mismatch import require_weights
from tc_lightning.models.checkpoints.state import State
from tc_lightning.models.sd3 import SD3, SD3Config

_FIELDS = ConfigFields(
    read={
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 18,
        "attention_head_dim": 64,
        "num_attention_heads": 18,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 96,
        "dual_attention_layers": [],
    },
    fixed={},
    free=("caption_projection_dim", "out_channels", "qk_norm"),  # looked at below
    model="Stable Diffusion 3",
)
_ANCHORS = ("pos_embed.proj.weight", "context_embedder.weight", "proj_out.weight")
_TABLE = "pos_embed.pos_embed"
_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "pooled_embedder.0",
    "time_text_embed.text_embedder.linear_2": "pooled_embedder.2",
    "context_embedder": "text_embedder",
    "norm_out.linear": "final_adaLN.linear",
    "proj_out": "proj_out",
}
_BLOCK = {
    "norm1.linear": "adaLN.linear",
    "norm1_context.linear": "text_adaLN.linear",
    "attn.to_out.0": "attn.proj",
    "attn.norm_q": "attn.norm_q",
    "attn.norm_k": "attn.norm_k",
    "attn.to_add_out": "text_attn.proj",
    "attn.norm_added_q": "text_attn.norm_q",
    "attn.norm_added_k": "text_attn.norm_k",
    "attn2.to_out.0": "attn2.proj",
    "attn2.norm_q": "attn2.norm_q",
    "attn2.norm_k": "attn2.norm_k",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "ff_context.net.0.proj": "text_mlp.fc1",
    "ff_context.net.2": "text_mlp.fc2",
}
_PROJECTIONS = {f"{name}.to_{letter}": (name, letter) for name in ("attn", "attn2") for letter in "qkv"} | {
    f"attn.add_{letter}_proj": ("text_attn", letter) for letter in "qkv"
}
_UNREAD = ("attn.add_q_proj", "attn.norm_added_q")  # of the last block: queries of a text that is only attended to


def read_sd3(path: Path, config: dict[str, Any]) -> ReadNetwork:
    """See `tc_lightning.models.checkpoints.diffusers_config.Reader`."""
    folder = path if path.is_dir() else path.parent
    shape = _shape(config, folder / CONFIG)
    read = read_state(path, _ANCHORS)
    with torch.device("meta"):
        model = SD3(shape)
    state = _rename(read.state, shape, path)
    require_weights(
        model, state, path, f"Its weights and its {CONFIG} are of two networks, or some are lost: fetch the folder again, whole."
    )
    model.load_state_dict(state, assign=True)
    return ReadNetwork(model.eval().requires_grad_(False), read.notes)


def _shape(raw: dict[str, Any], path: Path) -> SD3Config:
    """Translate config.json."""
    c = _FIELDS.of(raw, path)
    width = c["num_attention_heads"] * c["attention_head_dim"]
    out = raw.get("out_channels", 16)
    wide = {"caption_projection_dim": (raw.get("caption_projection_dim", 1152), width)}
    wide["out_channels"] = (c["in_channels"] if out is None else out), c["in_channels"]
    for name, (found, expected) in wide.items():
        if found != expected:
            raise TeacherError(
                f"{path}: {name} is {found!r}; a Stable Diffusion 3 of this shape has {expected}, and nothing else is supported."
            )
    norm, duals = raw.get("qk_norm"), c["dual_attention_layers"]
    if norm not in (None, "rms_norm"):
        raise TeacherError(f"{path}: qk_norm is {norm!r}; a Stable Diffusion 3 has none, or 'rms_norm', and nothing else is supported.")
    if not all(type(block) is int for block in duals):
        raise TeacherError(f"{path}: dual_attention_layers is {duals!r}; a list of blocks' numbers was expected.")
    if c["patch_size"] < 1:
        raise TeacherError(f"{path}: patch_size is {c['patch_size']}; it must be at least 1.")
    return SD3Config(
        input_size=c["sample_size"],
        patch_size=c["patch_size"],
        in_channels=c["in_channels"],
        hidden_size=width,
        depth=c["num_layers"],
        num_heads=c["num_attention_heads"],
        text_width=c["joint_attention_dim"],
        pooled_width=c["pooled_projection_dim"],
        position_grid=c["pos_embed_max_size"],
        position_base=c["sample_size"] // c["patch_size"],
        dual_blocks=" ".join(map(str, sorted({*duals}))),
        qk_norm=norm is not None,
    )


def _rename(state: State, shape: SD3Config, path: Path) -> State:
    """diffusers' names -> ours; what is not recognised keeps its name and is reported."""
    renamed: State = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for name in list(state):
        tensor = state.pop(name)
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem)
        index, part = block.groups() if block else ("", stem)
        if block and int(index) == shape.depth - 1 and part in _UNREAD:
            continue
        if block and part in _PROJECTIONS:
            owner, letter = _PROJECTIONS[part]
            projections.setdefault(f"blocks.{index}.{owner}", {})[f"{letter}.{kind}"] = tensor
        elif block and part in _BLOCK:
            renamed[f"blocks.{index}.{_BLOCK[part]}.{kind}"] = tensor
        elif stem in _ENDS:
            renamed[f"{_ENDS[stem]}.{kind}"] = tensor
        elif name == _TABLE:
            renamed["pos_embed"] = _middle(tensor, shape, path)
        else:
            renamed[name] = tensor
    return renamed | {name: tensor for owner, parts in projections.items() for name, tensor in _join(owner, parts)}


def _join(owner: str, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """One matrix, and one bias, from those of q, k and v: `attn.qkv.weight`, or `attn.kv.weight` where there are no queries."""
    for kind in dict.fromkeys(key.partition(".")[2] for key in parts):
        letters = [letter for letter in "qkv" if f"{letter}.{kind}" in parts]
        present = [parts[f"{letter}.{kind}"] for letter in letters]
        if present:
            same = all(part.shape[1:] == present[0].shape[1:] for part in present)
            yield f"{owner}.{''.join(letters)}.{kind}", torch.cat(present) if same else present[0]


def _middle(table: Tensor, shape: SD3Config, path: Path) -> Tensor:
    """The positions of an image [1, N, D], from the middle of the whole table."""
    side, grid = shape.position_grid, shape.grid
    if tuple(table.shape) != (1, side**2, shape.hidden_size):
        raise TeacherError(
            f"{path}: {_TABLE} has the shape {tuple(table.shape)}, and its {CONFIG} says {(1, side**2, shape.hidden_size)}: "
            "fetch the folder again, whole."
        )
    first = (side - grid) // 2
    return table.unflatten(1, (side, side))[:, first : first + grid, first : first + grid].flatten(1, 2).contiguous()
