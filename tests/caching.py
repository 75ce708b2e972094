"""What the tests of caching share: tokens of a teacher, and a cache that was filled at another time."""

from __future__ import annotations

import torch
from conftest import FULL
from torch import Tensor

from tc_lightning.cache.semantics import Step, run_blocks
from tc_lightning.models.dit import DiT
from tc_lightning.plan.dataflow import Entry
from tc_lightning.rollout.sampling import noise_for

LABELS = torch.tensor([0, 3])
EVERYTHING = tuple(range(16))


def tokens_of(model: DiT, t: float = 600.0, seed: int = 0, labels: Tensor = LABELS):
    """Tokens, adaLN terms of the blocks and of the final layer for noise."""
    x = noise_for(seed, range(len(labels)), model)
    mods, final = model.modulations(model.condition(torch.full((len(labels),), t), label=labels))
    return model.embed(x), mods, final


def cache_of_another_time(model: DiT, start: int, stop: int) -> dict[Entry, Tensor]:
    """Span, keys, values and attention of blocks as another time step computed them."""
    z, mods, _ = tokens_of(model, t=900.0, seed=5)
    entries = [Entry("span", start, stop)]
    entries += [Entry(kind, b, b + 1) for b in range(start, stop) for kind in ("k", "v", "attn")]
    return run_blocks(Step(FULL, (None,), {}, entries), z, list(model.blocks), mods)[1]
