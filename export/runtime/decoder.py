"""Pixels of a model's latents: decoder.onnx, run in batches of its own. Needs numpy and onnxruntime alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from export.runtime.buffers import SHRINK
from export.runtime.decoder_contract import DATA, IN, OUT, memory_bytes
from export.runtime.layout import DECODER
from export.runtime.sessions import arena_is_ours, is_int
from tc_lightning.errors import TokenCacheError, first_line


def unscaled(said: Mapping[str, Any], latents_BCHW: np.ndarray) -> np.ndarray:
    """Latents as the decoder takes them, from those that the model makes; `said` is the manifest's word of the decoder."""
    return latents_BCHW / np.float32(said["scaling_factor"]) + np.float32(said["shift_factor"])


class Decoder:
    """The decoder of an artefact.

    Args:
        manifest: the artefact's, which has a decoder.
        session: gives the session of a graph by its stem.
        batch: images decoded at a time; it bounds the memory.

    Raises:
        TokenCacheError: if `batch` is not a number of images.
    """

    def __init__(self, manifest: Mapping[str, Any], session: Callable[[str], ort.InferenceSession], batch: int = 1) -> None:
        if not is_int(batch) or batch < 1:
            raise TokenCacheError(f"decoder_batch is {batch!r}: give 1 or more.")
        self._said, self._session, self.batch = manifest[DECODER], session, batch
        self._weights = int(manifest.get("files", {}).get(DATA, {}).get("bytes", 0))

    @property
    def memory_bytes(self) -> int:
        """What it takes while it runs (`export.runtime.decoder_contract.memory_bytes`)."""
        return memory_bytes(self._said, self._weights, self.batch)

    @property
    def working_bytes(self) -> int:
        """The part of `memory_bytes` that a request takes, and gives back."""
        return self.memory_bytes - memory_bytes(self._said, self._weights, 0)

    def __call__(self, latents_BCHW: np.ndarray) -> np.ndarray:
        """Pixels in [-1, 1], [B, 3, H', W'] float32, of latents as the model makes them.

        Raises:
            TokenCacheError: if they are not finite, or ONNX Runtime cannot make them.
        """
        pixels, failed = self.each(latents_BCHW, {})
        if failed:
            raise TokenCacheError(next(iter(failed.values())))
        return pixels

    def each(self, latents_BCHW: np.ndarray, failed: Mapping[int, str]) -> tuple[np.ndarray, dict[int, str]]:
        """The same; NaN of images that failed before, which are not decoded, and of those that fail here, which are told by place.

        Raises:
            TokenCacheError: if ONNX Runtime cannot make them.
        """
        pixels_BCHW = np.full((len(latents_BCHW), *self._said["pixels"]), np.nan, np.float32)
        sound = [place for place in range(len(latents_BCHW)) if place not in failed]
        told: dict[int, str] = {}
        for start in range(0, len(sound), self.batch):
            places = sound[start : start + self.batch]
            made = self._decode(latents_BCHW[places])
            finite_B = np.isfinite(made).reshape(len(made), -1).all(1)
            pixels_BCHW[places] = np.where(finite_B[:, None, None, None], np.clip(made, -1.0, 1.0), np.nan)
            told |= {place: _not_finite(place) for place, finite in zip(places, finite_B, strict=True) if not finite}
        return pixels_BCHW, told

    def _decode(self, latents_BCHW: np.ndarray) -> np.ndarray:
        session, options = self._session(DECODER), ort.RunOptions()
        if arena_is_ours() and session.get_providers()[0] == "CPUExecutionProvider":
            options.add_run_config_entry(SHRINK, "cpu:0")  # what it takes is much, and is not needed between requests
        try:
            return session.run([OUT], {IN: unscaled(self._said, latents_BCHW)}, options)[0]
        except Exception as error:
            raise TokenCacheError(
                f"the decoder failed: {first_line(error)} If memory ran out, decode fewer images at a time (decoder_batch, now "
                f"{self.batch}); the latents can be had without pixels (pixels=False)."
            ) from error


def _not_finite(place: int) -> str:
    return (
        f"the decoder made pixels that are NaN or infinite of image {place}: its latents are far from what the VAE was trained on. "
        "Lower the guidance scale; the latents can be had without pixels (pixels=False)."
    )
