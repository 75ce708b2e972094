"""From a file or folder to a teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.diffusers_folder import read_diffusers
from tc_lightning.models.checkpoints.safetensors_file import read_safetensors
from tc_lightning.models.checkpoints.spec import TeacherSpec, locate, resolve
from tc_lightning.models.checkpoints.state import State
from tc_lightning.models.checkpoints.torch_file import read_torch
from tc_lightning.models.dit import DiT, DiTConfig


def load_teacher(spec: TeacherSpec) -> DiT:
    """Load a frozen teacher in eval mode, fp32, on the CPU.

    Raises:
        TeacherError: if the checkpoint is missing, damaged or unsafe, its shape is unknown or contradicted, its keys do not
            match, or a weight is not finite.
    """
    path = locate(spec.weights)
    state: State
    found: DiTConfig | None
    if path.is_dir():
        state, found = read_diffusers(path)
    elif path.suffix == ".safetensors":
        state, found = read_safetensors(path)
    else:
        state, found = read_torch(path), None
    return _build(resolve(spec, found, path), state, path)


def _build(config: DiTConfig, state: State, path: Path) -> DiT:
    with torch.device("meta"):
        model = DiT(config)
    if "pos_embed" not in state:  # a fixed table: some releases leave it out
        state["pos_embed"] = model.pos_embed.detach()
    _match({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, state, path)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _match(expected: dict[str, tuple[int, ...]], state: State, path: Path) -> None:
    """Every key there, none left over, every shape right."""
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    faults += [f"unexpected {name} {shape}" for name, shape in found.items() if name not in expected]
    faults += [f"{n} should be {s}, is {found[n]}" for n, s in expected.items() if n in found and found[n] != s]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise TeacherError(
            f"{path} does not fit the model: {'; '.join(faults[:5])}{more}. Check the shape (`preset`, `dit`, `input_size`)."
        )
