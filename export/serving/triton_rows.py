"""Tensors of Triton's requests as rows, and answers as tensors. Shape suffixes: R rows of a request, C H W latent or pixels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from export.serving.rows import Answer, Row
from export.serving.triton_config import FULL, GUIDANCE, IMAGE, INDEX, LATENT, RECEIPT, SEED
from tc_lightning.plan.conditions import Conditions


def rows_of(conditions: Conditions, tensors: Mapping[str, np.ndarray]) -> list[Row]:
    """The rows of a request; its shapes and types are as in `config.pbtxt`, which Triton sees to.

    Args:
        conditions: of the model; a number is [R, 1].
        tensors: by name, [R, ...] each. Without an index rows count from 0, without a guidance scale they have the plan's.
    """
    R = len(tensors[SEED])
    given = {c.name: tensors[c.name].reshape(R, *c.shape) for c in conditions}
    indices = tensors.get(INDEX, np.arange(R)).reshape(R).tolist()
    scales = tensors[GUIDANCE].reshape(R).tolist() if GUIDANCE in tensors else [None] * R
    full = tensors.get(FULL, np.zeros(R, bool)).reshape(R).tolist()
    seeds = tensors[SEED].reshape(R).tolist()
    return [Row({name: value[j] for name, value in given.items()}, seeds[j], indices[j], scales[j], full[j]) for j in range(R)]


def tensors_of(answers: Sequence[Answer]) -> dict[str, np.ndarray]:
    """What a request gets: images where there are any, latents, and a receipt a row."""
    images = [answer.image for answer in answers if answer.image is not None]
    made = {IMAGE: np.stack(images)} if images else {}
    receipts = np.array([[json.dumps(answer.receipt)] for answer in answers], dtype=object)
    return made | {LATENT: np.stack([answer.latent for answer in answers]), RECEIPT: receipts}
