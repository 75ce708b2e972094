"""`.pt` files: the original release's, and what training scripts write. Nothing in them is executed."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import torch

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.state import State, to_state


def read_torch(path: Path) -> State:
    """A state dict, plain or under `ema` or `model`, without ever running code from the file."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the release's training script stores its arguments
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TeacherError(
            f"{path} cannot be read as a checkpoint of plain tensors ({reason[:200]}). Either it is damaged, and should be "
            "fetched again, or it is a pickle of other objects, which is not opened because that can run code: where you trust "
            "it, save `model.state_dict()` alone, best as .safetensors."
        ) from error
    for key in ("ema", "model"):
        if isinstance(raw, dict) and isinstance(raw.get(key), dict):
            return to_state(raw[key], path)
    return to_state(raw, path)
