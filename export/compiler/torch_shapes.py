"""What PyTorch's functions write as ONNX nodes, when they are called on symbolic values: those that look up, cut, join and reshape.

`ANSWERS` is the table of all of them (the others are in `export.compiler.torch_functions`). Keys are PyTorch's functions, the
package's own that hand over (`tc_lightning.models.lean`), and names of a tensor's methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from export.compiler.symbolic import CONTRIB, KINDS, Graph, Moved, Sym, syms
from tc_lightning.models.lean import put, take

ANSWERS: dict[Any, Callable[..., Any]] = {}
_OPEN = 2**63 - 1  # the end of a range that goes as far as there is anything
Answer = Callable[..., Any]


def answers(*functions: Callable[..., Any] | str) -> Callable[[Answer], Answer]:
    """Register what answers functions, and methods of tensors (by name)."""

    def register(answer: Answer) -> Answer:
        ANSWERS.update(dict.fromkeys(functions, answer))
        return answer

    return register


class Linear(NamedTuple):
    """Origin of a value that is a linear map with weights of the file."""

    x: Sym
    weight: str
    bias: str | None


class Piece(NamedTuple):
    """Origin of one of the equal parts of a value along its last axis, plus a number."""

    whole: Sym
    place: int
    parts: int
    plus: float = 0.0


class Rows(NamedTuple):
    """Origin of rows of a table that is known when the graph is written."""

    table: np.ndarray
    rows: Sym


def lifted(g: Graph, value: Any, kind: str | None = None) -> Sym:
    """A symbolic value for a parameter, a tensor or a number."""
    if isinstance(value, Sym):
        return value
    if isinstance(value, Tensor):
        name = g.weights.names.get(id(value))
        if name is not None:
            return g.weight(name)
        if value.dtype not in KINDS or value.is_meta:
            raise g.refusal(f"a tensor of {value.dtype} on {value.device} that is no parameter")
        exact = value.detach().cpu()
        return g.constant((exact if exact.dtype == torch.int64 else exact.float()).numpy(), KINDS[value.dtype])
    return g.constant(int(value) if kind == "int64" else float(value), kind or "fp32")


def lookup(g: Graph, table: np.ndarray, index: Sym, kind: str) -> Sym:
    """Rows of a table of constants."""
    found = gather(g.constant(table, kind), index, 0)
    found.origin = Rows(table, index)
    return found


def gather(x: Sym, index: Sym, axis: int) -> Sym:
    """Gather along an axis; an index without dimensions drops it."""
    return x.graph.op("Gather", x, index, shape=(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]), axis=axis)


def at(x: Sym, index: int, axis: int) -> Sym:
    """One entry along an axis, which goes."""
    return gather(x, x.graph.constant(index, "int64"), axis)


def product(x: Sym, weight: Sym, bias: str | None) -> Sym:
    """x W^T + b in the type of x. A Transpose node would be folded into a transposed copy of W by each session."""
    shape = (*x.shape[:-1], weight.shape[0])
    out = x.graph.op("FusedMatMul", x, weight.cast(x.kind), shape=shape, domain=CONTRIB, transB=1)
    return out if bias is None else out + x.graph.weight(bias).cast(x.kind)


# Tokens


@answers(take)
def _take(x_BND: Any, index: Any) -> Sym:
    g = next(syms((x_BND, index))).graph
    x, places = lifted(g, x_BND), lifted(g, index)
    if places.ndim == 1:
        return gather(x, places, 1)
    return g.op("GatherND", x, _pairs(places), shape=(*places.shape, x.shape[2]))


@answers(put)
def _put(x_BND: Sym, index: Any, rows_BKD: Sym) -> Sym:
    """ONNX Runtime scatters in place where it may, and where input and output are bound to one buffer."""
    pairs = _pairs(lifted(x_BND.graph, index))
    return x_BND.graph.op("ScatterND", x_BND, pairs, rows_BKD, shape=x_BND.shape)


def _pairs(index: Sym) -> Sym:
    """Pairs of row and token [M, K, 2]."""
    g = index.graph
    assert g.row_pairs is not None, "a graph that puts tokens into place numbers its rows first"
    return g.row_pairs + index[..., None] * g.constant(np.array([0, 1]), "int64")


@answers(torch.index_select, "index_select")
def _index_select(input: Sym, dim: int, index: Sym) -> Sym:
    return gather(input, lifted(input.graph, index), dim % input.ndim)


@answers(torch.topk, "topk")
def _topk(input: Sym, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> torch.return_types.topk:
    axis = dim % input.ndim
    shape = (*input.shape[:axis], k, *input.shape[axis + 1 :])
    count = input.graph.constant(np.array([k]), "int64")
    values, index = input.graph.multi("TopK", [shape] * 2, input, count, axis=axis, largest=int(largest), sorted=int(sorted))
    return torch.return_types.topk((values, Sym(input.graph, index.name, "int64", shape)))  # type: ignore[arg-type]


# Shapes


@answers("float")
def _float(x: Sym) -> Sym:
    return x.cast("fp32")


@answers("to")
def _to(x: Sym, *targets: Any) -> Sym:
    dtypes = [target for target in targets if isinstance(target, torch.dtype)]
    return x.cast(KINDS[dtypes[0]]) if dtypes else x


@answers("__len__")
def _len(x: Sym) -> int:
    if x.shape[0] is None:
        raise x.graph.refusal("the number of rows, which is known at run time alone,")
    return x.shape[0]


@answers(torch.cat, torch.concat)
def _cat(tensors: Sequence[Any], dim: int = 0) -> Sym:
    g = next(value for value in tensors if isinstance(value, Sym)).graph
    parts = [lifted(g, value) for value in tensors]
    axis = dim % parts[0].ndim
    sizes = [part.shape[axis] for part in parts]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    return g.op("Concat", *parts, shape=(*parts[0].shape[:axis], total, *parts[0].shape[axis + 1 :]), axis=axis)


@answers(torch.chunk, "chunk")
def _chunk(input: Sym, chunks: int, dim: int = 0) -> tuple[Sym, ...]:
    """Parts of a linear map are linear maps with parts of its weights."""
    axis = dim % input.ndim
    size = input.shape[axis]
    if size is not None and size % chunks:
        raise input.graph.refusal(f"parts of different sizes (of {size} in {chunks})")
    if axis == input.ndim - 1 and isinstance(input.origin, Linear):
        return tuple(_linear_part(input, input.origin, j, chunks) for j in range(chunks))
    shape = (*input.shape[:axis], None if size is None else size // chunks, *input.shape[axis + 1 :])
    pieces = input.graph.multi("Split", [shape] * chunks, input, axis=axis, num_outputs=chunks)
    if axis == input.ndim - 1:
        for j, piece in enumerate(pieces):
            piece.origin = Piece(input, j, chunks)
    return tuple(pieces)


def _linear_part(whole: Sym, made: Linear, part: int, parts: int) -> Sym:
    """One part of a linear map along its outputs, for example the queries of `qkv`."""
    g, rows = whole.graph, whole.shape[-1]
    assert rows is not None

    def view(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        owner, _, leaf = stem.rpartition(".")
        letter = leaf[part] if len(leaf) == parts else f"{leaf}.{part}"  # `attn.q.weight` of `attn.qkv.weight`
        shape = (rows // parts, *g.weights.index[name].shape[1:])
        return g.view(name, f"{owner}.{letter}.{kind}", shape, part, parts).name

    return product(made.x, g.weight(view(made.weight)), made.bias and view(made.bias))


@answers(torch.unsqueeze, "unsqueeze")
def _unsqueeze(input: Sym, dim: int) -> Sym:
    axis = dim % (input.ndim + 1)
    shape = (*input.shape[:axis], 1, *input.shape[axis:])
    return input.graph.op("Unsqueeze", input, input.graph.constant(np.array([axis]), "int64"), shape=shape)


@answers(torch.reshape, "reshape", "view")
def _reshape(input: Sym, *sizes: Any) -> Sym:
    wanted = list(sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes)
    same = [a == b for a, b in zip(wanted, input.shape, strict=False)]
    kept = same.index(False) if False in same else len(same)  # sizes that stay as they are, known or not
    if sum(size in (-1, None) for size in wanted[kept:]) > 1:
        raise input.graph.refusal(f"reshaping to {tuple(wanted)}, where more than one size is left open,")
    target = [0 if size is None and j < kept else -1 if size is None else size for j, size in enumerate(wanted)]
    shape = [None if size in (0, -1) else size for size in target]
    if -1 in target and None not in input.shape:
        shape[target.index(-1)] = math.prod(input.shape) // math.prod(size for size in shape if size)  # type: ignore[arg-type]
    out = input.graph.op("Reshape", input, input.graph.constant(np.array(target), "int64"), shape=tuple(shape))
    out.origin = Moved(input, lambda x: x.reshape(*wanted))
    return out


@answers(torch.flatten, "flatten")
def _flatten(input: Sym, start_dim: int = 0, end_dim: int = -1) -> Sym:
    start, stop = start_dim % input.ndim, end_dim % input.ndim + 1
    sizes = input.shape[start:stop]
    whole = -1 if None in sizes else math.prod(size for size in sizes if size is not None)
    return input.reshape(*input.shape[:start], whole, *input.shape[stop:])


@answers(torch.unflatten, "unflatten")
def _unflatten(input: Sym, dim: int, sizes: Sequence[int]) -> Sym:
    axis, parts = dim % input.ndim, list(sizes)
    size = input.shape[axis]
    if -1 in parts and size is not None:
        parts[parts.index(-1)] = size // -math.prod(parts)
    return input.reshape(*input.shape[:axis], *parts, *input.shape[axis + 1 :])


@answers(torch.permute, "permute")
def _permute(input: Sym, *dims: Any) -> Sym:
    order = [dim % input.ndim for dim in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    out = input.graph.op("Transpose", input, shape=tuple(input.shape[dim] for dim in order), perm=order)
    out.origin = Moved(input, lambda x: x.permute(*order))
    return out


@answers(torch.transpose, "transpose")
def _transpose(input: Sym, dim0: int, dim1: int) -> Sym:
    order = list(range(input.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return input.permute(*order)


@answers("__getitem__")
def _getitem(x: Sym, key: Any) -> Sym:
    """Numbers, ranges, new axes, and the ellipsis."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        place = keys.index(Ellipsis)
        keys[place : place + 1] = [slice(None)] * (x.ndim + 1 - sum(k is not None for k in keys))
    axis = 0
    for k in keys:
        if k is None:
            x, axis = x.unsqueeze(axis), axis + 1
        elif isinstance(k, int):
            x = at(x, k, axis)
        elif isinstance(k, slice) and k.step in (None, 1):
            x, axis = _range(x, axis, k), axis + 1
        else:
            raise x.graph.refusal(f"indexing by {k!r}")
    return x


def _range(x: Sym, axis: int, bounds: slice) -> Sym:
    size = x.shape[axis]
    if bounds == slice(None):
        return x
    ends = bounds.start, bounds.stop
    if not all(end is None or (isinstance(end, int) and (size is not None or end >= 0)) for end in ends):
        raise x.graph.refusal(f"the range {bounds.start}:{bounds.stop} of an axis whose size is known at run time alone")
    start, stop, _ = bounds.indices(_OPEN if size is None else size)
    if (start, stop) == (0, size):
        return x
    given = [x.graph.constant(np.array([value]), "int64") for value in (start, stop, axis)]
    length = None if size is None else max(stop - start, 0)
    return x.graph.op("Slice", x, *given, shape=(*x.shape[:axis], length, *x.shape[axis + 1 :]))
