"""A network's own modules, made ready to be run on symbolic values, and its conditioning as one table and constants.

Shape suffixes: S steps of a chunk, U distinct rows of conditions, M rows of the (doubled) batch, R rows of the table, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from export.compiler.symbolic import Graph, Sym, syms
from export.compiler.torch_functions import elementwise
from export.compiler.torch_shapes import Piece
from export.compiler.weights import TORCH_DTYPES
from export.runtime.layout import CONSTANT
from tc_lightning.models.network import Block, Constants, Terms, side_by_side

Module = TypeVar("Module", bound=nn.Module)


def skeleton(module: Module, precision: str, stem: str = "") -> tuple[Module, dict[int, str]]:
    """A copy of a module in the working precision and without its weights, whose nodes bear the names of its parts.

    Args:
        module: the module, which stays as it is.
        precision: fp32, fp16 or bf16.
        stem: what the names of its weights begin with in the weights file.

    Returns:
        The copy, and the names of its parameters by identity.
    """
    memo: dict[int, Any] = {}
    names: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        empty = torch.empty(tensor.shape, dtype=TORCH_DTYPES[precision], device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        names[id(memo[id(tensor)])] = stem + name
    twin = copy.deepcopy(module, memo)
    for name, part in twin.named_modules():
        if name:
            enter, leave = _scopes(stem + name)
            part.register_forward_pre_hook(enter)
            part.register_forward_hook(leave, always_call=True)
    return twin, names


def _scopes(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that name the nodes which a module writes."""

    def enter(_: nn.Module, args: Any) -> None:
        for value in list(syms(args))[:1]:
            value.graph.enter(name)

    def leave(_: nn.Module, args: Any, __: Any) -> None:
        for value in list(syms(args))[:1]:
            value.graph.leave()

    return enter, leave


