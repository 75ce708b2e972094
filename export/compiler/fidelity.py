"""What a plan costs and what it saves: the artefact's run against that of its reference at full compute, same seeds, same session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from export.runtime.sampler import CachedSampler, Result
from tc_lightning.measure.psnr import PIXEL_RANGE, data_range, psnr, psnr_db, squared_errors
from tc_lightning.measure.ssim import ssim
from tc_lightning.plan.given import Arrays, drawn

PIXEL_IMAGES = 8  # that are decoded to compare them: a decoder may take longer than all steps together


@dataclasses.dataclass(frozen=True)
class PixelFidelity:
    """Cached against full compute in decoded pixels, clipped to [-1, 1].

    Args:
        images: so many were decoded, each twice.
        psnr_db: mean over them of the PSNR, range 2.
        ssim: mean over them of the structural similarity, range 2; None for images too small for it.
    """

    images: int
    psnr_db: float
    ssim: float | None


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Cached against full compute.

    Args:
        full: latents of the reference run, [B, C, H, W].
        cached: latents of the cached run.
        full_ms: median milliseconds an image of full compute, over all steps.
        cached_ms: the same for the cached run.
    """

    full: np.ndarray
    cached: np.ndarray
    full_ms: float
    cached_ms: float

    @property
    def mse(self) -> float:
        """Mean squared error over images."""
        return float(squared_errors(self.cached, self.full).mean())

    @property
    def psnr_db(self) -> float:
        """Mean over images of the PSNR (`tc_lightning.measure.psnr`)."""
        return psnr(self.cached, self.full)

    @property
    def wall_speedup(self) -> float:
        """Time of full compute over time of the cached run, medians of interleaved batches."""
        return self.full_ms / self.cached_ms


def measure(
    sampler: CachedSampler,
    images: int,
    batch: int,
    seed: int,
    on_batch: Callable[[int], None] | None = None,
    examples: Arrays | None = None,
) -> Fidelity:
    """Run `images` images of drawn conditions (`examples` of those that cannot be drawn), cached and full in turn.

    Where there is more than one batch the first is not timed: it warms both up.
    """
    runs: dict[bool, list[Result]] = {True: [], False: []}
    times: dict[bool, list[float]] = {True: [], False: []}
    for first in range(0, images, batch):
        part = range(first, min(first + batch, images))
        given = drawn(sampler.conditions, seed, part, examples)
        for full in (True, False):
            result = sampler.sample(conditions=given, seed=seed, first_index=first, full=full, pixels=False)
            runs[full].append(result)
            times[full].append(result.receipt["ms"] / len(part))
        if on_batch is not None:
            on_batch(len(part))
    full_x, cached_x = (np.concatenate([r.latents for r in runs[full]]) for full in (True, False))
    full_ms, cached_ms = (float(np.median(times[full][1:] or times[full])) for full in (True, False))
    return Fidelity(full_x, cached_x, full_ms, cached_ms)


def measure_pixels(sampler: CachedSampler, fidelity: Fidelity, most: int) -> PixelFidelity | None:
    """The same runs in pixels, of the first `most` images; None where the artefact has no decoder."""
    if sampler.decoder is None:
        return None
    cached, full = (sampler.decoder(latents[:most]) for latents in (fidelity.cached, fidelity.full))
    return pixel_fidelity(cached, full)


def own_ssim(fidelity: Fidelity) -> float | None:
    """Mean SSIM of the model's own output, over the range that its PSNR has; None for images too small for it."""
    similarity = ssim(fidelity.cached, fidelity.full, data_range(fidelity.full))
    return None if similarity is None else float(similarity.mean())


def pixel_fidelity(actual_BCHW: np.ndarray, expected_BCHW: np.ndarray) -> PixelFidelity:
    """PSNR and SSIM of pixels in [-1, 1]."""
    similarity = ssim(actual_BCHW, expected_BCHW, PIXEL_RANGE)
    decibels = psnr_db(squared_errors(actual_BCHW, expected_BCHW), PIXEL_RANGE)
    return PixelFidelity(len(actual_BCHW), decibels, None if similarity is None else float(similarity.mean()))
