"""What a plan knows of the model that it was made for."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from tc_lightning.errors import PlanError
from tc_lightning.plan.json_fields import MOST
from tc_lightning.plan.segments import DIT, Branches


@dataclasses.dataclass(frozen=True)
class ModelSignature:
    """What a plan must know of the model it was made for; `teacher` is the sha256 of its weights.

    `branches` names those of a block in order, and says which attend (`tc_lightning.plan.segments.Branches`).
    """

    family: str
    depth: int
    tokens: int
    width: int
    heads: int
    mlp_width: int
    patch_size: int
    in_channels: int
    out_channels: int
    input_size: int
    num_classes: int
    teacher: str
    branches: str = DIT.text

    @functools.cached_property
    def block(self) -> Branches:
        """The branches of a block."""
        return Branches.parse(self.branches)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; branches where they are not those of a DiT."""
        return {name: value for name, value in dataclasses.asdict(self).items() if (name, value) != ("branches", DIT.text)}

    def __post_init__(self) -> None:
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.type == "int"}
        if wrong := [f"{name} {size}" for name, size in sizes.items() if not 1 <= size <= MOST]:
            raise PlanError(f"the model has {', '.join(wrong)}: every size must be at least 1, and one that a model can have.")
