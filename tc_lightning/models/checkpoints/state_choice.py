"""Which tensors of a checkpoint are the network's: past containers, prefixes and what training scripts store beside the weights.

A network is found by names that occur once in it (its anchors), wherever they stand; what stands before them is the prefix.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.state import State, to_state

RELEASE = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
DIFFUSERS = ("pos_embed.proj.weight", "proj_out_1.weight", "proj_out_2.weight")
_DEEPEST = 4  # containers within containers
_NAMED = 4  # things that a message names before it counts


class ReadState(NamedTuple):
    """Weights under the network's own names, and what was chosen, stripped or left out on the way, in words."""

    state: State
    notes: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class _Candidate:
    container: tuple[str, ...]
    prefix: str
    entries: dict[Any, Any]

    @property
    def label(self) -> str:
        """How messages name it."""
        place = "/".join(self.container)
        keys = f"keys `{self.prefix}*`" if self.prefix else ""
        return " of ".join(part for part in (keys, f"`{place}`" if place else "") if part) or "keys without a prefix"

    @property
    def rank(self) -> tuple[int, bool, bool]:
        """Less is better: averaged weights first; then the original release's `ema` and `model`.

        Lightning's weight averaging keeps the average in `state_dict`, and the others in `current_model_state`.
        """
        words = [set(re.findall("[a-z]+", part.lower())) for part in (*self.container, self.prefix)]
        return -sum("ema" in w for w in words), self.container not in (("ema",), ("model",)), "current_model_state" in self.container


def as_they_are(weights: dict[str, Tensor], path: Path) -> ReadState:
    """Weights whose names are the network's own."""
    return ReadState(to_state(weights, path), [])


def choose(
    raw: Any, path: Path, anchors: tuple[str, ...] = RELEASE, read: Callable[[dict[str, Tensor], Path], ReadState] = as_they_are
) -> ReadState:
    """The network's tensors among all that a checkpoint holds.

    Args:
        raw: what was read: a state dict, or a container of one or several.
        path: where from, for messages.
        anchors: names of which a network has each once.
        read: checks its tensors, and gives them the names that they have here.

    Raises:
        TeacherError: if there is no network, several and no rule that prefers one, or a value that cannot be a weight.
    """
    candidates = list(_candidates(raw, anchors))
    if not candidates:
        raise TeacherError(f"{path} holds {_described(raw)}; {_advice(raw, anchors)}")
    best = min(c.rank for c in candidates)
    first, *equals = [c for c in candidates if c.rank == best]
    if equals:
        raise TeacherError(
            f"{path} holds several networks that could be the teacher, and nothing tells which is meant: "
            f"{_listed([c.label for c in (first, *equals)])}. Save the state dict of one of them alone, best as .safetensors."
        )
    return _taken(first, [c for c in candidates if c is not first], path, read)


def _candidates(raw: Any, anchors: tuple[str, ...], container: tuple[str, ...] = ()) -> Iterator[_Candidate]:
    if not isinstance(raw, dict) or len(container) > _DEEPEST:
        return
    named = {key: value for key, value in raw.items() if isinstance(key, str)}
    found = {name.removesuffix(a) for name, v in named.items() for a in anchors if name.endswith(a) and isinstance(v, Tensor)}
    for prefix in sorted(p for p in found if not p or p.endswith(".")):
        yield _Candidate(container, prefix, raw)
    for key, value in named.items():
        yield from _candidates(value, anchors, (*container, key))


def _taken(chosen: _Candidate, others: list[_Candidate], path: Path, read: Callable[[dict[str, Tensor], Path], ReadState]) -> ReadState:
    """The weights of one candidate; what stands beside them in the same dict, and belongs to no other, is left out and told."""
    prefix, weights, beside = chosen.prefix, {}, []
    theirs = tuple(other.prefix for other in others if other.entries is chosen.entries)
    for key, value in chosen.entries.items():
        name = str(key)
        if name.startswith(prefix) and isinstance(value, Tensor) and not _is_counter(name.removeprefix(prefix), value):
            weights[name.removeprefix(prefix)] = value
        elif not name.startswith(theirs):
            beside.append(name)
    notes = []
    if others:
        notes.append(f"took {chosen.label} (there is also {_listed([other.label for other in others])})")
    elif chosen.container:
        notes.append(f"took `{'/'.join(chosen.container)}`")
    if prefix:
        notes.append(f"stripped the prefix `{prefix}`")
    if beside:
        notes.append(f"left out {_listed(sorted(beside))}, no weights of the network")
    own = read(weights, path)
    return ReadState(own.state, notes + own.notes)


def _is_counter(name: str, tensor: Tensor) -> bool:
    """A number beside the weights, such as the `step` and `initted` of an average: no weight is one."""
    return tensor.numel() == 1 and (tensor.ndim == 0 or not tensor.is_floating_point() or "." not in name)


def _described(raw: Any) -> str:
    return f"a dict of {_listed(list(map(str, raw))) or 'nothing'}" if isinstance(raw, dict) else f"a {type(raw).__name__}"


def _advice(raw: Any, anchors: tuple[str, ...]) -> str:
    if anchors is RELEASE and any(_candidates(raw, DIFFUSERS)):
        return "these are diffusers' names: set `weights` to the folder that holds the file and its config.json."
    kind = "a DiT" if anchors in (RELEASE, DIFFUSERS) else "such a network"
    return (
        f"a state dict of {kind} was expected (with {anchors[0]}, and so on), plain, under one prefix, or in containers such as "
        "`ema`, `model` or `state_dict`."
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
