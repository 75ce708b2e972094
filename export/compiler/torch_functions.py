"""What PyTorch's functions write as ONNX nodes, when they are called on symbolic values: arithmetic and layers.

The others are in `export.compiler.torch_shapes`.

Weights keep the layout of torch, [out, in]: products take their transpose, which costs nothing, and is what lets all programs read one
copy (`export.runtime.sampler`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.compiler.symbolic import KINDS, Graph, Shape, Sym
from export.compiler.torch_shapes import ANSWERS, Linear, Piece, Rows, answers, gather, lifted, product
from tc_lightning.models.lean import attend, beside, patch_tokens, time_features, time_frequencies

__all__ = ["ANSWERS"]

# Arithmetic


def broadcast(g: Graph, *shapes: Shape) -> Shape:
    """The shape of an elementwise operation."""
    ndim = max(map(len, shapes))
    sizes = []
    for column in zip(*((1,) * (ndim - len(shape)) + shape for shape in shapes), strict=True):
        known = {size for size in column if size != 1}
        if len(known - {None}) > 1:
            raise g.refusal(f"an elementwise operation on the shapes {' and '.join(map(str, shapes))}")
        sizes.append(max((size for size in known if size), default=None) if known else 1)
    return tuple(sizes)


def elementwise(op_type: str, a: Any, b: Any) -> Sym:
    """An operation on two values, promoted as PyTorch promotes types: numbers, and scalars, take the type of the other."""
    g = (a if isinstance(a, Sym) else b).graph
    x, y = (lifted(g, value, other.kind if isinstance(other, Sym) else None) for value, other in ((a, b), (b, a)))
    if x.kind != y.kind:
        ranking = [value.kind for value in (x, y) if value.shape]
        kind = ranking[0] if len(ranking) == 1 else KINDS[torch.promote_types(x.dtype, y.dtype)]
        x, y = x.cast(kind), y.cast(kind)
    return g.op(op_type, x, y, shape=broadcast(g, x.shape, y.shape))


@answers(torch.add, "add", "__add__", "__radd__")
def _add(a: Any, b: Any) -> Sym:
    total = elementwise("Add", a, b)
    x, number = (a, b) if isinstance(a, Sym) else (b, a)
    if isinstance(number, (int, float)) and isinstance(x.origin, Piece):
        total.origin = x.origin._replace(plus=x.origin.plus + number)
    return total


@answers(torch.sub, "sub", "__sub__")
def _sub(a: Any, b: Any) -> Sym:
    return elementwise("Sub", a, b)


@answers("__rsub__")
def _rsub(a: Any, b: Any) -> Sym:
    return elementwise("Sub", b, a)


@answers(torch.mul, "mul", "__mul__", "__rmul__")
def _mul(a: Any, b: Any) -> Sym:
    return elementwise("Mul", a, b)


@answers(torch.div, "div", "__truediv__")
def _div(a: Any, b: Any) -> Sym:
    return elementwise("Div", a, b)


@answers("__rtruediv__", "__rdiv__")
def _rdiv(a: Any, b: Any) -> Sym:
    return elementwise("Div", b, a)


@answers(torch.neg, "neg", "__neg__")
def _neg(x: Sym) -> Sym:
    return _unary("Neg", x)


@answers(torch.abs, "abs")
def _abs(x: Sym) -> Sym:
    return _unary("Abs", x)


@answers(torch.floor, "floor")
def _floor(x: Sym) -> Sym:
    return _unary("Floor", x)


@answers(torch.tanh, F.tanh, "tanh")
def _tanh(x: Sym) -> Sym:
    return _unary("Tanh", x)


@answers(torch.sigmoid, F.sigmoid, "sigmoid")
def _sigmoid(x: Sym) -> Sym:
    return _unary("Sigmoid", x)


@answers(F.silu)
def _silu(input: Sym, inplace: bool = False) -> Sym:
    return input * _unary("Sigmoid", input)


@answers(F.gelu)
def _gelu(input: Sym, approximate: str = "none") -> Sym:
    return _unary("Gelu", input, approximate=approximate)


def _unary(op_type: str, x: Sym, **attributes: Any) -> Sym:
    return x.graph.op(op_type, x, shape=x.shape, **attributes)


@answers(torch.mean, "mean")
def _mean(input: Sym, dim: int, keepdim: bool = False) -> Sym:
    axis = dim % input.ndim
    shape = tuple(1 if j == axis else size for j, size in enumerate(input.shape) if keepdim or j != axis)
    axes = input.graph.constant(np.array([axis]), "int64")
    return input.graph.op("ReduceMean", input, axes, shape=shape, keepdims=int(keepdim))


# Layers


@answers(F.linear)
def _linear(input: Sym, weight: Tensor, bias: Tensor | None = None) -> Sym:
    g = input.graph
    names = [None if p is None else g.weights.names.get(id(p)) for p in (weight, bias)]
    if names[0] is None or (bias is not None and names[1] is None):
        raise g.refusal("a linear map whose weights are no parameters")
    out = product(input, g.weight(names[0]), names[1])
    out.origin = Linear(input, names[0], names[1])
    return out


@answers(F.embedding)
def _embedding(input: Sym, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, **unused: Any) -> Sym:
    if max_norm is not None:
        raise input.graph.refusal("an embedding with max_norm, which changes its weights,")
    return gather(lifted(input.graph, weight), input, 0)


@answers(F.layer_norm)
def _layer_norm(
    input: Sym, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Sym:
    """Statistics are in fp32. The node could take scale and shift of each row, but on the CPU that path is slower than two nodes."""
    g = input.graph
    _require_last_axis(input, normalized_shape)
    scale = g.constant(np.ones(normalized_shape), input.kind) if weight is None else lifted(g, weight).cast(input.kind)
    shift = None if bias is None else lifted(g, bias).cast(input.kind)
    given = [input, scale] if shift is None else [input, scale, shift]
    return g.op("LayerNormalization", *given, shape=input.shape, axis=-1, epsilon=eps, stash_type=1)


@answers(F.rms_norm)
def _rms_norm(input: Sym, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Sym:
    g = input.graph
    _require_last_axis(input, normalized_shape)
    scale = g.constant(np.ones(normalized_shape), input.kind) if weight is None else lifted(g, weight).cast(input.kind)
    epsilon = torch.finfo(input.dtype).eps if eps is None else eps
    return g.op("RMSNormalization", input, scale, shape=input.shape, axis=-1, epsilon=epsilon, stash_type=1)


def _require_last_axis(x: Sym, normalized_shape: Sequence[int]) -> None:
    if tuple(normalized_shape) != x.shape[-1:]:
        raise x.graph.refusal(f"a norm over {tuple(normalized_shape)} of the shape {x.shape}")


@answers(attend)
def _attend(q_BnD: Sym, k_BND: Sym, v_BND: Sym, heads: int, bias: Any = None) -> Sym:
    """One node, which splits the heads itself; a bias that is the same for all queries has to be repeated for it."""
    attributes: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": heads, "softmax_precision": 1}
    masks = [] if bias is None else [_for_each_query(lifted(q_BnD.graph, bias).cast(q_BnD.kind), q_BnD)]
    return q_BnD.graph.op("Attention", q_BnD, k_BND, v_BND, *masks, shape=q_BnD.shape, **attributes)


def _for_each_query(bias: Sym, q_BnD: Sym) -> Sym:
    """The bias with a row for each query, as ONNX Runtime wants it."""
    g, n = q_BnD.graph, q_BnD.shape[1]
    if bias.ndim < 2 or bias.shape[-2] != 1 or n == 1:
        return bias
    if n is None:
        one, count = g.constant(np.array([1]), "int64"), g.op("Shape", q_BnD, shape=(1,), kind="int64", start=1, end=2)
        sizes = g.op("Concat", *[one] * (bias.ndim - 2), count, one, shape=(bias.ndim,), axis=0)
    else:
        sizes = g.constant(np.array([*[1] * (bias.ndim - 2), n, 1]), "int64")
    return g.op("Expand", bias, sizes, shape=(*bias.shape[:-2], n, bias.shape[-1]))


@answers(beside)
def _beside(z: Sym, constant: Any) -> Sym:
    return lifted(z.graph, constant)


@answers(patch_tokens)
def _patch_tokens(x_BCHW: Sym, weight_DCPP: Tensor, bias_D: Tensor | None) -> Sym:
    """A convolution whose stride is its kernel's size is a product, and needs no cuDNN."""
    g, (D, C, P, _) = x_BCHW.graph, weight_DCPP.shape
    H, W = (side // P for side in x_BCHW.shape[2:] if side is not None)
    patches = x_BCHW.reshape(x_BCHW.shape[0], C, H, P, W, P).permute(0, 2, 4, 1, 3, 5).reshape(x_BCHW.shape[0], H * W, C * P * P)
    name, bias = g.weights.names[id(weight_DCPP)], g.weights.names.get(id(bias_D))
    matrix = g.view(name, f"{name.removesuffix('weight')}matrix.weight", (D, C * P * P))
    return product(patches, matrix, bias)


@answers(time_features)
def _time_features(t: Sym, width: int, freq_shift: float) -> Sym:
    """Computed by PyTorch for every time that the graph knows: sines of large arguments are no matter for half precision.

    Of a condition (a resolution, for example) they are computed in the graph, in fp32.
    """
    if not isinstance(t.origin, Rows):
        args = t.cast("fp32")[..., None] * time_frequencies(width, freq_shift)
        return t.graph.op("Concat", _unary("Cos", args), _unary("Sin", args), shape=(*t.shape, width), axis=t.ndim)
    table = time_features(torch.tensor(t.origin.table, dtype=torch.float32), width, freq_shift)
    return gather(t.graph.constant(table.numpy(), "fp32"), t.origin.rows, 0)
