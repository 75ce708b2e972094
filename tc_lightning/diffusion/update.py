"""Guidance and the sampler's update. The exporter runs them on symbolic values (`export.compiler.symbolic`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tc_lightning.plan.sampler_table import SamplerStep


class Coefficients(NamedTuple):
    """Coefficients of one step (`tc_lightning.plan.sampler_table`): numbers, or scalars looked up in the graph.

    `past` weighs m_{i-1} and m_{i-2}; None where a weight is known to be 0.
    """

    m_x: Any
    m_eps: Any
    next_x: Any
    next_m: Any
    past: tuple[Any | None, ...]


def guide(eps_BCHW: Tensor, scale: Any, guided: int, total: int) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) on the first `guided` of `total` channels.

    The batch holds the conditional half, then the unconditional one; the other channels are the conditional half's.
    """
    cond, uncond = eps_BCHW.chunk(2)
    if guided == total:
        return uncond + (cond - uncond) * scale
    cond_g, uncond_g = cond[:, :guided], uncond[:, :guided]
    return torch.cat([uncond_g + (cond_g - uncond_g) * scale, cond[:, guided:]], 1)


def guide_by(cond_BCHW: Tensor, difference: Tensor, scale: Any, guided: int, total: int) -> Tensor:
    """Guidance from the conditional eps and the difference cond - uncond of its guided channels."""
    if guided == total:
        return cond_BCHW + difference * (scale - 1.0)
    cond_g = cond_BCHW[:, :guided]
    return torch.cat([cond_g + difference * (scale - 1.0), cond_BCHW[:, guided:]], 1)


def difference_of_halves(eps_BCHW: Tensor, guided: int, total: int) -> Tensor:
    """cond - uncond on the guided channels, from a batch that holds both halves."""
    cond, uncond = eps_BCHW.chunk(2)
    if guided == total:
        return cond - uncond
    return cond[:, :guided] - uncond[:, :guided]


def coefficients(row: SamplerStep) -> Coefficients:
    """The numbers of one step."""
    return Coefficients(row.m_x, row.m_eps, row.next_x, row.next_m, (row.next_m_prev or None, row.next_m_prev2 or None))


def advance(x: Tensor, eps: Tensor, past: Sequence[Tensor], c: Coefficients) -> tuple[Tensor, Tensor]:
    """One sampler step without noise; `past` holds m_{i-1}, m_{i-2} as far as they exist; returns (next x, m)."""
    m = x * c.m_x + eps * c.m_eps
    x_next = x * c.next_x + m * c.next_m
    for m_past, weight in zip(past, c.past, strict=False):  # the first steps have fewer past outputs than weights
        if weight is not None:
            x_next = x_next + m_past * weight
    return x_next, m
