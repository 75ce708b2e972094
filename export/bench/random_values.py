"""Values of conditions that nobody asked for: what a benchmark gives a network. Needs numpy, no torch."""

from __future__ import annotations

import numpy as np

from tc_lightning.plan.conditions import Condition, Conditions
from tc_lightning.plan.given import NUMPY_TYPES


def random_values(conditions: Conditions, rows: int, seed: int | np.random.Generator = 0) -> dict[str, np.ndarray]:
    """Conditions by name, [rows, ...] each: labels drawn evenly, masks that mark the first half, and numbers of a standard normal
    distribution. A generator in place of a seed is drawn from."""
    chooser = np.random.default_rng(seed)
    return {condition.name: _values(condition, rows, chooser) for condition in conditions}


def _values(condition: Condition, rows: int, chooser: np.random.Generator) -> np.ndarray:
    shape = (rows, *condition.shape)
    if condition.mask:
        marked = np.zeros(shape)
        marked[..., : (shape[-1] + 1) // 2] = 1
        return marked.astype(np.int64)
    if condition.classes:
        return chooser.integers(condition.classes, size=shape)
    return chooser.standard_normal(shape).astype(NUMPY_TYPES[condition.dtype])
