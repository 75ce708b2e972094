"""What a block costs, and which blocks of a model are unlike the rest: plain data."""

from __future__ import annotations

from typing import Any, NamedTuple

from tc_lightning.errors import PlanError
from tc_lightning.plan.json_fields import MOST, as_list, check_keys, is_int, is_ints, shown


class Macs(NamedTuple):
    """Multiply-accumulates of a branch of one block for one sample: so many for each computed token, and so many for each pair of a
    computed token and one that it attends to, but for those that the model's fixed tokens do without, in all.

    Fixed tokens are among the computed ones wherever there are any (`tc_lightning.plan.signature.ModelSignature`).
    """

    token: int
    pair: int = 0
    spared: int = 0

    def of(self, computed: int, tokens: int) -> int:
        """Of so many computed tokens, where there are so many."""
        return computed * (self.token + tokens * self.pair) - self.spared


BranchMacs = tuple[Macs, ...]  # of each branch of a block, in order


class UnlikeBlocks(NamedTuple):
    """Blocks of one kind among others of another.

    Args:
        blocks: their numbers, ascending.
        macs: costs of their branches.
        kv_widths: their keys and values are so many times as wide as a token.
    """

    blocks: tuple[int, ...]
    macs: BranchMacs
    kv_widths: int = 1


def macs_to_json(names: tuple[str, ...], macs: BranchMacs) -> dict[str, list[int]]:
    """Costs by the names of branches: a token, a pair of tokens, and what is spared, if anything is."""
    return {name: list(one if one.spared else one[:2]) for name, one in zip(names, macs, strict=True)}


def macs_from_json(raw: Any, where: str) -> BranchMacs:
    """Inverse of `macs_to_json`.

    Raises:
        PlanError: if a value has the wrong type.
    """
    if not isinstance(raw, dict) or not all(is_ints(value) and len(value) in (2, 3) for value in raw.values()):
        raise PlanError(f"{where}: expected MACs a token and a pair of tokens for each branch, found {shown(raw)}.")
    return tuple(Macs(*value) for value in raw.values())


def unlike_to_json(names: tuple[str, ...], unlike: UnlikeBlocks) -> dict[str, Any]:
    """Plain JSON values."""
    return {"blocks": list(unlike.blocks), "macs": macs_to_json(names, unlike.macs), "kv_widths": unlike.kv_widths}


def unlike_from_json(raw: Any, where: str) -> tuple[UnlikeBlocks, ...]:
    """The inverse, of a list of them.

    Raises:
        PlanError: if a key is missing or unknown, or a value has the wrong type.
    """
    found = []
    for j, one in enumerate(as_list(raw, where)):
        check_keys(one, {"blocks", "macs", "kv_widths"}, set(), f"{where} {j}")
        if not is_ints(one["blocks"]) or not is_int(one["kv_widths"]):
            raise PlanError(f"{where} {j}: blocks must be a list of integers, and kv_widths an integer.")
        found.append(UnlikeBlocks(tuple(one["blocks"]), macs_from_json(one["macs"], f"{where} {j}.macs"), one["kv_widths"]))
    return tuple(found)


def require_costs(macs: BranchMacs, fixed: int, tokens: int) -> None:
    """Check what a model says that one of its blocks costs.

    Args:
        macs: costs of its branches.
        fixed: tokens that are computed wherever any are.
        tokens: of all kinds.

    Raises:
        PlanError: if there can be no such costs.
    """
    if any(not 0 <= value <= MOST for one in macs for value in one):
        raise PlanError("the model's macs are negative, or more than a model can have: give MACs a token and a pair of tokens.")
    if any(one.of(fixed, tokens) < 0 for one in macs):
        raise PlanError(f"the model's macs spare its {fixed} fixed tokens more than these cost: give less.")


def require_unlike(unlike: tuple[UnlikeBlocks, ...], depth: int) -> None:
    """Check which blocks a model says to be unlike the rest.

    Raises:
        PlanError: naming what is wrong.
    """
    blocks = [block for one in unlike for block in one.blocks]
    if len({*blocks}) < len(blocks) or not all(0 <= block < depth for block in blocks) or not all(one.blocks for one in unlike):
        raise PlanError(f"the model's unlike blocks are {blocks}: each must be one of its {depth} blocks, once.")
    if any(not 1 <= one.kv_widths <= MOST for one in unlike):
        raise PlanError("the model's kv_widths must be at least 1: keys and values have a width.")
