"""From a file or folder to a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.diffusers_folder import CONFIG, is_diffusers, read_diffusers
from tc_lightning.models.checkpoints.mdt_release import is_mdt, mdt_shape, read_mdt, tells_mdt
from tc_lightning.models.checkpoints.mismatch import CONFIGURATION, LABELS, likeness, require_match, require_weights
from tc_lightning.models.checkpoints.safetensors_file import read_safetensors
from tc_lightning.models.checkpoints.spec import TeacherSpec, locate, resolve, resolve_family
from tc_lightning.models.checkpoints.state import State
from tc_lightning.models.checkpoints.state_choice import ReadState, as_they_are, choose
from tc_lightning.models.checkpoints.torch_file import read_torch
from tc_lightning.models.dit import DiT, DiTConfig
from tc_lightning.models.families import build, family_of
from tc_lightning.models.mdt import MDT
from tc_lightning.models.network import Network
from tc_lightning.plan.given import read_examples


def load_teacher(spec: TeacherSpec, tell: Callable[[str], None] = print) -> Network:
    """Load a frozen teacher in eval mode, fp32, on the CPU.

    Args:
        spec: which one.
        tell: called with one line that says what was chosen, stripped or left out; not called for a plain state dict.

    Raises:
        TeacherError: if the checkpoint is missing, damaged or unsafe, holds several networks of which none is preferred, its shape
            is unknown or contradicted, its keys do not match, or a weight is not finite.
    """
    path = locate(spec.weights)
    read, found, told = _read(path)
    family = resolve_family(spec, told, path)
    config = resolve(spec, found, path)
    labels: list[str] = []
    if issubclass(family, DiT):
        if config is None:
            like = likeness(read.state) or "for example DiT-XL/2"
            raise TeacherError(f"{path} does not tell the model's shape: set `preset` ({like}) or `dit`.")
        config, labels = _with_labels(config, read.state)
        model: Network = _build(family, config, read.state, path, f"its {CONFIG}" if is_diffusers(path) else CONFIGURATION)
    else:
        model = _rebuild(family.family, found, read.state, path)
    if spec.conditions is not None:
        model.examples = read_examples(Path(spec.conditions).expanduser(), model.conditions)
    if notes := [*read.notes, *labels]:
        tell(f"{path}: {'; '.join(notes)}")
    return model


def _read(path: Path) -> tuple[ReadState, Any, str | None]:
    """Weights; shape and family as far as the file tells them."""
    if is_diffusers(path):
        return *read_diffusers(path), DiT.family
    if path.suffix == ".safetensors":
        tensors, found, family = read_safetensors(path)
        own = family is not None and not issubclass(family_of(family).network, DiT)  # names of its own, and no release's
        if own or found is not None:
            return as_they_are(tensors, path) if own else choose(tensors, path), found, family
        return _released(tensors, path)
    return _released(read_torch(path), path)


def _released(raw: Any, path: Path) -> tuple[ReadState, Any, str | None]:
    """Weights under a release's names. An MDTv2's tell what it is; a DiT's and a SiT's are alike, and do not tell how many heads."""
    read = choose(raw, path, read=lambda weights, path: read_mdt(weights, path) if is_mdt(weights) else as_they_are(weights, path))
    return (read, mdt_shape(read.state, path), MDT.family) if tells_mdt(read.state) else (read, None, None)


def _with_labels(config: DiTConfig, state: State) -> tuple[DiTConfig, list[str]]:
    """The shape without a null label if the table has a row for each class and no more, and the note that says so."""
    rows = len(state[LABELS]) if LABELS in state and state[LABELS].ndim else None
    if not config.null_label or rows != config.num_classes:
        return config, []
    note = f"the label table has as many rows as there are classes ({rows}), none for a null label: guidance must be 1"
    return dataclasses.replace(config, null_label=False), [note]


def _build(family: type[DiT], config: DiTConfig, state: State, path: Path, asker: str) -> DiT:
    with torch.device("meta"):
        model = family(config)
    if "pos_embed" not in state:  # a fixed table: some releases leave it out
        state["pos_embed"] = model.pos_embed.detach()
    require_match(config, state, path, asker)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _rebuild(family: str, config: Any, state: State, path: Path) -> Network:
    """A network of a family with names of its own, from a file that tells its shape."""
    if config is None:
        raise TeacherError(
            f"{path} does not tell the shape of a {family}: write it with `tc_lightning.models.checkpoints.save_teacher`."
        )
    model = build(family, dataclasses.asdict(config))
    require_weights(model, state, path)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
