"""diffusers' `DiTTransformer2DModel`, which also holds for the class that was its name before. diffusers itself is not needed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.diffusers_config import CONFIG, ConfigFields, ReadNetwork
from tc_lightning.models.checkpoints.diffusers_weights import read_state
from tc_lightning.models.checkpoints.mismatch import LABELS, require_match
from tc_lightning.models.checkpoints.state import State
from tc_lightning.models.checkpoints.state_choice import DIFFUSERS
from tc_lightning.models.dit import DiT, DiTConfig

_FIELDS = ConfigFields(
    read={
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "num_layers": 28,
        "sample_size": 32,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
        "norm_eps": 1e-5,
    },
    fixed={
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        # These the older class had for other models.
        "attention_type": "default",
        "caption_channels": None,
        "cross_attention_dim": None,
        "double_self_attention": False,
        "interpolation_scale": None,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_additional_conditions": None,
    },
    # out_channels is read apart; the others change nothing in a run of the network without training.
    free=("out_channels", "dropout", "norm_num_groups", "upcast_attention", "use_linear_projection"),
    model="DiT",
)
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}


def read_dit(path: Path, config: dict[str, Any]) -> ReadNetwork:
    """See `tc_lightning.models.checkpoints.diffusers_config.Reader`."""
    folder = path if path.is_dir() else path.parent
    shape = _shape(config, folder / CONFIG)
    read = read_state(path, DIFFUSERS)
    state = _rename(read.state, path)
    shape, labels = with_labels(shape, state)
    return ReadNetwork(build_dit(DiT, shape, state, path, f"its {CONFIG}"), [*read.notes, *labels])


def with_labels(config: DiTConfig, state: State) -> tuple[DiTConfig, list[str]]:
    """The shape without a null label if the table has a row for each class and no more, and the note that says so."""
    rows = len(state[LABELS]) if LABELS in state and state[LABELS].ndim else None
    if not config.null_label or rows != config.num_classes:
        return config, []
    note = f"the label table has as many rows as there are classes ({rows}), none for a null label: guidance must be 1"
    return dataclasses.replace(config, null_label=False), [note]


def build_dit(family: type[DiT], config: DiTConfig, state: State, path: Path, asker: str) -> DiT:
    """A frozen network of a DiT's shape with weights under the release's names.

    Raises:
        TeacherError: if they do not fit; `asker` is who says what shape they should have.
    """
    with torch.device("meta"):
        model = family(config)
    if "pos_embed" not in state:  # a fixed table: some releases leave it out
        state["pos_embed"] = model.pos_embed.detach()
    require_match(config, state, path, asker)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _shape(raw: dict[str, Any], path: Path) -> DiTConfig:
    """Translate config.json; freq_shift and mlp_norm_eps are those with which diffusers runs the weights."""
    c = _FIELDS.of(raw, path)
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
        elif block and part.removeprefix("norm1.emb.") in _EMBEDDERS:
            _share(renamed, f"{_EMBEDDERS[part.removeprefix('norm1.emb.')]}.{kind}", tensor, name, path)
        elif block and part in _BLOCK:
            renamed[f"blocks.{index}.{_BLOCK[part]}.{kind}"] = tensor
        elif stem in _ENDS:
            renamed[f"{_ENDS[stem]}.{kind}"] = tensor
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
