"""diffusers' `PixArtTransformer2DModel`, which holds PixArt-alpha and Sigma. diffusers itself is not needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.diffusers_config import CLASS, CONFIG, ConfigFields, ReadNetwork, read_config
from tc_lightning.models.checkpoints.diffusers_weights import read_state
from tc_lightning.models.checkpoints.mismatch import require_weights
from tc_lightning.models.checkpoints.state import State
from tc_lightning.models.pixart import ALPHA_TOKENS, SIGMA_TOKENS, PixArt, PixArtConfig

_ANCHORS = ("pos_embed.proj.weight", "adaln_single.linear.weight", "proj_out.weight")
_FIELDS = ConfigFields(
    read={
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "num_layers": 28,
        "sample_size": 128,
        "patch_size": 2,
        "norm_eps": 1e-6,
    },
    fixed={
        "norm_type": "ada_norm_single",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "attention_type": "default",
        # These the older class had for other models.
        "double_self_attention": False,
        "num_vector_embeds": None,
        "only_cross_attention": False,
    },
    # Those that may be null are read apart; the others change nothing in a run of the network without training.
    free=(
        "out_channels",
        "cross_attention_dim",
        "caption_channels",
        "interpolation_scale",
        "use_additional_conditions",
        "dropout",
        "norm_num_groups",
        "num_embeds_ada_norm",
        "upcast_attention",
        "use_linear_projection",
    ),
    model="PixArt",
)
_STEMS = {
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "proj_out": "final_layer.linear",
    "": "final_layer",  # of its table
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_EMBEDDERS = {"timestep": "t_embedder", "resolution": "csize_embedder", "aspect_ratio": "ar_embedder"}
_JOINED = {"attn1": ("attn.qkv", "qkv"), "attn2": ("cross_attn.kv_linear", "kv")}
_SIGMA = "PixArtSigmaPipeline"


def read_pixart(path: Path, config: dict[str, Any]) -> ReadNetwork:
    """See `tc_lightning.models.checkpoints.diffusers_config.Reader`."""
    folder = path if path.is_dir() else path.parent
    shape = pixart_shape(config, folder)
    read = read_state(path, _ANCHORS)
    state = _rename(read.state)
    with torch.device("meta"):
        model = PixArt(shape)
    state.setdefault("pos_embed", model.pos_embed.detach())  # a table that the shape tells, which diffusers keeps no more
    require_weights(model, state, path, f"They have to be those of its {CONFIG}: fetch the folder again, whole.")
    model.load_state_dict(state, assign=True)
    notes = [f"takes texts of {shape.text_tokens} tokens of {shape.text_width} features"]
    return ReadNetwork(model.eval().requires_grad_(False), [*read.notes, *notes])


def pixart_shape(raw: dict[str, Any], folder: Path) -> PixArtConfig:
    """What the config.json of a folder says of the shape; a value that may be null means there what diffusers takes it for.

    Raises:
        TeacherError: naming a field that is not known, or not supported.
    """
    path = folder / CONFIG
    c = _FIELDS.of(raw, path)
    width, side, channels = c["num_attention_heads"] * c["attention_head_dim"], c["sample_size"], c["in_channels"]
    text, projected = _size(raw, "cross_attention_dim", 1152, path), _size(raw, "caption_channels", None, path)
    if text is None:
        raise TeacherError(f"{path}: cross_attention_dim is null; a PixArt attends to a text, whose width was expected.")
    if projected is not None and text != width:
        raise TeacherError(f"{path}: cross_attention_dim is {text}, and texts are projected to the network's width, {width}.")
    interpolated, sized = raw.get("interpolation_scale"), raw.get("use_additional_conditions")
    if interpolated is not None and (type(interpolated) not in (int, float) or not interpolated > 0):
        raise TeacherError(f"{path}: interpolation_scale is {interpolated!r}; a number above 0 was expected, or null.")
    if sized is not None and type(sized) is not bool:
        raise TeacherError(f"{path}: use_additional_conditions is {sized!r}; true, false or null was expected.")
    return PixArtConfig(
        input_size=side,
        patch_size=c["patch_size"],
        in_channels=channels,
        out_channels=_size(raw, "out_channels", None if raw.get(CLASS) == "Transformer2DModel" else 8, path) or channels,
        hidden_size=width,
        depth=c["num_layers"],
        num_heads=c["num_attention_heads"],
        text_tokens=SIGMA_TOKENS if _is_sigma(folder) else ALPHA_TOKENS,
        text_width=text if projected is None else projected,
        project_text=projected is not None,
        position_step=1.0 / (max(side // 64, 1) if interpolated is None else interpolated),
        sized=side == 128 if sized is None else sized,
        norm_eps=c["norm_eps"],
    )


def _size(raw: dict[str, Any], key: str, default: int | None, path: Path) -> int | None:
    """A size that may be null."""
    value = raw.get(key, default)
    if value is not None and (type(value) is not int or value < 1):
        raise TeacherError(f"{path}: {key} is {value!r}; a positive integer was expected, or null.")
    return value


def _is_sigma(folder: Path) -> bool:
    """Whether the folder is part of a pipeline of PixArt-Sigma; by itself, a transformer does not tell which of the two it is."""
    index = folder.parent / "model_index.json"
    return index.is_file() and read_config(index).get(CLASS) == _SIGMA


def _rename(state: State) -> State:
    """diffusers' names -> the release's; what is not recognised keeps its name and is reported when the model is built."""
    renamed: State = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)(?:\.(.+))?", stem)
        before, part = (f"blocks.{block[1]}.", block[2] or "") if block else ("", stem)
        embedder = re.fullmatch(r"adaln_single\.emb\.(\w+)_embedder\.linear_([12])", stem)
        parted = re.fullmatch(r"(attn[12])\.to_([qkv])", part) if block else None
        if parted and parted[2] in _JOINED[parted[1]][1]:
            joined.setdefault(f"{before}{_JOINED[parted[1]][0]}.{kind}", {})[parted[2]] = tensor
        elif embedder and embedder[1] in _EMBEDDERS:
            renamed[f"{_EMBEDDERS[embedder[1]]}.mlp.{2 * int(embedder[2]) - 2}.{kind}"] = tensor
        elif block and not part:
            renamed[before + kind] = tensor
        else:
            kept = "pos_embed" if name == "pos_embed.pos_embed" else name
            renamed[f"{before}{_STEMS[part]}.{kind}" if part in _STEMS else kept] = tensor
    return renamed | {name: _join(parts) for name, parts in joined.items()}


def _join(parts: dict[str, Tensor]) -> Tensor:
    """One matrix from queries, keys and values, or the last two; a missing one shows as a wrong shape."""
    present = [parts[letter] for letter in "qkv" if letter in parts]
    same = all(part.shape[1:] == present[0].shape[1:] for part in present)
    return torch.cat(present) if same else present[0]
