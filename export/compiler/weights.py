"""The shared weights file: one copy of every tensor, which all graphs of an artefact point into."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tc_lightning.errors import TokenCacheError

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SELECTOR = "selector"  # what the names of the content predictor's weights begin with
CORRECTOR = "corrector"  # the same of the corrector's
CORRECTION_TABLE = f"{CORRECTOR}.terms"  # the corrector's terms [T, R, D]: they depend on the plan's times alone
MODULATION_TABLE = f"{SELECTOR}.modulations"  # the content predictor's adaLN terms [T, 6, D]: they depend on the step alone
_LARGE, _PAGE, _LINE = 1 << 16, 4096, 64  # large tensors start on a page, so that they can be mapped; small ones on a cache line


class External(NamedTuple):
    """A tensor in the shared weights file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def place_weights(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, External]:
    """Where each tensor will be in a weights file of this precision, one after the other."""
    index, end = {}, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * TORCH_DTYPES[dtype].itemsize
        start = end + -end % (_PAGE if nbytes >= _LARGE else _LINE)
        index[name], end = External(dtype, tuple(tensor.shape), start, nbytes), start + nbytes
    return index


def write_weights(tensors: Mapping[str, Tensor], path: Path, index: Mapping[str, External]) -> None:
    """Write tensors to their places, never holding more than one converted copy.

    Raises:
        TokenCacheError: if a weight is not finite in its precision.
    """
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            entry = index[name]
            flat = tensor.detach().to("cpu", TORCH_DTYPES[entry.dtype]).contiguous()
            if not torch.isfinite(flat).all():
                raise TokenCacheError(f"weight {name} is not finite in {entry.dtype}: export with another --precision.")
            file.write(b"\0" * (entry.offset - file.tell()))
            file.write(flat.view(-1).view(torch.uint8).numpy().data)


def read_weights(path: Path, index: dict[str, External]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a weights file, as read-only views of the mapped file."""
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)
    for name, entry in index.items():
        raw = torch.from_numpy(mapped[entry.offset : entry.offset + entry.nbytes])
        yield name, raw.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)
