"""Writing a teacher."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.digest import config_json, digest, plain
from tc_lightning.models.dit import DiT


def save_teacher(model: DiT, path: Path) -> None:
    """Write the model as `.safetensors` with its family, shape and digest; an interrupted write leaves the old file in place.

    Raises:
        TeacherError: if the file cannot be written.
    """
    config = config_json(model.config, model.family)
    state = {name: plain(tensor) for name, tensor in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, temporary, {"dit_config": config, "output": model.config.output, "sha256": digest(config, state)})
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
