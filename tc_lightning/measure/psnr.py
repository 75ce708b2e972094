"""Peak signal-to-noise ratio, by one rule wherever it is printed. Needs numpy only: it is also taken where there is no torch.

    PSNR of an image = 10 log10(range^2 / MSE)    of the model's own output, unclipped; over images it is the mean

What the range is: of pixels 2, since they lie in [-1, 1]; of latents, which have no bounds, what the reference images span together,
largest less smallest value. It is torchmetrics' `peak_signal_noise_ratio` with that range over dimensions C, H, W (a test holds it to
that), but for one thing: an image without any error counts as 200 dB, which can be averaged and written as JSON.

Shape suffixes: B images, C H W latent.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tc_lightning.plan.signature import PIXELS

PIXEL_RANGE = 2.0
MOST_DB = 200.0


def data_range(reference_BCHW: np.ndarray, output: str) -> float:
    """Largest less smallest value that counts: 2 for pixels in [-1, 1]; of a model of latents, what the reference images span.

    Args:
        reference_BCHW: the reference images.
        output: what they are, as the model's signature says: `pixels` or `latents`.
    """
    return PIXEL_RANGE if output == PIXELS else float(np.ptp(reference_BCHW)) or 1.0


def squared_errors(actual_BCHW: np.ndarray, expected_BCHW: np.ndarray) -> np.ndarray:
    """Mean squared error of each image, [B] float64."""
    return np.square(actual_BCHW.astype(np.float64) - expected_BCHW).reshape(len(actual_BCHW), -1).mean(1)


def psnr_db(mse: Any, span: float = PIXEL_RANGE) -> float:
    """Mean over images of the PSNR in dB.

    Args:
        mse: mean squared error of each image, [B], or one number.
        span: `data_range` of the reference images.
    """
    with np.errstate(divide="ignore"):
        return float(np.minimum(10.0 * np.log10(span**2 / np.asarray(mse, dtype=np.float64)), MOST_DB).mean())


def psnr(actual_BCHW: np.ndarray, reference_BCHW: np.ndarray, output: str) -> float:
    """Mean over images of the PSNR in dB against reference images, whose `data_range` counts."""
    return psnr_db(squared_errors(actual_BCHW, reference_BCHW), data_range(reference_BCHW, output))
