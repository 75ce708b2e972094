"""Operations that PyTorch spells in several functions and a graph in one node, or in far fewer.

Each is ordinary PyTorch on tensors. A value that overrides PyTorch's functions (the exporter's, `export.compiler.symbolic`) is asked
first, as PyTorch asks it in functions of its own.

Shape suffixes: B batch, C channels, H W latent height and width, N tokens, n or K any subset of them, D width, F features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

Function = TypeVar("Function", bound=Callable[..., Tensor])


def hands_over(function: Function) -> Function:
    """Let arguments that override PyTorch's functions answer for this one, too."""

    @functools.wraps(function)
    def asking(*args: object, **kwargs: object) -> Tensor:
        if has_torch_function(values := (*args, *kwargs.values())):
            return handle_torch_function(asking, values, *args, **kwargs)
        return function(*args, **kwargs)

    return asking  # type: ignore[return-value]


@hands_over
def attend(q_BnD: Tensor, k_BND: Tensor, v_BND: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Multi-head attention from the tokens of q to those of k and v, heads side by side, [B, n, D].

    Args:
        q_BnD: queries.
        k_BND: keys of the tokens that are attended to, which may be of another number.
        v_BND: their values.
        heads: attention heads.
        bias: added to the logits before the softmax; of any shape that broadcasts to [B, heads, n, N]. -10000 hides a token.
    """
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q_BnD, k_BND, v_BND))
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


@hands_over
def beside(z: Tensor, constant: Tensor) -> Tensor:
    """A constant that is computed with beside `z`, but not from it: where `z` stands in a graph, the constant stands in it too."""
    return constant


@hands_over
def patch_tokens(x_BCHW: Tensor, weight_DCPP: Tensor, bias_D: Tensor | None) -> Tensor:
    """Linear map of each non-overlapping patch of side P to a token, in row-major order, [B, N, D]."""
    return F.conv2d(x_BCHW, weight_DCPP, bias_D, stride=weight_DCPP.shape[-1]).flatten(2).transpose(1, 2)


@hands_over
def time_features(t: Tensor, width: int, freq_shift: float) -> Tensor:
    """Cosines and sines of times at `width` / 2 frequencies from 1 to 1 / 10000, [...] -> [..., width] in fp32.

    Args:
        t: times in the network's own units, of any shape.
        width: number of features.
        freq_shift: frequencies are spaced by 1 / (width / 2 - freq_shift) of the logarithmic range.
    """
    # On the CPU first: the frequencies are constants of the graph, and must be the same on every device.
    args = t.float()[..., None] * time_frequencies(width, freq_shift).to(t.device)
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


def time_frequencies(width: int, freq_shift: float) -> Tensor:
    """The frequencies of `time_features`, [width / 2] in fp32 on the CPU."""
    half = width // 2
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - freq_shift))


@hands_over
def take(x_BND: Tensor, index: Tensor) -> Tensor:
    """The tokens `index` of `x`, [B, K, D]; `index` is [K], the same for every row of the batch, or [B, K], each row's own."""
    if index.ndim == 1:
        return x_BND.index_select(1, index)
    return x_BND.gather(1, index[:, :, None].expand(-1, -1, x_BND.shape[2]))


@hands_over
def put(x_BND: Tensor, index: Tensor, rows_BKD: Tensor) -> Tensor:
    """`x` with the tokens `index` (as in `take`) replaced."""
    if index.ndim == 1:
        return x_BND.index_copy(1, index, rows_BKD)
    return x_BND.scatter(1, index[:, :, None].expand_as(rows_BKD), rows_BKD)
