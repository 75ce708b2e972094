"""From a file or folder to a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tc_lightning.errors import TeacherError, TokenCacheError
from tc_lightning.models.checkpoints.diffusers_config import ReadNetwork
from tc_lightning.models.checkpoints.diffusers_folder import is_diffusers, read_diffusers
from tc_lightning.models.checkpoints.dit_folder import build_dit, with_labels
from tc_lightning.models.checkpoints.mdt_release import is_mdt, mdt_shape, read_mdt, tells_mdt
from tc_lightning.models.checkpoints.mismatch import CONFIGURATION, likeness, require_weights
from tc_lightning.models.checkpoints.safetensors_file import SafetensorsFile, read_safetensors
from tc_lightning.models.checkpoints.spec import TeacherSpec, locate, locate_conditions, resolve, resolve_family
from tc_lightning.models.checkpoints.state import State
from tc_lightning.models.checkpoints.state_choice import ReadState, as_they_are, choose
from tc_lightning.models.checkpoints.torch_file import read_torch
from tc_lightning.models.dit import DiT
from tc_lightning.models.families import build, family_of
from tc_lightning.models.mdt import MDT
from tc_lightning.models.network import Network
from tc_lightning.plan.given import Arrays
from tc_lightning.plan.nulls import checked_stored, require_together
from tc_lightning.plan.rows_file import read_rows

_OWN = "Write it again with `save_teacher`."
_RELEASED = "These are the weights of another network, or some are lost: fetch the file again, whole."


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
    model, notes = _from_folder(spec, path) if is_diffusers(path) else _from_file(spec, path)
    if spec.text_tokens is not None:
        model = _with_text_tokens(model, spec.text_tokens)
    if spec.conditions is not None:
        rows = read_rows(locate_conditions(spec.conditions), model.conditions)
        model.examples = rows.examples
        require_together(model.conditions, rows.nulls)
        model.nulls = {**(model.nulls or {}), **checked_stored(model.conditions, rows.nulls)} or None
    if notes:
        tell(f"{path}: {'; '.join(notes)}")
    return model


def _from_folder(spec: TeacherSpec, path: Path) -> ReadNetwork:
    """What a folder of diffusers holds: it tells its class and its shape, which the user may only repeat."""
    read = read_diffusers(path)
    resolve_family(spec, read.model.family, path)
    resolve(spec, read.model.config, path)
    return read


def _from_file(spec: TeacherSpec, path: Path) -> ReadNetwork:
    read, file = _read(path)
    family = resolve_family(spec, file.family, path)
    config = resolve(spec, file.config, path)
    if not issubclass(family, DiT):
        model = _rebuild(family.family, file, read.state, path)
        model.nulls = _nulls(model, file, path)
        return ReadNetwork(model, read.notes)
    if config is None:
        like = likeness(read.state) or "for example DiT-XL/2"
        raise TeacherError(f"{path} does not tell the model's shape: set `preset` ({like}) or `dit`.")
    config, labels = with_labels(config, read.state)
    model = build_dit(family, config, read.state, path, CONFIGURATION)
    model.schedule = file.schedule or model.schedule
    return ReadNetwork(model, [*read.notes, *labels])


def _nulls(model: Network, file: SafetensorsFile, path: Path) -> Arrays | None:
    """The null values that a file stores, as the network holds them."""
    if file.nulls is None:
        return None
    try:
        return checked_stored(model.conditions, {name: value.numpy() for name, value in file.nulls.items()})
    except TokenCacheError as error:
        raise TeacherError(f"{path}: {error} Write it again with `save_teacher`.") from error


def _read(path: Path) -> tuple[ReadState, SafetensorsFile]:
    """Weights; and the file, as far as it tells shape, family and schedule."""
    if path.suffix != ".safetensors":
        return _released(read_torch(path), path)
    file = read_safetensors(path)
    if file.config is None:
        return _released(file.tensors, path)
    own = not issubclass(family_of(file.family or DiT.family).network, DiT)  # names of its own, and no release's
    return as_they_are(file.tensors, path) if own else choose(file.tensors, path), file


def _released(raw: Any, path: Path) -> tuple[ReadState, SafetensorsFile]:
    """Weights under a release's names. An MDTv2's tell what it is; a DiT's and a SiT's are alike, and do not tell how many heads."""
    read = choose(raw, path, read=lambda weights, path: read_mdt(weights, path) if is_mdt(weights) else as_they_are(weights, path))
    told = (mdt_shape(read.state, path), MDT.family) if tells_mdt(read.state) else ()
    return read, SafetensorsFile({}, *told)


def _with_text_tokens(model: Network, tokens: int) -> Network:
    """The same weights for texts of another length."""
    if not hasattr(model.config, "text_tokens"):
        raise TeacherError(f"a {model.family} takes no text: remove `text_tokens`.")
    with torch.device("meta"):
        other = type(model)(dataclasses.replace(model.config, text_tokens=tokens))
    other.load_state_dict(model.state_dict(), assign=True)
    vars(other).update({name: value for name, value in vars(model).items() if name not in vars(other)})  # its schedule, for example
    return other.eval().requires_grad_(False)


def _rebuild(family: str, file: SafetensorsFile, state: State, path: Path) -> Network:
    """A network of a family with names of its own, from a file that tells its shape."""
    if file.config is None:
        raise TeacherError(
            f"{path} does not tell the shape of a {family}: write it with `tc_lightning.models.checkpoints.save_teacher`."
        )
    model = build(family, dataclasses.asdict(file.config))
    model.schedule = file.schedule or model.schedule
    require_weights(model, state, path, _OWN if file.tensors else _RELEASED)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
