"""What a request returns. Shape suffixes: B images, C H W latent."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Result:
    """What a request returns.

    Args:
        latents: the model's own output, [B, C, H, W] float32.
        images: pixels in [-1, 1], [B, C, H, W] float32, of a model that makes pixels, or by the artefact's decoder; None where there
            is none, or pixels were not asked for.
        receipt: what ran, in plain JSON values.
        failed: why there is no image, of those whose latents or pixels became NaN or infinite; only where they were not to be raised.
    """

    latents: np.ndarray
    images: np.ndarray | None
    receipt: dict[str, Any]
    failed: dict[int, str] = dataclasses.field(default_factory=dict)
