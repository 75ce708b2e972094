"""How good a plan's images are: closeness to full compute, image by image and as a set.

The Frechet distance is between Gaussians fitted to features of the *teacher*: it is named so and is not comparable with any FID.

Shape suffixes: B images, C H W latent, N tokens, D feature width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tc_lightning.errors import TokenCacheError, first_line
from tc_lightning.measure.psnr import is_pixels
from tc_lightning.models.conditions import Asked, given_of
from tc_lightning.models.network import Network, compute_through
from tc_lightning.rollout.sampling import device_of

FEATURE_TIME = 50.0  # of 1,000: nearly clean, which is what the final latents are
INCEPTION_FEATURES, INCEPTION_BATCH = 2048, 16


def visible(latents_BCHW: np.ndarray) -> np.ndarray:
    """What is seen of the output: pixels clipped to [-1, 1]; latents as they are."""
    return np.clip(latents_BCHW, -1.0, 1.0) if is_pixels(latents_BCHW) else latents_BCHW


@torch.no_grad()
def teacher_features(model: Network, latents_BCHW: np.ndarray, asked: Asked, batch: int = 32) -> np.ndarray:
    """Tokens after the teacher's middle block at a small time and the image's conditions, averaged over the image, [B, D] float64."""
    device, parts = device_of(model), []
    for x, y in zip(torch.from_numpy(latents_BCHW).split(batch), given_of(model.conditions, asked).split(batch), strict=True):
        terms = model.terms(torch.full((len(x),), FEATURE_TIME, device=device), y.to(device))
        z_BND = model.embed(x.to(device), terms.start)
        z_BND = compute_through(list(model.blocks)[: (model.config.depth + 1) // 2], terms.blocks, z_BND)
        parts.append(z_BND[:, model.fixed_tokens :].double().mean(1).cpu())
    return torch.cat(parts).numpy()


def frechet_distance(a_BD: np.ndarray, b_BD: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians with the means and covariances of two sets: |m - n|^2 + Tr(S + R - 2 (S R)^1/2).

    With X and Y the centred features over sqrt(B - 1), S = X^T X and R = Y^T Y, and the trace of the root is the sum of the singular
    values of X Y^T: exact however few images there are, and no root of a singular matrix is taken (Heusel et al., arXiv 1706.08500).

    Raises:
        TokenCacheError: if a set has fewer than two images.
    """
    if min(len(a_BD), len(b_BD)) < 2:
        raise TokenCacheError("a Frechet distance needs at least two images on each side: raise --images.")
    mean = np.square(a_BD.mean(0) - b_BD.mean(0)).sum()
    x, y = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (a_BD, b_BD))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(max(mean + np.square(x).sum() + np.square(y).sum() - 2 * root, 0.0))


class InceptionFID:
    """FID of torchmetrics against one reference set, with Inception weights that the user has.

    Args:
        weights: file of `pt_inception-2015-12-05` as torch-fidelity takes it.
        reference_BCHW: images of full compute in [-1, 1].

    Raises:
        TokenCacheError: if torch-fidelity is missing, the weights cannot be loaded, or the model makes latents, not images.
    """

    def __init__(self, weights: Path, reference_BCHW: np.ndarray) -> None:
        if not weights.is_file():
            raise TokenCacheError(f"no Inception weights at {weights}: name a local file with --inception, or leave it out.")
        if not is_pixels(reference_BCHW):
            raise TokenCacheError(
                f"--inception needs images, and this model makes latents of {reference_BCHW.shape[1]} channels: leave it out."
            )
        from torchmetrics.image.fid import FrechetInceptionDistance

        try:
            self._metric = FrechetInceptionDistance(
                INCEPTION_FEATURES, reset_real_features=False, normalize=True, feature_extractor_weights_path=str(weights)
            )
        except ModuleNotFoundError as error:
            raise TokenCacheError(
                "--inception needs the package torch-fidelity, which is not installed: `pip install torch-fidelity`, or leave it out."
            ) from error
        except Exception as error:  # whatever unpickling a file that is something else may raise
            raise TokenCacheError(f"{weights} does not hold Inception weights of torch-fidelity: {first_line(error)}.") from error
        self._update(reference_BCHW, real=True)

    def __call__(self, images_BCHW: np.ndarray) -> float:
        """FID of a set of images in [-1, 1]."""
        self._metric.reset()
        self._update(images_BCHW, real=False)
        return float(self._metric.compute())

    def _update(self, images_BCHW: np.ndarray, real: bool) -> None:
        for x in torch.from_numpy((visible(images_BCHW) + 1) / 2).float().split(INCEPTION_BATCH):
            self._metric.update(x.expand(-1, 3, -1, -1), real=real)
