"""Which stages there are, in the order of what matters most. Standard library only: whoever starts them needs nothing else."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """A stage.

    Args:
        number: its place.
        name: its file in this folder.
        share: of the time that is left when it begins, against those after it.
        title: what it is about.
    """

    number: int
    name: str
    share: float
    title: str


STAGES = (
    Stage(1, "environment", 5, "driver, CUDA, cuDNN, wheels; whether the provider can be used, and why not"),
    Stage(2, "precisions", 16, "the digits teacher, exported and proved in each precision; its requests"),
    Stage(3, "replays", 9, "CUDA graphs; what happens between steps"),
    Stage(4, "speed", 60, "DiT-XL/2's shapes on the clock, beside PyTorch and torch.compile"),
    Stage(5, "steadiness", 8, "many requests of mixed sizes"),
    Stage(6, "distillation", 18, "distilling and planning on the device"),
    Stage(7, "marked_tests", 10, "the tests marked gpu"),
)
PROVIDER = "provider"  # the part of stage 1 without which no other stage means anything
