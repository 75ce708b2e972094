"""Checkpoints that are either whole or absent, and resuming from the newest one that loads."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from tc_lightning.errors import RunError, first_line


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder, syncs it to disk, and renames it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """See `lightning.fabric.plugins.CheckpointIO`.

        Raises:
            RunError: if it cannot be written, for want of space or of rights; an older file of that name stays.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            raise RunError(f"cannot write the checkpoint {target} ({first_line(error)}): make room, then resume.") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See `lightning.fabric.plugins.CheckpointIO`; nothing in the file is executed.

        Raises:
            RunError: if the file is missing, damaged, or holds anything but tensors and plain values.
        """
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            raise RunError(
                f"cannot load the checkpoint {path} ({first_line(error)}): name another one, or take `--ckpt_path last`."
            ) from error


def newest_valid_checkpoint(*folders: Path) -> Path | None:
    """The newest checkpoint under some folders that can be loaded; None if there is none. Damaged ones are passed over."""
    found = [path for folder in folders for path in folder.rglob("*.ckpt")]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in found if _loads(path)), None)


def _loads(path: Path) -> bool:
    try:
        return "state_dict" in torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        print(f"passing over the damaged checkpoint {path}: {first_line(error)}")
        return False
