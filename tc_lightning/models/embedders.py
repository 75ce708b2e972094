"""Embedders that families of diffusion transformers share: of time, of labels, of patches and of positions.

Shape suffixes: B batch, C channels, H W latent height and width, N tokens, D width.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from tc_lightning.models.lean import patch_tokens, time_features

FREQUENCIES = 256  # width of the sinusoidal timestep features


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of time, then a two-layer MLP."""

    def __init__(self, hidden_size: int, freq_shift: float = 0.0) -> None:
        super().__init__()
        self.freq_shift = freq_shift
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t_B: Tensor) -> Tensor:
        """Embed times as they are given (fractions are allowed), [B] -> [B, D]."""
        features = time_features(t_B, FREQUENCIES, self.freq_shift)
        return self.mlp(features.to(self.mlp[0].weight.dtype))  # type: ignore[arg-type]


class LabelEmbedder(nn.Module):
    """Class embedding; the last row is the null label, if there is one."""

    def __init__(self, num_classes: int, hidden_size: int, null_label: bool = True) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_label, hidden_size)

    def forward(self, y_B: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        return self.embedding_table(y_B)


class PatchEmbed(nn.Module):
    """Non-overlapping patches -> tokens, in row-major order."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, D]."""
        return patch_tokens(x_BCHW, self.proj.weight, self.proj.bias)


def unpatched(patches_BNF: Tensor, grid: int, patch_size: int) -> Tensor:
    """Patches of side P, in row-major order, pixel by pixel and in each channel by channel -> image [B, C, grid P, grid P]."""
    P, patches = patch_size, patches_BNF.reshape(-1, grid, grid, patch_size, patch_size, patches_BNF.shape[-1] // patch_size**2)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, patches.shape[-1], grid * P, grid * P)


def sincos_position_embedding(dim: int, grid: int, first: float = 0.0, step: float = 1.0) -> np.ndarray:
    """Fixed 2-D sine-cosine table [grid * grid, dim] in float64; the first half of the features is the column.

    Args:
        dim: features.
        grid: rows, and columns.
        first: where the first of them is.
        step: how far the next is from it.
    """
    places = first + step * np.arange(grid, dtype=np.float64)
    rows, columns = np.meshgrid(places, places, indexing="ij")
    return np.concatenate([_sincos_1d(dim // 2, columns.ravel()), _sincos_1d(dim // 2, rows.ravel())], axis=1)


def _sincos_1d(dim: int, positions: np.ndarray) -> np.ndarray:
    omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angles = positions[:, None] * omega[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
