"""How large everything is: on a GPU what the README speaks of, in the rehearsal as little as runs the same code."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

CLOCK, COMPILE, AUTOTUNE, MEMORY = "clock", "torch.compile", "torch.compile max-autotune", "memory"
PRECISIONS = ("fp32", "fp16", "bf16")


class Work(NamedTuple):
    """A measurement of the large shapes.

    Args:
        precision: fp32, fp16 or bf16.
        batch: images at a time.
        what: the plans on the clock, `torch.compile` in one of its modes, or memory.
        seconds: what it may take, before one like it has been seen.
        extra: only if there is time for it.
    """

    precision: str
    batch: int
    what: str = CLOCK
    seconds: float = 0.0
    extra: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of one provider's run.

    Args:
        small_steps: sampling steps of the digits teacher.
        small_full: how many of them compute everything.
        small_precision: precision in which it is run beyond the proofs.
        images: images of a proof.
        preset: the large shapes.
        overrides: fields of the preset that differ.
        steps: sampling steps of the large shapes.
        full_steps: how many of them compute everything.
        work: the measurements of the large shapes, what matters most first.
        judged: whether the figures of the clock are to reach what is promised.
        requests: requests in a row.
        most_images: images of the largest of them.
        pairs: pairs of neighbouring steps of a training batch.
        planned_images: images that a plan is fitted on.
        planned_steps: sampling steps of the run that is planned for.
    """

    small_steps: int
    small_full: int
    small_precision: str
    images: int
    preset: str
    overrides: dict[str, Any]
    steps: int
    full_steps: int
    work: tuple[Work, ...]
    judged: bool
    requests: int
    most_images: int
    pairs: int
    planned_images: int
    planned_steps: int


GPU = Sizes(
    small_steps=30,
    small_full=12,
    small_precision="fp16",
    images=4,
    preset="DiT-XL/2",
    overrides={},
    steps=20,
    full_steps=8,
    work=(
        Work("fp16", 8),
        Work("fp16", 8, COMPILE, seconds=60),
        Work("bf16", 8),
        Work("fp16", 32),
        Work("fp16", 1),
        Work("fp16", 8, MEMORY, seconds=20),
        Work("bf16", 1),
        Work("bf16", 32),
        Work("bf16", 8, COMPILE, seconds=60, extra=True),
        Work("fp16", 8, AUTOTUNE, seconds=180, extra=True),
        Work("fp16", 32, COMPILE, seconds=60, extra=True),
        Work("fp16", 1, COMPILE, seconds=60, extra=True),
    ),
    judged=True,
    requests=200,
    most_images=16,
    pairs=16,
    planned_images=8,
    planned_steps=10,
)
REHEARSAL = Sizes(
    small_steps=8,
    small_full=5,
    small_precision="fp32",
    images=2,
    preset="DiT-S/2",
    overrides={"input_size": 8, "hidden_size": 64, "depth": 3, "num_heads": 2, "num_classes": 10},
    steps=7,
    full_steps=5,
    work=(Work("fp32", 2), Work("fp32", 2, COMPILE, seconds=10), Work("fp32", 1), Work("fp32", 2, MEMORY)),
    judged=False,
    requests=18,
    most_images=6,
    pairs=4,
    planned_images=4,
    planned_steps=5,
)


def sizes_for(provider: str) -> Sizes:
    """The sizes of a provider's run."""
    return GPU if provider == "cuda" else REHEARSAL
