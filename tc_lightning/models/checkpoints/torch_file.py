"""`.pt` files: the original release's, and what training scripts write. Nothing in them is executed."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import torch

from tc_lightning.errors import TeacherError, first_line


def read_torch(path: Path) -> Any:
    """What the file holds: tensors in plain containers, and the arguments of the release's training script.

    Raises:
        TeacherError: if the file is damaged, or holds anything that could run code.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the release's training script stores its arguments
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise TeacherError(
            f"{path} cannot be read as a checkpoint of plain tensors ({first_line(error)[:200]}). Either it is damaged, and should be "
            "fetched again, or it is a pickle of other objects, which is not opened because that can run code: where you trust "
            "it, save `model.state_dict()` alone, best as .safetensors."
        ) from error
