"""The shared weights file: one copy of every tensor, which all graphs of an artefact point into."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.symbolic import External
from tc_lightning.errors import TokenCacheError

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LARGE, _PAGE, _LINE = (
    1 << 16,
    4096,
    64,
)  # large tensors start on a page, so that they can be mapped; small ones on a cache line


def write_weights(tensors: Iterable[tuple[str, Tensor]], path: Path, dtype: str) -> dict[str, External]:
    """Write tensors one after the other, never holding more than one converted copy.

    Raises:
        TokenCacheError: if a weight is not finite in this precision.
    """
    index: dict[str, External] = {}
    with path.open("wb") as file:
        for name, tensor in tensors:
            flat = tensor.detach().to("cpu", TORCH_DTYPES[dtype]).contiguous()
            if not torch.isfinite(flat).all():
                raise TokenCacheError(f"weight {name} is not finite in {dtype}: export with another --precision.")
            align = _PAGE if flat.nbytes >= _LARGE else _LINE
            file.write(b"\0" * (-file.tell() % align))
            index[name] = External(dtype, tuple(flat.shape), file.tell(), flat.nbytes)
            file.write(flat.view(-1).view(torch.uint8).numpy().data)
    return index


def read_weights(path: Path, index: dict[str, External]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a weights file, as read-only views of the mapped file."""
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)
    for name, entry in index.items():
        raw = torch.from_numpy(mapped[entry.offset : entry.offset + entry.nbytes])
        yield name, raw.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)
