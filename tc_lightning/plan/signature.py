"""What a plan knows of the model that it was made for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

from tc_lightning.errors import PlanError
from tc_lightning.plan.conditions import Conditions, conditions_from_json, require_distinct
from tc_lightning.plan.json_fields import MOST, from_fields, is_ints, shown
from tc_lightning.plan.segments import DIT, Branches
from tc_lightning.plan.skips import NO_SKIPS, LongSkips, require_skips

PIXELS, LATENTS = "pixels", "latents"
OUTPUTS = (PIXELS, LATENTS)


class Macs(NamedTuple):
    """Multiply-accumulates of a branch of one block for one sample: so many for each computed token, and so many for each pair of a
    computed token and one that it attends to."""

    token: int
    pair: int = 0

    def of(self, computed: int, tokens: int) -> int:
        """Of so many computed tokens, where there are so many."""
        return computed * (self.token + tokens * self.pair)


@dataclasses.dataclass(frozen=True)
class ModelSignature:
    """What a plan must know of the model it was made for; `teacher` is the sha256 of its weights.

    `conditions` are what a request must bring, `macs` the costs of each branch in their order and `fixed_macs` those of a forward
    outside of branches, and `output` says what latents are: `pixels` in [-1, 1], or `latents` that a decoder of the model's own turns
    into images. `branches` names those of a block in order, and says which attend (`tc_lightning.plan.segments.Branches`).
    `fixed_tokens` of the tokens are not the image's (a text's, for example): they come first, and no step that recomputes tokens leaves
    them out. `skips` are the long skips between blocks, if there are any.
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

    @property
    def latent(self) -> tuple[int, int, int]:
        """C, H, W of one image's latents."""
        return self.in_channels, self.input_size, self.input_size

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; branches where they are not those of a DiT, long skips where there are any."""
        silent = (("branches", DIT.text), ("skips", NO_SKIPS))
        plain = {name: value for name, value in vars(self).items() if name in _FIELDS and (name, value) not in silent}
        plain |= {"skips": self.skips.to_json()} if self.skips != NO_SKIPS else {}
        macs = {name: list(macs) for name, macs in zip(self.block.names, self.macs, strict=True)}
        return plain | {"conditions": [condition.to_json() for condition in self.conditions], "macs": macs}

    @classmethod
    def from_json(cls, raw: Any, where: str) -> ModelSignature:
        """Inverse of `to_json`.

        Raises:
            PlanError: if a key is missing or unknown, or a value has the wrong type.
        """
        made = {"conditions": _conditions, "macs": _macs, "skips": LongSkips.from_json}
        return from_fields(cls, raw, where, {"branches", "skips"}, made)

    def __post_init__(self) -> None:
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.type == "int"}
        fixed = sizes.pop("fixed_tokens")
        if wrong := [f"{name} {size}" for name, size in sizes.items() if not 1 <= size <= MOST]:
            raise PlanError(f"the model has {', '.join(wrong)}: every size must be at least 1, and one that a model can have.")
        if not 0 <= fixed < self.tokens:
            raise PlanError(f"the model has {fixed} fixed tokens of {self.tokens}: it needs one of an image at least.")
        if self.output not in OUTPUTS:
            raise PlanError(f"the model's output is {self.output!r}: choose one of {', '.join(OUTPUTS)}.")
        if any(not 0 <= value <= MOST for macs in (*self.macs, (self.skips.macs,)) for value in macs):
            raise PlanError("the model's macs are negative, or more than a model can have: give MACs a token and a pair of tokens.")
        require_distinct(self.conditions)
        require_skips(self.skips, self.depth)


_FIELDS = frozenset(field.name for field in dataclasses.fields(ModelSignature))


def _conditions(raw: Any, where: str) -> Conditions:
    return conditions_from_json(raw, where)


def _macs(raw: Any, where: str) -> tuple[Macs, ...]:
    if not isinstance(raw, dict) or not all(is_ints(value) and len(value) == 2 for value in raw.values()):
        raise PlanError(f"{where}: expected MACs a token and a pair of tokens for each branch, found {shown(raw)}.")
    return tuple(Macs(*value) for value in raw.values())
