"""Folders in the layout of diffusers' `DiTTransformer2DModel`. diffusers itself is not needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.diffusers_weights import STEM, WeightsFile, choose_weights, read_weights
from tc_lightning.models.checkpoints.state import State, fits, parse_json
from tc_lightning.models.checkpoints.state_choice import DIFFUSERS, ReadState, choose
from tc_lightning.models.dit import DiTConfig

CONFIG = "config.json"
_DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
_DIFFUSERS_FIXED: dict[str, Any] = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
_DIFFUSERS_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_DIFFUSERS_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
_DIFFUSERS_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}


def is_diffusers(path: Path) -> bool:
    """Whether a path is a folder, or one of the weights files or indices in a model's folder of diffusers."""
    return path.is_dir() or (path.name.startswith(f"{STEM}.") and (path.parent / CONFIG).exists())


def read_diffusers(path: Path) -> tuple[ReadState, DiTConfig]:
    """Weights under the release's names, and the shape.

    Args:
        path: the model's folder or a whole pipeline's; or the one of its weights files (or indices) that is meant.

    Raises:
        TeacherError: if something is missing, damaged or contradictory, or is no DiT of this kind.
    """
    file, folder = (None, path) if path.is_dir() else (path, path.parent)
    if not (folder / CONFIG).exists() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if not (folder / CONFIG).exists():
        raise TeacherError(f"{folder} holds no {CONFIG}; a folder must be in diffusers' layout ({CONFIG} and {STEM}.safetensors).")
    config = _diffusers_config(folder / CONFIG)
    chosen = choose_weights(folder) if file is None else WeightsFile(file, [])
    read = choose(read_weights(chosen.file), chosen.file, DIFFUSERS)
    return ReadState(_rename(read.state, chosen.file), chosen.notes + read.notes), config


def _diffusers_config(path: Path) -> DiTConfig:
    """Translate config.json; freq_shift and mlp_norm_eps are those with which diffusers runs the weights."""
    try:
        raw = parse_json(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"{path} cannot be read ({error}).") from error
    for key, value in _DIFFUSERS_FIXED.items():
        if raw.get(key, value) != value:
            raise TeacherError(f"{path}: {key} is {raw[key]!r}; a DiT has {value!r}, and nothing else is supported.")
    c = {key: raw.get(key, default) for key, default in _DIFFUSERS_DEFAULTS.items()}
    for key, value in c.items():
        if not fits(value, _DIFFUSERS_DEFAULTS[key]):
            raise TeacherError(f"{path}: {key} is {value!r}; a number was expected.")
    channels, out = c["in_channels"], raw.get("out_channels") or c["in_channels"]
    if out not in (channels, 2 * channels):
        raise TeacherError(f"{path}: out_channels is {out!r}; {channels} or {2 * channels} (learned variance) was expected.")
    return DiTConfig(
        input_size=c["sample_size"],
        patch_size=c["patch_size"],
        in_channels=channels,
        hidden_size=c["num_attention_heads"] * c["attention_head_dim"],
        depth=c["num_layers"],
        num_heads=c["num_attention_heads"],
        num_classes=c["num_embeds_ada_norm"],
        learn_sigma=out == 2 * channels,
        freq_shift=1.0,
        mlp_norm_eps=c["norm_eps"],
    )


def _rename(state: State, path: Path) -> State:
    """diffusers' names -> the release's; what is not recognised keeps its name and is reported when the model is built."""
    renamed: State = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem)
        index, part = block.groups() if block else ("", stem)
        if block and part in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
            qkv.setdefault(f"blocks.{index}.attn.qkv.{kind}", {})[part[-1]] = tensor
        elif block and part.removeprefix("norm1.emb.") in _DIFFUSERS_EMBEDDERS:
            _share(renamed, f"{_DIFFUSERS_EMBEDDERS[part.removeprefix('norm1.emb.')]}.{kind}", tensor, name, path)
        elif block and part in _DIFFUSERS_BLOCK:
            renamed[f"blocks.{index}.{_DIFFUSERS_BLOCK[part]}.{kind}"] = tensor
        elif stem in _DIFFUSERS_ENDS:
            renamed[f"{_DIFFUSERS_ENDS[stem]}.{kind}"] = tensor
        else:
            renamed["pos_embed" if name == "pos_embed.pos_embed" else name] = tensor
    return renamed | {name: _join(parts) for name, parts in qkv.items()}


def _share(renamed: State, target: str, tensor: Tensor, name: str, path: Path) -> None:
    """diffusers repeats the embedders in every block; a DiT has one."""
    if not torch.equal(renamed.setdefault(target, tensor), tensor):
        raise TeacherError(
            f"{path}: {name} differs from the same tensor of another block. A DiT has one timestep and one class embedder; "
            "diffusers stores a copy in every block, equal in converted checkpoints but not in models that it trained itself."
        )


def _join(parts: dict[str, Tensor]) -> Tensor:
    """One matrix from q, k and v; a missing one shows as a wrong shape."""
    present = [parts[key] for key in "qkv" if key in parts]
    same = all(p.shape[1:] == present[0].shape[1:] for p in present)
    return torch.cat(present) if same else present[0]
