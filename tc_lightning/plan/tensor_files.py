"""Reading of safetensors files that may be damaged: one message for whatever is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tc_lightning.errors import first_line


class TensorFileError(ValueError):
    """A file is missing, or is not a safetensors file of tensors that can be held here."""


def read_tensors(path: Path, framework: str) -> tuple[dict[str, Any], dict[str, str]]:
    """All tensors of a file by name, which are floating-point ones, and its metadata.

    Args:
        path: the file.
        framework: `np` for numpy arrays, `pt` for torch tensors.

    Raises:
        TensorFileError: if it cannot be read. A header may ask for types that the framework lacks or shapes that nothing can have, of
            which each library says something else.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework) as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except Exception as error:
        raise TensorFileError(first_line(error)) from error
    for name, tensor in tensors.items():
        if not (tensor.dtype.kind == "f" if framework == "np" else tensor.is_floating_point()):
            raise TensorFileError(f"{name} is of type {tensor.dtype}, and floating-point numbers were expected")
    return tensors, metadata
