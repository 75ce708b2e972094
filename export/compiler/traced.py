"""A network's own modules, made ready to be run on symbolic values, and its conditioning as one table.

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
from tc_lightning.models.network import Block

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
        self._graph, self._name, self._block, self.branches = graph, name, block, block.branches

    def branch(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See `Block`."""
        with self._graph.scope(self._name):
            return self._block.branch(*args, **kwargs)

    def gated(self, *args: Any) -> Any:
        """See `Block`."""
        with self._graph.scope(self._name):
            return self._block.gated(*args)


class NetworkInGraph:
    """A network between latents and eps in fp32, which computes in the working precision."""

    def __init__(self, graph: Graph, network: Any, precision: str) -> None:
        self._network, self._precision = network, precision
        self.blocks = [NamedBlock(graph, f"blocks.{b}", block) for b, block in enumerate(network.blocks)]

    def embed(self, x_MCHW: Sym) -> Sym:
        """Latents -> tokens."""
        return self._network.embed(x_MCHW.cast(self._precision))

    def readout(self, z_MND: Sym, final: Any) -> Sym:
        """Tokens -> raw output."""
        return self._network.readout(z_MND, final).cast("fp32")


class Conditioning(NamedTuple):
    """What a network makes of time and conditions: the terms of each block, and those of the readout; named tuples of [.., 1, D]."""

    blocks: list[Any]
    final: Any

    @property
    def rows(self) -> int:
        """Terms in all."""
        return sum(map(len, self.blocks)) + len(self.final)


def conditioning(network: Any, t: Any, given: Mapping[str, Any]) -> Conditioning:
    """The conditioning of times and conditions."""
    return Conditioning(*network.modulations(network.condition(t, **given)))


def pack(terms: Conditioning) -> Sym:
    """All terms as a table [S, U, R, D], in which each has a row.

    Terms that are the parts of one value, in order, need not be taken apart for that; numbers that were added to some come last.
    """
    leaves = [term for block in (*terms.blocks, terms.final) for term in block]
    parts, plus = [], []
    while leaves:
        piece = leaves[0].origin
        whole = leaves[: piece.parts] if isinstance(piece, Piece) else []
        made_of = [term.origin._replace(plus=0.0) if isinstance(term.origin, Piece) else None for term in whole]
        if whole and made_of == [Piece(piece.whole, j, piece.parts) for j in range(piece.parts)]:
            parts.append(piece.whole.reshape(*leaves[0].shape[:-2], piece.parts, leaves[0].shape[-1]))
            plus += [term.origin.plus for term in whole]
        else:
            whole = leaves[:1]
            parts += whole
            plus.append(0.0)
        del leaves[: len(whole)]
    return elementwise("Add", torch.cat(parts, -2), torch.tensor(plus, dtype=parts[0].dtype)[:, None])


def unpack(graph: Graph, table_MRD: Sym, like: Conditioning, used: Sequence[int]) -> Conditioning:
    """The terms of the `used` blocks (None for the others) and of the readout, each [M, 1, D], from the rows of `pack`.

    Args:
        graph: the graph.
        table_MRD: the table's rows for each row of the batch.
        like: conditioning of the same structure.
        used: blocks whose terms are wanted.
    """
    starts = np.cumsum([0, *map(len, like.blocks)]).tolist()
    rows = [row for b in used for row in range(starts[b], starts[b + 1])] + list(range(starts[-1], like.rows))
    if len(rows) < like.rows:
        table_MRD = table_MRD.index_select(1, graph.constant(np.array(rows), "int64"))
    pieces = list(table_MRD.chunk(len(rows), 1))
    blocks: list[Any] = [None] * len(like.blocks)
    for b in used:
        blocks[b] = type(like.blocks[b])(*(pieces.pop(0) for _ in like.blocks[b]))
    return Conditioning(blocks, type(like.final)(*pieces))
