"""Networks of released shapes with random weights, and conditions for them: what is measured where no trained weights are at hand."""

from __future__ import annotations

import dataclasses
from typing import Any

from export.bench.random_values import random_values
from tc_lightning.errors import TeacherError
from tc_lightning.models.dit import preset, randomise_
from tc_lightning.models.families import build
from tc_lightning.models.mdt import MDTConfig
from tc_lightning.models.network import Network
from tc_lightning.models.pixart import PixArtConfig
from tc_lightning.models.sd3 import SD3Config
from tc_lightning.plan.conditions import STORED

RELEASED: dict[str, tuple[str, Any]] = {  # family and shape
    "MDTv2-XL/2": ("mdt", MDTConfig()),
    "PixArt-XL/2": ("pixart", PixArtConfig()),
    "SD3-medium": ("sd3", SD3Config()),
}
EXAMPLES = 4  # rows of conditions: one for each use that they are dealt to


def random_network(name: str, input_size: int | None = None, depth: int | None = None) -> Network:
    """A network of a released shape, frozen, whose weights are small noise; with examples and null values where it needs them.

    Args:
        name: one of `RELEASED`, or DiT-{S,B,L,XL}/{2,4,8}.
        input_size: side of the latents; None for the shape's own, and 32 for a DiT.
        depth: blocks; None for all of them.

    Raises:
        TeacherError: if there is no such shape, or it cannot have this size or depth.
    """
    if name not in RELEASED and not name.startswith("DiT-"):
        raise TeacherError(f"unknown preset {name!r}: choose DiT-{{S,B,L,XL}}/{{2,4,8}} or one of {', '.join(RELEASED)}.")
    family, shape = RELEASED.get(name) or ("dit", preset(name))
    changed = {field: value for field, value in (("input_size", input_size), ("depth", depth)) if value is not None}
    model = build(family, dataclasses.asdict(shape) | changed)
    randomise_(model, seed=0, std=0.02).eval().requires_grad_(False)
    undrawn = tuple(condition for condition in model.conditions if not condition.classes)
    stored = tuple(condition for condition in undrawn if condition.null == STORED)
    model.examples = random_values(undrawn, EXAMPLES) if undrawn else None
    model.nulls = random_values(stored, 1, seed=1) if stored else None
    return model
