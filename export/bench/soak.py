"""Many requests of changing sizes through one sampler, from several threads: its memory stays flat, and images stay the same.

Needs no torch. In every request one image is always the same, among others that change: it must come out bit for bit as at first, which
it does where the sampler has one thread.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from export.bench.memory_probe import memory_mb
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import class_label

GROWTH = 0.02  # of resident memory, from the first mark to the last
FULL = 0.1  # share of the requests that run the reference


class SoakError(TokenCacheError):
    """Memory grew, or an image changed."""

    exit_status = 3


@dataclasses.dataclass(frozen=True)
class Soaked:
    """What was seen.

    Args:
        requests: how many were made.
        images: in all of them.
        resident_mb: resident megabytes of the process when so many requests were done, and none was running.
        changed: requests in which the image that is always the same was another.
    """

    requests: int
    images: int
    resident_mb: dict[int, float]
    changed: int


def soak(
    sampler: CachedSampler, marks: Sequence[int], threads: int, most: int, seed: int, on_request: Callable[[int], object]
) -> Soaked:
    """Make requests until the last mark.

    Args:
        sampler: of an artefact whose one condition is a class label.
        marks: numbers of requests after which memory is looked at, increasing; the last one ends it.
        threads: threads that make requests at the same time.
        most: images in the largest request.
        seed: of the requests' sizes and contents.
        on_request: called with 1 after each.
    """
    classes = class_label(sampler.conditions).classes
    control = {full: sampler.sample([0], seed=seed, full=full, pixels=False).latents[0] for full in (False, True)}

    def request(number: int) -> tuple[int, bool]:
        rng = random.Random(f"{seed} {number}")
        images, full = rng.randint(1, most), rng.random() < FULL
        place = rng.randrange(images)
        labels, seeds, indices = ([rng.randrange(many) for _ in range(images)] for many in (classes, 2**31, 1000))
        labels[place], seeds[place], indices[place] = 0, seed, 0
        made = sampler.sample(labels, seed=seeds, indices=indices, full=full)
        on_request(1)
        return images, np.array_equal(made.latents[place], control[full])

    def every(first: int, end: int) -> tuple[int, int]:
        images = changed = 0
        for number in range(first, end, threads):
            size, same = request(number)
            images, changed = images + size, changed + (not same)
        return images, changed

    done, images, changed, resident = 0, 0, 0, {}
    with ThreadPoolExecutor(threads) as pool:  # a call for each thread: one for each request would itself take memory
        for mark in marks:
            for some, others in pool.map(every, range(done, done + threads), [mark] * threads):
                images, changed = images + some, changed + others
            done, resident[mark] = mark, memory_mb()["now"]
    return Soaked(done, images, resident, changed)


def require_flat(found: Soaked) -> None:
    """Check that memory did not grow, and no image changed.

    Raises:
        SoakError: if it did.
    """
    first, last = (found.resident_mb[mark] for mark in (min(found.resident_mb), max(found.resident_mb)))
    if last > first * (1 + GROWTH):
        raise SoakError(
            f"resident memory grew from {first:.1f} MB after {min(found.resident_mb)} requests to {last:.1f} MB after "
            f"{found.requests}: more than {GROWTH:.0%}."
        )
    if found.changed:
        raise SoakError(f"in {found.changed} of {found.requests} requests an image was not what it was at first.")
