"""Runs before a server is ready, of batches of every size, so that no request waits for what is done once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from export.runtime.sampler import CachedSampler
from tc_lightning.plan.conditions import Conditions
from tc_lightning.plan.given import NUMPY_TYPES


class _EnoughError(Exception):
    """Every program has run."""


def warm_up(sampler: CachedSampler, first: Sequence[int] = ()) -> None:
    """Run a batch of each size from 1 to the sampler's `max_batch`: whole on CUDA, where every step is captured, and on the CPU until
    each program has run. Full compute, the baseline, waits for its own first request.

    Args:
        sampler: the artefact.
        first: sizes to begin with, the largest first: on CUDA the graphs of few sizes are kept, of the first ones.

    Raises:
        TokenCacheError: if the artefact cannot be run.
    """
    sizes = dict.fromkeys([*sorted(first, reverse=True), *range(1, sampler.max_batch + 1)])
    begun: dict[str, int] = {}
    for step, bound in enumerate(sampler.manifest["schedule"]):
        begun.setdefault(bound["program"], step + 1)
    enough = max(begun.values())

    def on_step(done: int, _: int) -> None:
        if sampler.provider == "cpu" and done >= enough:
            raise _EnoughError

    for size in sizes:
        try:
            sampler.sample(conditions=some_conditions(sampler.conditions, size), on_step=on_step, strict=False)
        except _EnoughError:
            continue


def some_conditions(conditions: Conditions, rows: int) -> dict[str, np.ndarray]:
    """Values that any model can take, [rows, ...] each: classes in turn, all of a text, ones."""
    given = {c.name: np.ones((rows, *c.shape), NUMPY_TYPES[c.dtype]) for c in conditions}
    return given | {c.name: np.arange(rows) % c.classes for c in conditions if c.classes}