class NamedBlock:
    """A block whose nodes bear its name; see `tc_lightning.models.network.Block`."""

    def __init__(self, graph: Graph, name: str, block: Block) -> None:
        self._graph, self._name, self._block = graph, name, block
        self.branches, self.source = block.branches, block.source

    def branch(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See `Block`."""
        with self._graph.scope(self._name):
            return self._block.branch(*args, **kwargs)

    def merge(self, *args: Any) -> Any:
        """See `Block`."""
        with self._graph.scope(self._name):
            return self._block.merge(*args)

    def gated(self, *args: Any) -> Any:
        """See `Block`."""
        with self._graph.scope(self._name):
            return self._block.gated(*args)


class NetworkInGraph:
    """A network between latents and eps in fp32, which computes in the working precision."""

    def __init__(self, graph: Graph, network: Any, precision: str) -> None:
        self._network, self._precision = network, precision
        self.blocks = [NamedBlock(graph, f"blocks.{b}", block) for b, block in enumerate(network.blocks)]

    def embed(self, x_MCHW: Sym, start: Any) -> Sym:
        """Latents -> tokens."""
        return self._network.embed(x_MCHW.cast(self._precision), start)

    def readout(self, z_MND: Sym, final: Any) -> Sym:
        """Tokens -> raw output."""
        return self._network.readout(z_MND, final).cast("fp32")


class Conditioning(NamedTuple):
    """What a network makes of time and conditions: the terms of each block, those of the readout, named tuples of [.., r, D], and the
    constants of its conditions."""

    blocks: Sequence[Any]
    final: Any
    constants: Constants

    @property
    def terms(self) -> list[Any]:
        """All terms, one after the other; those that blocks share come several times."""
        return [term for block in (*self.blocks, self.final) for term in block]


def conditioning(network: Any, t: Any, given: Mapping[str, Any]) -> Conditioning:
    """The conditioning of times and conditions."""
    blocks, final = network.modulations(network.condition(t, **given))
    return Conditioning(blocks, final, network.constants(**given))


class Hoisted:
    """What the condition graph hands to the steps, and in which form: terms as rows of a table, and constants by name.

    What is one tensor in the network is handed over once, however many blocks take it.

    Args:
        like: conditioning of the same structure, of tensors without values.
    """

    def __init__(self, like: Conditioning) -> None:
        self._like = like
        self._rows: dict[int, range] = {}  # of each term, by the identity of its tensor
        for term in like.terms:
            self._rows.setdefault(id(term), range(self.rows, self.rows + term.shape[-2]))
        constants = like.constants
        named = [("start", constants.start), *((str(b), block) for b, block in enumerate(constants.blocks))]
        pairs = [(id(value), f"{CONSTANT}{place}.{name}") for place, values in named for name, value in _fields(values)]
        self._names = dict(reversed(pairs))  # the first that has a tensor names it

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return sum(map(len, self._rows.values()))

    @property
    def constants(self) -> dict[str, tuple[int, ...]]:
        """Names of the constants, and the shape of each for one row of conditions."""
        return {self._names[id(value)]: tuple(value.shape[1:]) for value in self._like.constants.tensors}

    def named(self, constants: Constants) -> dict[str, Any]:
        """Constants of the same structure by name."""
        return {self._names[id(of)]: value for of, value in zip(self._like.constants.tensors, constants.tensors, strict=True)}

    def pack(self, terms: Conditioning) -> Sym:
        """All terms as a table [S, U, R, D], in which each has its rows.

        Terms that are the parts of one value, in order, need not be taken apart for that; numbers that were added to some come last.
        """
        first: dict[int, Any] = {}
        for of, term in zip(self._like.terms, terms.terms, strict=True):
            first.setdefault(id(of), term)
        leaves, parts, plus = list(first.values()), [], []
        while leaves:
            piece = leaves[0].origin
            whole = leaves[: piece.parts] if isinstance(piece, Piece) else []
            made_of = [term.origin._replace(plus=0.0) if isinstance(term.origin, Piece) else None for term in whole]
            if whole and leaves[0].shape[-2] == 1 and made_of == [Piece(piece.whole, j, piece.parts) for j in range(piece.parts)]:
                parts.append(piece.whole.reshape(*leaves[0].shape[:-2], piece.parts, leaves[0].shape[-1]))
                plus += [term.origin.plus for term in whole]
            else:
                whole = leaves[:1]
                parts += whole
                plus += [0.0] * whole[0].shape[-2]
            del leaves[: len(whole)]
        return elementwise("Add", torch.cat(parts, -2), torch.tensor(plus, dtype=parts[0].dtype)[:, None])

    def unpack(self, graph: Graph, table_MRD: Sym, used: Sequence[int], constant: Callable[[str], Sym]) -> Terms:
        """The terms of the `used` blocks (None for the others), of `embed` and of the readout, for each row of the batch.

        Args:
            graph: the graph.
            table_MRD: the rows of `pack`.
            used: blocks whose terms are wanted.
            constant: the constant of a name.
        """
        like, blocks = self._like, list[Any]([None] * len(self._like.blocks))
        found = self._taken(graph, table_MRD, [term for values in (*(like.blocks[b] for b in used), like.final) for term in values])

        def filled(values: Any, known: Mapping[int, Any]) -> Any:
            return type(values)(*(known[id(value)] for value in values)) if values else values

        held = {id(value): constant(self._names[id(value)]) for b in used for value in like.constants.blocks[b]}
        for b in used:
            blocks[b] = side_by_side(filled(like.blocks[b], found), filled(like.constants.blocks[b], held))
        start = filled(like.constants.start, {id(value): constant(self._names[id(value)]) for value in like.constants.start})
        return Terms(start, blocks, filled(like.final, found))

    def _taken(self, graph: Graph, table_MRD: Sym, wanted: Sequence[Any]) -> dict[int, Sym]:
        """Terms by identity."""
        rows = {id(term): self._rows[id(term)] for term in wanted}
        if any(len(places) > 1 for places in rows.values()):
            return {term: table_MRD[:, places.start : places.stop] for term, places in rows.items()}
        if len(rows) < self.rows:
            table_MRD = table_MRD.index_select(1, graph.constant(np.array([places.start for places in rows.values()]), "int64"))
        return dict(zip(rows, table_MRD.chunk(len(rows), 1), strict=True))


def _fields(values: Any) -> list[tuple[str, Any]]:
    return list(values._asdict().items()) if values else []
