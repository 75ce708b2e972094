"""Writing a teacher."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.digest import SHAPE, config_json, digest, null_tensors, plain
from tc_lightning.models.families import own_schedule
from tc_lightning.models.network import Network


def save_teacher(model: Network, path: Path) -> None:
    """Write a model of any family as `.safetensors`, with family, shape, schedule, null values and digest; the old file stays if
    interrupted.

    Raises:
        TeacherError: if the file cannot be written.
    """
    config = config_json(model.config, model.family, own_schedule(model))
    state = {name: plain(tensor) for name, tensor in model.state_dict().items()} | null_tensors(model)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        output = {"output": model.config.output} if hasattr(model.config, "output") else {}
        save_file(state, temporary, {SHAPE: config, "sha256": digest(config, state)} | output)
        temporary.chmod(0o644)  # safetensors makes it private
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"cannot write the teacher to {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
