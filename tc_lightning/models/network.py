"""What a network tells the rest of the package, and the one composition of a block.

A family of models is one file that defines a `Network` of `Block`s in ordinary PyTorch. Caching (`tc_lightning.cache`), its soft
forms for training, measurements and the exporter know no more of it than is said here; names of branches are the family's own.

Shape suffixes: B batch (both halves of guidance counted), C channels, H W latent height and width, N tokens, n any subset of them,
D width.
"""

from __future__ import annotations

import collections
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.models.conditions import Asked, by_name
from tc_lightning.plan.conditions import Conditions
from tc_lightning.plan.given import Arrays
from tc_lightning.plan.segments import Branches
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.plan.skips import EMBEDDING, Skip


class KeyValue(NamedTuple):
    """Keys and values of attention, each [B, n, D]: the heads lie side by side, as the projections give them."""

    k: Tensor
    v: Tensor


See = Callable[[KeyValue], KeyValue]  # own keys and values -> those that are attended to
Take = Callable[[str, Tensor], Tensor]  # a branch's name and its input [B, n, D] -> its update before the gate


class Constants(NamedTuple):
    """What depends on conditions alone, never on time: computed once a request. Named tuples of tensors [B, ...], empty for none.

    Args:
        start: what `embed` takes, for example the tokens of a text that stand before those of the image.
        blocks: what each block finds among its terms, for example keys and values of a text, and a bias for its mask.
    """

    start: Any
    blocks: Sequence[Any]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, one after the other."""
        return [value for values in (self.start, *self.blocks) for value in values]

    def part(self, rows: slice) -> Constants:
        """Those of some rows."""
        return Constants(_part(self.start, rows), [_part(block, rows) for block in self.blocks])


class Terms(NamedTuple):
    """All that a forward takes of time and conditions: what `embed`, each block and `readout` find there, in named tuples."""

    start: Any
    blocks: Sequence[Any]
    final: Any


def terms_of(modulations: tuple[Sequence[Any], Any], constants: Constants) -> Terms:
    """A network's terms; those of a block that depend on time, and its constants, stand side by side in one named tuple."""
    blocks, final = modulations
    return Terms(constants.start, [side_by_side(*both) for both in zip(blocks, constants.blocks, strict=True)], final)


def side_by_side(mod: Any, constants: Any) -> Any:
    """One named tuple with the fields of two; the first itself where there is no second."""
    return _joined((*mod._fields, *constants._fields))(*mod, *constants) if constants else mod


@functools.cache
def _joined(fields: tuple[str, ...]) -> Any:
    return collections.namedtuple("BlockTerms", fields)


def _part(values: Any, rows: slice) -> Any:
    return type(values)(*(value[rows] for value in values)) if values else values


class Block(nn.Module, ABC):
    """A block: branches that read the residual stream, one after the other, and add to it."""

    branches: tuple[str, ...]  # their names, in the order in which they run
    attends: tuple[str, ...] = ()  # those that look at all tokens, by keys and values: one at most
    source: int | None = None  # the block whose tokens it takes in by a long skip, or `EMBEDDING`; None: it has no long skip

    @abstractmethod
    def branch(self, name: str, z_BnD: Tensor, mod: Any, at: Tensor | None = None, see: See | None = None) -> tuple[Tensor, Any]:
        """A branch's update before its gate, and the keys and values that its tokens attended to (None where it attends to none).

        Args:
            name: which branch.
            z_BnD: the tokens to compute.
            mod: the block's terms of the conditioning, and its constants.
            at: which tokens these are (`tc_lightning.models.lean.take`); None for all.
            see: where given, what the tokens attend to in place of their own keys and values.
        """

    @abstractmethod
    def gated(self, name: str, update_BnD: Tensor, mod: Any, at: Tensor | None = None) -> Tensor:
        """What a branch's update adds to the residual stream; arguments of `branch`."""

    def merge(self, z_BnD: Tensor, skip_BnD: Tensor, at: Tensor | None = None) -> Tensor:
        """What a block that has a source makes of the tokens that arrive and the same tokens after its source; see `branch`."""
        raise NotImplementedError(f"{type(self).__name__} has a source, and no `merge` that takes its tokens in.")

    def forward(self, z_BND: Tensor, mod: Any, skip_BND: Tensor | None = None) -> Tensor:
        """Full computation of the block."""
        return compose(self, z_BND, mod, lambda name, z: self.branch(name, z, mod)[0], skip_BnD=skip_BND)


def compose(block: Block, z_BnD: Tensor, mod: Any, take: Take, at: Tensor | None = None, skip_BnD: Tensor | None = None) -> Tensor:
    """For every branch of a block: take its update (computed, cached, forecast, mixed or recorded), add it.

    Args:
        block: the block, or an object with its methods.
        z_BnD: tokens before it.
        mod: its terms of the conditioning.
        take: gives the update of each branch.
        at: which tokens these are; None for all.
        skip_BnD: the same tokens after the block's source, if it has one.
    """
    if block.source is not None:
        assert skip_BnD is not None, "the tokens of its source reach a block that takes them in"
        z_BnD = block.merge(z_BnD, skip_BnD, at)
    for name in block.branches:
        z_BnD = z_BnD + block.gated(name, take(name, z_BnD), mod, at)
    return z_BnD


