"""Noise and class of an image as functions of (seed, image index) alone, so that it does not depend on its batch. Needs numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LABEL_STREAM = 2**63 - 1  # Philox counter of the labels; the noise counts up from 0


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...], stream: int = 0) -> np.ndarray:
    """Standard normal noise, [len(indices), *shape] float32.

    Args:
        seed: the user's seed, 0 <= seed < 2**63.
        indices: global index of each image.
        shape: shape of one image.
        stream: 0 for the initial noise, i + 1 for what a stochastic sampler adds after step i.
    """
    return np.stack([_generator(seed, index, stream).standard_normal(shape, dtype=np.float32) for index in indices])


def drawn_labels(seed: int, indices: Sequence[int], num_classes: int) -> np.ndarray:
    """Class of each image, [len(indices)] int64: every class once, in random order, then again in another order.

    Args:
        seed: the user's seed, 0 <= seed < 2**63.
        indices: global index of each image.
        num_classes: classes of the model.
    """
    orders = {turn: _class_order(seed, turn, num_classes) for turn in {index // num_classes for index in indices}}
    return np.array([orders[index // num_classes][index % num_classes] for index in indices], dtype=np.int64)


def _class_order(seed: int, turn: int, num_classes: int) -> np.ndarray:
    """Raw Philox output, whose stream numpy guarantees, ranked."""
    raw = np.random.Philox(key=[seed, turn], counter=[0, 0, 0, LABEL_STREAM]).random_raw(num_classes)
    return np.argsort(raw, kind="stable")


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """A counter-based generator: distinct (seed, index, stream) never overlap."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream]))
