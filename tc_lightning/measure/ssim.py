"""Structural similarity, as torchmetrics computes it. Shape suffixes: B images, C channels, H W."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SSIM_SIDE = 6  # the window of SSIM (sigma 1.5, 11 pixels) cannot be mirrored around smaller images


def ssim(actual_BCHW: np.ndarray, expected_BCHW: np.ndarray, span: float) -> np.ndarray | None:
    """Structural similarity of each image, [B] (Wang et al. 2004, as torchmetrics computes it); None for images too small for it."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(actual_BCHW.shape[2:]) < SSIM_SIDE:
        return None
    actual, expected = (torch.from_numpy(np.ascontiguousarray(x)).double() for x in (actual_BCHW, expected_BCHW))
    values = structural_similarity_index_measure(actual, expected, data_range=span, reduction="none")
    assert isinstance(values, Tensor)
    return values.numpy()