class Taps:
    """The tokens that long skips lead from one block to another, held from where they arise to the last block that takes them in.

    Args:
        blocks: the blocks, or objects with their attributes.
        z_BnD: tokens before the first of them; None if no block may take them in.
    """

    def __init__(self, blocks: Iterable[Any], z_BnD: Tensor | None = None) -> None:
        self._source = [block.source for block in blocks]
        self._last = {source: b for b, source in enumerate(self._source)}
        self._held: dict[int, Tensor] = {}
        if z_BnD is not None:
            self.leave(EMBEDDING, z_BnD)

    def leave(self, b: int, z_BnD: Tensor) -> None:
        """Hold the tokens after block b, if any takes them in."""
        if b in self._last:
            self._held[b] = z_BnD

    def enter(self, b: int) -> Tensor | None:
        """The tokens that block b takes in; None if it takes in none, or they did not arise here."""
        source = self._source[b]
        if source is None:
            return None
        return self._held.pop(source, None) if self._last[source] == b else self._held.get(source)


Run = Callable[[int, Tensor, Tensor | None], Tensor]  # a block's number, tokens, those of its long skip -> tokens after it


def run_through(blocks: Sequence[Any], z_BND: Tensor, run: Run) -> Tensor:
    """Tokens after blocks of which each is run, one way or another, on all tokens.

    Args:
        blocks: the blocks.
        z_BND: tokens before them.
        run: runs a block, given the tokens before it and those that it takes in by a long skip (None where it has none).
    """
    taps = Taps(blocks, z_BND)
    for b in range(len(blocks)):
        z_BND = run(b, z_BND, taps.enter(b))
        taps.leave(b, z_BND)
    return z_BND


def compute_through(blocks: Sequence[Any], mods: Sequence[Any], z_BND: Tensor) -> Tensor:
    """Tokens after blocks that are computed in full."""
    return run_through(blocks, z_BND, lambda b, z, skip: blocks[b](z, mods[b], skip))


class Network(nn.Module, ABC):
    """A diffusion transformer: tokens in, blocks, tokens out.

    What depends on time and conditions alone comes from `modulations`, and of that what no time changes from `constants`.
    """

    schedule: Schedule  # how it was trained: its times, and what its output predicts; an instance may have another than its class
    blocks: nn.ModuleList
    family: str  # its name in `tc_lightning.models.families`
    conditions: Conditions  # what a request must bring
    config: Any  # its shape, a dataclass of plain values; input_size and in_channels at least
    fixed_tokens: int = 0  # how many tokens are none of the image: they come first, and are computed wherever any are
    examples: Arrays | None = None  # rows of conditions that cannot be drawn, for images that nobody gave any
    nulls: Arrays | None = None  # of each condition whose null value is `stored`, that value, [1, ...]

    @property
    def branches(self) -> Branches:
        """Those of its blocks, as plans see them."""
        block: Any = self.blocks[0]
        return Branches(block.branches, block.attends)

    @property
    def skips(self) -> tuple[Skip, ...]:
        """Its long skips, as plans see them."""
        return tuple(Skip(block.source, b) for b, block in enumerate(self.blocks) if block.source is not None)  # type: ignore[arg-type]

    @abstractmethod
    def signature(self, teacher: str) -> ModelSignature:
        """What a plan must know of it; `teacher` is the sha256 of its weights."""

    @abstractmethod
    def embed(self, x_BCHW: Tensor, start: Any = ()) -> Tensor:
        """Latents, and what `constants` has for them -> tokens [B, N, D]."""

    @abstractmethod
    def condition(self, t_B: Tensor, **given: Tensor) -> Tensor:
        """Conditioning vector c [B, D] of times (in the network's own units) and of all conditions by name, each [B, ...].

        Times [S, 1] and conditions [U, ...] give [S, U, D]: the exporter asks for every time of a run and every distinct row of a
        request's conditions at once.
        """

    @abstractmethod
    def modulations(self, c_BD: Tensor) -> tuple[list[Any], Any]:
        """The terms of every block and of the readout, which depend on time and conditions alone: named tuples of [B, r, D].

        r is 1 as a rule. A term that several blocks share is to be one tensor: it is then kept once for all of them.
        """

    def constants(self, **given: Tensor) -> Constants:
        """What depends on conditions alone, each of which is [B, ...] by name; nothing unless a network says otherwise."""
        return Constants((), [()] * len(self.blocks))

    @abstractmethod
    def readout(self, z_BND: Tensor, mod: Any) -> Tensor:
        """Tokens -> raw output [B, out_channels, H, W]."""

    def forward(self, x_BCHW: Tensor, t_B: Tensor, asked: Asked) -> Tensor:
        """Raw output [B, out_channels, H, W] for latents, times and conditions."""
        terms = self.terms(t_B, by_name(self.conditions, asked))
        z_BND = self.embed(x_BCHW, terms.start)
        return self.readout(compute_through(list(self.blocks), terms.blocks, z_BND), terms.final)

    def terms(self, t_B: Tensor, given: Mapping[str, Tensor], constants: Constants | None = None) -> Terms:
        """All that a forward takes of times and conditions.

        Args:
            t_B: times, in the network's own units.
            given: all conditions by name, each [B, ...].
            constants: those of these conditions, if they are at hand.
        """
        own = self.constants(**given) if constants is None else constants
        return terms_of(self.modulations(self.condition(t_B, **given)), own)

    def eps(self, x_BCHW: Tensor, t_B: Tensor, asked: Asked) -> Tensor:
        """What the schedule says that the network predicts, [B, C, H, W]: the first C channels of the output."""
        return self(x_BCHW, t_B, asked)[:, : self.config.in_channels]
