"""Long skips: blocks that take in, beside the tokens that arrive, those that an earlier block gave."""

from __future__ import annotations

from typing import Any, NamedTuple

from tc_lightning.errors import PlanError
from tc_lightning.plan.json_fields import check_keys, is_int, is_ints, shown
from tc_lightning.plan.segments import Segment

EMBEDDING = -1  # a source that is no block: the tokens of `embed`, which every step computes


class Skip(NamedTuple):
    """A long skip: block `target` takes in what block `source` gave (`EMBEDDING`: what it was before all blocks)."""

    source: int
    target: int

    def cut_by(self, start: int, stop: int) -> bool:
        """Whether blocks [start, stop) hold one of its ends and not the other."""
        return (start <= self.source < stop) != (start <= self.target < stop)


class LongSkips(NamedTuple):
    """Those of a network.

    Args:
        pairs: by target, ascending: a block has one at most.
        macs: multiply-accumulates of taking one in, for a token.
    """

    pairs: tuple[Skip, ...] = ()
    macs: int = 0

    @property
    def between_blocks(self) -> tuple[Skip, ...]:
        """Those that segments could cut."""
        return tuple(skip for skip in self.pairs if skip.source != EMBEDDING)

    def cut_by(self, start: int, stop: int) -> Skip | None:
        """The first of which blocks [start, stop) hold one end and not the other."""
        return next((skip for skip in self.between_blocks if skip.cut_by(start, stop)), None)

    def taken_in(self, start: int, stop: int) -> int:
        """How many of blocks [start, stop) take in another's tokens."""
        return sum(start <= skip.target < stop for skip in self.pairs)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"pairs": [list(skip) for skip in self.pairs], "macs": self.macs}

    @classmethod
    def from_json(cls, raw: Any, where: str) -> LongSkips:
        """Inverse of `to_json`.

        Raises:
            PlanError: if a key is missing or unknown, or a value has the wrong type.
        """
        check_keys(raw, {"pairs", "macs"}, set(), where)
        pairs = raw["pairs"]
        if not isinstance(pairs, list) or not all(is_ints(pair) and len(pair) == 2 for pair in pairs) or not is_int(raw["macs"]):
            raise PlanError(f"{where}: expected pairs of source and target, and macs, an integer; found {shown(raw)}.")
        return cls(tuple(Skip(*pair) for pair in pairs), raw["macs"])


NO_SKIPS = LongSkips()


def require_skips(skips: LongSkips, depth: int) -> None:
    """Check that there are such blocks, and each has one long skip at most.

    Raises:
        PlanError: naming the pair that is wrong.
    """
    before = -1
    for skip in skips.pairs:
        if not (EMBEDDING <= skip.source < skip.target < depth and before < skip.target):
            raise PlanError(
                f"the model has a long skip from block {skip.source} to block {skip.target} of {depth}: it must lead from an earlier "
                f"block ({EMBEDDING} for the embedding) to a later one, one for each target, in the order of targets."
            )
        before = skip.target


def require_uncut(segment: Segment, skips: LongSkips, num_tokens: int, where: str) -> None:
    """Check that a segment which does not compute all tokens holds both ends of every long skip, or none.

    Inside such a segment tokens are not known, or those alone that are kept: nothing could be taken in from there. And what is cached
    of blocks that take in tokens from outside of them would stand still while those go on.

    Raises:
        PlanError: naming the skip and the segment.
    """
    computes_all = segment.mode in ("compute", "reuse") or (segment.mode == "partial" and segment.keep == num_tokens)
    cut = None if computes_all else skips.cut_by(segment.start, segment.stop)
    if cut is not None:
        raise PlanError(
            f"{where}: a {segment.mode} segment cuts the long skip from block {cut.source} to block {cut.target} in two. Let it hold "
            "both blocks, or neither, or compute all tokens there."
        )
