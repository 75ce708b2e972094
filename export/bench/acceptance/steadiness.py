"""Stage 5: many requests of mixed sizes, one after the other: memory stays flat, and each gets what it got the first time."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from export.bench.acceptance.gauges import memory_now
from export.bench.acceptance.reporter import Reporter
from export.bench.acceptance.sizes import sizes_for
from export.bench.acceptance.subjects import digits, write_artefact
from export.compiler.parity import TOLERANCE, relative_l2
from export.runtime.buffers import MOST_SIZES
from export.runtime.sampler import CachedSampler
from tc_lightning.plan.conditions import class_label

FLAT_MB = {"device": 16.0, "host": 48.0}
FULL_EVERY = 7  # one of so many requests is of full compute


def run(report: Reporter, provider: str, scratch: Path) -> None:
    """See the module."""
    sizes = sizes_for(provider)
    model, plan = digits(sizes)
    sampler = CachedSampler(write_artefact(model, plan, scratch / "artefact", sizes.small_precision, provider), provider)
    chooser, classes = random.Random(0), class_label(plan.model.conditions).classes
    counts = [*range(1, MOST_SIZES + 3), *(chooser.randint(1, sizes.most_images) for _ in range(sizes.requests))][: sizes.requests]
    first: dict[tuple[int, bool], np.ndarray] = {}
    held: dict[str, list[float]] = {}
    worst, other_bits = 0.0, 0
    with report.part(f"{sizes.requests} requests of 1 to {sizes.most_images} images") as found:
        for place, count in enumerate(counts):
            full = place % FULL_EVERY == FULL_EVERY - 1
            latents = sampler.sample([i % classes for i in range(count)], seed=5, full=full).latents
            before = first.setdefault((count, full), latents)
            worst, other_bits = max(worst, relative_l2(latents, before)), other_bits + (not np.array_equal(latents, before))
            for name, now in memory_now(provider).items():
                held.setdefault(name, []).append(now)
        found.figures["requests with other bits than the first of their size"] = other_bits
        found.at_most("largest difference", worst, TOLERANCE[sizes.small_precision])
        for name, megabytes in held.items():
            found.figures[f"{name} MB"] = megabytes[:: max(1, len(megabytes) // 20)]
            found.at_most(f"{name} MB gained", rise(megabytes), FLAT_MB[name])


def rise(megabytes: list[float]) -> float:
    """How much more the last third holds at its height than the third before it; the first one warms up."""
    third = len(megabytes) // 3
    return max(megabytes[-third:]) - max(megabytes[third : len(megabytes) - third])
