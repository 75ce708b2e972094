"""Noise of an image as a function of (seed, image index) alone, so that it does not depend on its batch. Needs numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...], stream: int = 0) -> np.ndarray:
    """Standard normal noise, [len(indices), *shape] float32.

    Args:
        seed: the user's seed, 0 <= seed < 2**63.
        indices: global index of each image.
        shape: shape of one image.
        stream: 0 for the initial noise, i + 1 for what a stochastic sampler adds after step i.
    """
    return np.stack([_generator(seed, index, stream).standard_normal(shape, dtype=np.float32) for index in indices])


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """A counter-based generator: distinct (seed, index, stream) never overlap."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream]))
