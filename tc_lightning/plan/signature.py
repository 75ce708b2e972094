"""What a plan knows of the model that it was made for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from tc_lightning.errors import PlanError
from tc_lightning.plan.block_costs import (
    BranchMacs,
    Macs,
    UnlikeBlocks,
    macs_from_json,
    macs_to_json,
    require_costs,
    require_unlike,
    unlike_from_json,
    unlike_to_json,
)
from tc_lightning.plan.conditions import Conditions, conditions_from_json, require_distinct
from tc_lightning.plan.json_fields import MOST, from_fields
from tc_lightning.plan.segments import DIT, Branches
from tc_lightning.plan.skips import NO_SKIPS, LongSkips, require_skips

PIXELS, LATENTS = "pixels", "latents"
OUTPUTS = (PIXELS, LATENTS)


@dataclasses.dataclass(frozen=True)
class ModelSignature:
    """What a plan must know of the model it was made for; `teacher` is the sha256 of its weights.

    `conditions` are what a request must bring, `macs` the costs of each branch in their order and `fixed_macs` those of a forward
    outside of branches, and `output` says what latents are: `pixels` in [-1, 1], or `latents` that a decoder of the model's own turns
    into images. `branches` names those of a block in order, and says which attend (`tc_lightning.plan.segments.Branches`).
    `fixed_tokens` of the tokens are not the image's (a text's, for example): they come first, and no step that recomputes tokens leaves
    them out. `macs` are those of most blocks; `unlike` names the others. `skips` are the long skips between blocks, if there are any.
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
    conditions: Conditions
    macs: tuple[Macs, ...]
    fixed_macs: int
    output: str
    teacher: str
    branches: str = DIT.text
    fixed_tokens: int = 0
    unlike: tuple[UnlikeBlocks, ...] = ()
    skips: LongSkips = NO_SKIPS

    @functools.cached_property
    def block(self) -> Branches:
        """The branches of a block."""
        return Branches.parse(self.branches)

    @property
    def image_tokens(self) -> int:
        """Tokens that are the image's: those that may be chosen to be recomputed, and that scores are of."""
        return self.tokens - self.fixed_tokens

    def kept(self, chosen: Iterable[int]) -> tuple[int, ...]:
        """The tokens that a step recomputes, ascending: all fixed ones, and the chosen ones, which are numbered within the image."""
        return (*range(self.fixed_tokens), *sorted(self.fixed_tokens + token for token in chosen))

    def macs_of(self, block: int) -> BranchMacs:
        """Costs of the branches of a block."""
        return self._unlike[block].macs if block in self._unlike else self.macs

    def kv_width(self, block: int) -> int:
        """Features of a key, and of a value, of a block."""
        return self.width * (self._unlike[block].kv_widths if block in self._unlike else 1)

    @functools.cached_property
    def _unlike(self) -> dict[int, UnlikeBlocks]:
        return {block: one for one in self.unlike for block in one.blocks}

    @property
    def latent(self) -> tuple[int, int, int]:
        """C, H, W of one image's latents."""
        return self.in_channels, self.input_size, self.input_size

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; branches where they are not those of a DiT, blocks unlike the rest and long skips where there are any."""
        silent = (("branches", DIT.text), ("unlike", ()), ("skips", NO_SKIPS))
        plain = {name: value for name, value in vars(self).items() if name in _FIELDS and (name, value) not in silent}
        plain |= {"conditions": [one.to_json() for one in self.conditions], "macs": macs_to_json(self.block.names, self.macs)}
        plain |= {"unlike": [unlike_to_json(self.block.names, one) for one in self.unlike]} if self.unlike else {}
        return plain | ({"skips": self.skips.to_json()} if self.skips != NO_SKIPS else {})

    @classmethod
    def from_json(cls, raw: Any, where: str) -> ModelSignature:
        """Inverse of `to_json`.

        Raises:
            PlanError: if a key is missing or unknown, or a value has the wrong type.
        """
        made = {"conditions": conditions_from_json, "macs": macs_from_json, "unlike": unlike_from_json, "skips": LongSkips.from_json}
        return from_fields(cls, raw, where, {"branches", "unlike", "skips"}, made)

    def __post_init__(self) -> None:
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.type == "int"}
        fixed = sizes.pop("fixed_tokens")
        if wrong := [f"{name} {size}" for name, size in sizes.items() if not 1 <= size <= MOST]:
            raise PlanError(f"the model has {', '.join(wrong)}: every size must be at least 1, and one that a model can have.")
        if not 0 <= fixed < self.tokens:
            raise PlanError(f"the model has {fixed} fixed tokens of {self.tokens}: it needs one of an image at least.")
        if self.output not in OUTPUTS:
            raise PlanError(f"the model's output is {self.output!r}: choose one of {', '.join(OUTPUTS)}.")
        for macs in (self.macs, (Macs(self.skips.macs),), *(one.macs for one in self.unlike)):
            require_costs(macs, self.fixed_tokens, self.tokens)
        require_unlike(self.unlike, self.depth)
        require_distinct(self.conditions)
        require_skips(self.skips, self.depth)


_FIELDS = frozenset(field.name for field in dataclasses.fields(ModelSignature))
