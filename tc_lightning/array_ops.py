"""The few array operations that caching and sampling need, so that torch and the exporter share one definition of both.

Shape suffixes: B batch, L blocks, N tokens, K kept tokens, D width, C H W latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Array = Any  # a torch.Tensor, or the exporter's symbolic value: both have + - *


class Ops(Protocol):
    """The few operations beyond + - * that caching and sampling need.

    An index of tokens is [K], the same for every row of the batch, or [B, K], each row's own.
    """

    def take(self, x_BND: Array, index: Array) -> Array:
        """The tokens `index` of `x`, [B, K, D]."""

    def put(self, x_BND: Array, index: Array, rows_BKD: Array) -> Array:
        """`x` with the tokens `index` replaced."""

    def block_mean(self, a_BLN: Array, start: int, stop: int) -> Array:
        """Mean over blocks `start` to `stop` (exclusive), [B, N]."""

    def floor(self, x: Array) -> Array:
        """Largest integers that are not above, in the same type."""

    def constant(self, values: np.ndarray, like: Array) -> Array:
        """Constant of the type of `like`."""

    def top(self, x_BN: Array, keep: int) -> Array:
        """Indices [B, keep] of the largest values, in any order; no two values of a row are equal."""

    def concat(self, parts: Sequence[Array], axis: int) -> Array:
        """Concatenation."""

    def halves(self, x: Array) -> tuple[Array, Array]:
        """First and second half of the batch."""

    def channels(self, x_BCHW: Array, start: int, stop: int) -> Array:
        """A range of channels."""


class TorchOps:
    """`Ops` on torch tensors."""

    def take(self, x_BND: Tensor, index: Tensor) -> Tensor:
        """See `Ops`."""
        if index.ndim == 1:
            return x_BND.index_select(1, index)
        return x_BND.gather(1, index[:, :, None].expand(-1, -1, x_BND.shape[2]))

    def put(self, x_BND: Tensor, index: Tensor, rows_BKD: Tensor) -> Tensor:
        """See `Ops`."""
        if index.ndim == 1:
            return x_BND.index_copy(1, index, rows_BKD)
        return x_BND.scatter(1, index[:, :, None].expand_as(rows_BKD), rows_BKD)

    def block_mean(self, a_BLN: Tensor, start: int, stop: int) -> Tensor:
        """See `Ops`."""
        return a_BLN[:, start:stop].mean(1)

    def floor(self, x: Tensor) -> Tensor:
        """See `Ops`."""
        return x.floor()

    def constant(self, values: np.ndarray, like: Tensor) -> Tensor:
        """See `Ops`."""
        return torch.as_tensor(values, dtype=like.dtype, device=like.device)

    def top(self, x_BN: Tensor, keep: int) -> Tensor:
        """See `Ops`."""
        return x_BN.topk(keep, dim=1, sorted=False).indices

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """See `Ops`."""
        return torch.cat(list(parts), axis)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Ops`."""
        first, second = x.chunk(2)
        return first, second

    def channels(self, x_BCHW: Tensor, start: int, stop: int) -> Tensor:
        """See `Ops`."""
        return x_BCHW[:, start:stop]
