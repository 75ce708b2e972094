"""Conditions of image i, whoever makes it: rows of a file in turn, and class labels balanced, drawn, or named."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import Condition, Conditions
from tc_lightning.plan.given import LABEL_STREAM, Arrays

BALANCED, DRAWN = "balanced", "drawn"
Labels = tuple[str | int, ...]


def given_for(conditions: Conditions, indices: Sequence[int], seed: int, labels: Labels, table: Arrays) -> dict[str, np.ndarray]:
    """Conditions of some images, [len(indices), ...] each.

    Args:
        conditions: of the model.
        indices: of the images.
        seed: the user's.
        labels: how class labels are chosen that the table does not hold.
        table: rows of conditions; image i takes row i, and begins again after the last.

    Raises:
        TokenCacheError: if a condition is neither in the table nor a class label.
    """
    if missing := [c.name for c in conditions if not c.classes and c.name not in table]:
        raise TokenCacheError(
            f"the artefact takes {', '.join(missing)}, which cannot be chosen as class labels can: give rows of it with `--conditions "
            "FILE` (export/encode.py makes such a file of prompts)."
        )
    places = np.asarray(indices)
    return {
        c.name: table[c.name][places % len(table[c.name])] if c.name in table else _classes(c, places, seed, labels) for c in conditions
    }


def require_labels(conditions: Conditions, labels: Labels, table: Arrays) -> None:
    """Check a choice of labels.

    Raises:
        TokenCacheError: if it is none, or names classes that the model does not have.
    """
    words = [label for label in labels if isinstance(label, str)]
    if words and (len(labels) > 1 or labels[0] not in (BALANCED, DRAWN)):
        raise TokenCacheError(
            f"labels {' '.join(map(str, labels))} are neither `{BALANCED}`, nor `{DRAWN}`, nor numbers of classes: give one of these."
        )
    free = [c for c in conditions if c.classes and c.name not in table]
    if not words and not free:
        raise TokenCacheError(
            "classes were named with `--labels`, and every condition of the artefact comes from elsewhere: leave them out."
        )
    for c in free:
        if bad := [label for label in labels if isinstance(label, int) and not 0 <= label < c.classes]:
            raise TokenCacheError(f"label {bad[0]} is not a class: the artefact has {c.in_words}.")


def _classes(c: Condition, indices: np.ndarray, seed: int, labels: Labels) -> np.ndarray:
    """Class of each image, [len(indices)] int64."""
    if labels[0] == BALANCED:
        return indices.astype(np.int64) % c.classes
    if labels[0] == DRAWN:
        return np.array([_drawn(seed, int(index)) % c.classes for index in indices], dtype=np.int64)
    return np.array(labels, dtype=np.int64)[indices % len(labels)]


def _drawn(seed: int, index: int) -> int:
    """A number of 64 bits; raw Philox output, whose stream numpy guarantees, beside those of the noise and of labels drawn in turns."""
    return int(np.random.Philox(key=[seed, index], counter=[0, 0, 0, LABEL_STREAM - 1]).random_raw())
