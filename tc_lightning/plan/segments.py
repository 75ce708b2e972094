"""Segments: what happens to a range of blocks in one step of a plan (`tc_lightning.plan.cache_plan` says what the modes mean)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, NoReturn

from tc_lightning.errors import PlanError
from tc_lightning.plan.forecasts import Forecast, forecast_from_json, forecast_to_json
from tc_lightning.plan.json_fields import check_keys, is_int, is_ints, is_name, shown

MODES = ("compute", "partial", "reuse", "skip")
CHOICES = ("static", "content")
_OPTIONAL_KEYS = {"choice", "keep", "tokens", "branches", "order", "weights", "kv_order", "kv_weights"}
CACHED = ("span", "k", "v", "guidance")  # what is cached beside branches (`tc_lightning.plan.dataflow.Entry`)


class Branches(NamedTuple):
    """The branches of a network's blocks, as plans see them.

    Args:
        names: their names, in the order in which they run.
        attending: those that attend to all tokens: partial steps read the keys and values of one from the cache.
    """

    names: tuple[str, ...]
    attending: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Branches:
        """Inverse of `text`."""
        words = [word.partition(":") for word in text.split()]
        return cls(tuple(name for name, _, _ in words), tuple(name for name, _, mark in words if mark == "kv"))

    @property
    def text(self) -> str:
        """Names in order, with `:kv` at those that attend: `attn:kv mlp`."""
        return " ".join(f"{name}:kv" if name in self.attending else name for name in self.names)

    @property
    def tokenwise(self) -> tuple[str, ...]:
        """Those that look at each token by itself."""
        return tuple(name for name in self.names if name not in self.attending)


def require_branches(text: str) -> None:
    """Check that there are branches, spelt as `Branches.text` spells them, apart from each other and from what else is cached.

    Raises:
        PlanError: naming what is wrong.
    """
    block = Branches.parse(text)
    if not block.names or block.text != text:
        raise PlanError(
            f"the model's branches are {shown(text)}: expected their names in order, a space between them, and `:kv` after the one "
            f"that attends, for example {DIT.text!r}."
        )
    if not all(name.isalnum() for name in block.names) or len({*block.names, *CACHED}) != len(block.names) + len(CACHED):
        raise PlanError(
            f"the model's branches are {shown(text)}: each needs a name of letters and digits to itself, and not {', '.join(CACHED)}, "
            "which are cached beside them. Name them otherwise in the network's file."
        )
    if len(block.attending) > 1:
        raise PlanError(f"the model's branches are {shown(text)}: keys and values of one of them can be cached, not of several.")


DIT = Branches(("attn", "mlp"), ("attn",))
BRANCHES = DIT.names


@dataclasses.dataclass(frozen=True)
class Segment:
    """What happens to blocks `start` to `stop` (exclusive) in one step; see the module's description.

    Args:
        start: first block.
        stop: one past the last block.
        mode: compute, partial, reuse or skip.
        order: forecast order of what comes from the cache, 0 to 2; of keys and values, `kv_order` is.
        branches: reuse: the branches that come from the cache; partial: those recomputed for the kept tokens.
        tokens: partial, static: the tokens that are recomputed, ascending.
        choice: partial: static (the listed tokens) or content (those that the content predictor scores highest).
        keep: partial: how many tokens are recomputed; of static ones, always as many as are listed.
        weights: free forecast weights in place of the order's, latest value first, 4 at most (`tc_lightning.plan.forecasts`).
        kv_order: partial: forecast order of the keys and values of the tokens that are not recomputed.
        kv_weights: partial: free weights in its place.
    """

    start: int
    stop: int
    mode: str
    order: int = 0
    branches: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    choice: str = "static"
    keep: int = 0
    weights: tuple[float, ...] = ()
    kv_order: int = 0
    kv_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))
        object.__setattr__(self, "kv_weights", tuple(map(float, self.kv_weights)))
        if self.choice == "static":
            object.__setattr__(self, "keep", len(self.tokens))

    @property
    def is_content(self) -> bool:
        """Whether its tokens depend on the image."""
        return self.choice == "content"

    @property
    def forecast(self) -> Forecast:
        """How residuals and branches that come from the cache are forecast."""
        return Forecast(self.order, self.weights)

    @property
    def kv_forecast(self) -> Forecast:
        """How keys and values that come from the cache are forecast."""
        return Forecast(self.kv_order, self.kv_weights)

    @property
    def outline(self) -> tuple[object, ...]:
        """What it does, but for which tokens it keeps and what its forecasts weigh: segments of one outline share a program."""
        histories = (self.forecast.history, self.kv_forecast.history, self.kv_forecast.repeats)
        return (self.start, self.stop, self.mode, histories, self.branches, self.choice, self.keep)

    @property
    def blocks(self) -> range:
        """The blocks covered."""
        return range(self.start, self.stop)

    def computes(self, branch: str) -> bool:
        """Whether a branch is computed, for those tokens that are."""
        return self.mode == "compute" or (self.mode != "skip" and (self.mode == "partial") == (branch in self.branches))

    def to_json(self) -> dict[str, Any]:
        """The fields that the mode uses."""
        raw: dict[str, Any] = {"blocks": [self.start, self.stop], "mode": self.mode}
        if self.mode == "partial":
            raw |= {"keep": self.keep} | ({"choice": "content"} if self.is_content else {"tokens": list(self.tokens)})
        if self.mode in ("partial", "reuse"):
            raw["branches"] = list(self.branches)
        if self.mode != "compute":
            raw |= forecast_to_json(self.forecast)
        if self.kv_forecast != Forecast():
            raw |= forecast_to_json(self.kv_forecast, "kv_")
        return raw

    @classmethod
    def from_json(cls, raw: Any, where: str) -> Segment:
        """Inverse of `to_json`.

        Raises:
            PlanError: if a key is missing or unknown, or a value has the wrong type.
        """
        check_keys(raw, {"blocks", "mode"}, _OPTIONAL_KEYS, where)
        blocks, tokens = raw["blocks"], raw.get("tokens", [])
        choice, keep = raw.get("choice", "static"), raw.get("keep", len(tokens) if isinstance(tokens, list) else 0)
        if not (is_ints(blocks) and len(blocks) == 2 and is_ints(tokens) and is_int(keep)):
            raise PlanError(f"{where}: blocks must be two integers, tokens a list of integers, and keep an integer.")
        if choice == "static" and keep != len(tokens):
            raise PlanError(f"{where}: keep is {keep}, but {len(tokens)} tokens are listed.")
        branches = raw.get("branches", list(BRANCHES) if raw["mode"] == "partial" else [])
        if not (isinstance(branches, list) and all(map(is_name, branches))):
            raise PlanError(f"{where}: branches must be a list of names.")
        own, kv = forecast_from_json(raw, where), forecast_from_json(raw, where, "kv_")
        return cls(
            blocks[0],
            blocks[1],
            raw["mode"],
            own.order,
            tuple(branches),
            tuple(tokens),
            choice,
            keep,
            own.weights,
            kv.order,
            kv.weights,
        )


def compute(start: int, stop: int) -> Segment:
    """Segment that computes everything."""
    return Segment(start, stop, "compute")


def skip(start: int, stop: int, order: int = 0) -> Segment:
    """Segment whose summed residual comes from the cache."""
    return Segment(start, stop, "skip", order)


def partial(
    start: int, stop: int, tokens: tuple[int, ...], order: int = 0, branches: tuple[str, ...] = BRANCHES, kv_order: int = 0
) -> Segment:
    """Segment that recomputes the given tokens."""
    return Segment(start, stop, "partial", order, branches, tuple(sorted(tokens)), kv_order=kv_order)


def content(start: int, stop: int, keep: int, order: int = 0, branches: tuple[str, ...] = BRANCHES, kv_order: int = 0) -> Segment:
    """Segment that recomputes the `keep` tokens which the content predictor scores highest."""
    return Segment(start, stop, "partial", order, branches, choice="content", keep=keep, kv_order=kv_order)


def reuse(start: int, stop: int, branches: tuple[str, ...], order: int = 0) -> Segment:
    """Segment whose named branches come from the cache, before the gate."""
    return Segment(start, stop, "reuse", order, branches)


def require_valid(
    segment: Segment, reached: int, depth: int, num_tokens: int, where: str, block: Branches = DIT, fixed_tokens: int = 0
) -> None:
    """Check a segment by itself, and that it goes on from block `reached`.

    Raises:
        PlanError: naming what is wrong, at `where`.
    """

    def fail(reason: str) -> NoReturn:
        raise PlanError(f"{where}: {reason}.")

    if segment.mode not in MODES:
        fail(f"unknown mode {segment.mode!r}, choose one of {', '.join(MODES)}")
    if segment.start != reached or segment.stop <= segment.start or segment.stop > depth:
        fail(f"segments must cover blocks 0 to {depth} in order without gap or overlap; {reached} was reached")
    if fault := segment.forecast.fault():
        fail(fault)
    if fault := segment.kv_forecast.fault():
        fail(f"keys and values: {fault}")
    if segment.kv_forecast != Forecast() and not (segment.mode == "partial" and any(map(segment.computes, block.attending))):
        fail("keys and values are forecast where the mode is partial and attention is recomputed alone")
    if len(set(segment.branches)) != len(segment.branches) or not set(segment.branches) <= set(block.names):
        fail(f"branches {list(segment.branches)} must be distinct and of {list(block.names)}")
    if segment.choice not in CHOICES or (segment.is_content and segment.mode != "partial"):
        fail(f"choice {segment.choice!r} must be of {list(CHOICES)}, and content only where the mode is partial")
    if segment.is_content and (segment.tokens or not 1 <= segment.keep <= num_tokens):
        fail(f"content keeps 1 to {num_tokens} tokens and lists none; found keep {segment.keep}, {len(segment.tokens)} listed")
    if not segment.is_content and (segment.mode == "partial") != bool(segment.tokens):
        fail("tokens are listed if and only if the mode is partial, and at least one must be")
    if segment.tokens and (segment.tokens[0] < 0 or segment.tokens[-1] >= num_tokens):
        fail(f"tokens must lie in 0 to {num_tokens - 1}; the plan is for another token count")
    if any(a >= b for a, b in zip(segment.tokens, segment.tokens[1:], strict=False)):
        fail("tokens must be ascending and distinct")
    if segment.tokens and segment.tokens[:fixed_tokens] != tuple(range(fixed_tokens)):
        fail(f"partial keeps tokens 0 to {fixed_tokens - 1}, which are none of the image, whatever else it keeps")
    if segment.is_content and fixed_tokens:
        fail(f"content chooses among tokens of the image, and {fixed_tokens} of this model's are none: list the tokens")
    if segment.mode == "reuse" and not segment.branches:
        fail("reuse must name the branches that come from the cache")
    if segment.mode == "partial" and set(segment.branches) not in ({*block.names}, {*block.tokenwise}):
        fail(f"partial recomputes {' and '.join(block.names)}, or {' and '.join(block.tokenwise)} alone")
    if segment.mode == "compute" and (segment.forecast != Forecast() or segment.branches):
        fail("compute takes neither order nor weights nor branches")
    if segment.mode == "skip" and segment.branches:
        fail("skip takes no branches")
