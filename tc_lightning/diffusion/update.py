"""Guidance and the sampler's update, for torch tensors and for the exporter's symbolic values alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tc_lightning.cache import Ops

Array = Any


class Coefficients(NamedTuple):
    """Coefficients of one step (`tc_lightning.diffusion.table`): numbers, or scalars looked up in the graph.

    `next_m_prev` is None when the sampler never looks back.
    """

    m_x: Any
    m_eps: Any
    next_x: Any
    next_m: Any
    next_m_prev: Any | None


def guide(eps_BCHW: Array, scale: Any, guided: int, total: int, ops: Ops) -> Array:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) on the first `guided` of `total` channels.

    The batch holds the conditional half, then the unconditional one; the other channels are the conditional half's.
    """
    cond, uncond = ops.halves(eps_BCHW)
    if guided == total:
        return uncond + (cond - uncond) * scale
    cond_g, uncond_g = ops.channels(cond, 0, guided), ops.channels(uncond, 0, guided)
    return ops.concat([uncond_g + (cond_g - uncond_g) * scale, ops.channels(cond, guided, total)], 1)


def advance(x: Array, eps: Array, m_prev: Array | None, c: Coefficients) -> tuple[Array, Array]:
    """One sampler step without noise; returns (next x, m)."""
    m = x * c.m_x + eps * c.m_eps
    x_next = x * c.next_x + m * c.next_m
    if c.next_m_prev is not None and m_prev is not None:
        x_next = x_next + m_prev * c.next_m_prev
    return x_next, m
