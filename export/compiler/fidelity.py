"""What a plan costs and what it saves: the artefact's run against that of its reference at full compute, same seeds, same session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from export.runtime.sampler import CachedSampler, Result
from tc_lightning.measure.psnr import psnr, squared_errors
from tc_lightning.plan.given import Arrays, drawn


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
            result = sampler.sample(conditions=given, seed=seed, first_index=first, full=full)
            runs[full].append(result)
            times[full].append(result.receipt["ms"] / len(part))
        if on_batch is not None:
            on_batch(len(part))
    full_x, cached_x = (np.concatenate([r.latents for r in runs[full]]) for full in (True, False))
    full_ms, cached_ms = (float(np.median(times[full][1:] or times[full])) for full in (True, False))
    return Fidelity(full_x, cached_x, full_ms, cached_ms)
