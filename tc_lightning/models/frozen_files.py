"""Files of small networks that were trained beside a frozen teacher, and the digests by which plans name them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from tc_lightning.errors import RunError
from tc_lightning.plan.atomic import write_atomically
from tc_lightning.plan.tensor_files import TensorFileError, read_tensors

Module = TypeVar("Module", bound=nn.Module)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes and values in fp32."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        hasher.update(json.dumps([name, list(tensor.shape)]).encode())
        hasher.update(tensor.detach().to("cpu").float().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def save_frozen(module: nn.Module, digest: str, path: Path) -> None:
    """Write `.safetensors` atomically; the digest is in its metadata."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    write_atomically(path, save(state, {"digest": digest}))


def load_frozen(module: Module, path: Path, what: str) -> Module:
    """Read what `save_frozen` wrote into a module of its shape.

    Args:
        module: takes the weights.
        path: the file.
        what: what it holds, for a person: `content predictor`.

    Raises:
        RunError: if the file is missing, damaged, or of a module for another teacher.
    """
    try:
        state, metadata = read_tensors(path, "pt")
    except TensorFileError as error:
        raise RunError(f"cannot read the {what} {path}: {error}. Make it again with `lightning fit`.") from error
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        raise RunError(f"{path} does not hold a {what} of this teacher's shape: make it again with `lightning fit`.")
    if state_digest(state) != metadata.get("digest"):
        raise RunError(f"{path} is damaged: its contents do not match its digest. Make it again with `lightning fit`.")
    module.load_state_dict(state)
    return module
