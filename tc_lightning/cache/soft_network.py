"""A whole network in TokenCache's soft form: every block a superposition of computing and reusing (arXiv 2409.18523).

The arithmetic of a block is `tc_lightning.cache.soft.mixed_block` for tokens, and `mixed_branches` for routers; here are the
network around it and guidance.

Shape suffixes: B images (guidance doubles them inside), C H W latent, L blocks, N tokens, D width, 2 branches (0 attn,
1 mlp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tc_lightning.cache.soft import BlockCache, BranchCache, full_block, mixed_block, mixed_branches
from tc_lightning.diffusion.update import guide
from tc_lightning.models.conditions import Asked, given_of
from tc_lightning.models.network import Network, run_through
from tc_lightning.plan.guidance import Guidance


def enter(model: Network, guidance: Guidance, x_BCHW: Tensor, t_B: Tensor, asked: Asked) -> tuple[Tensor, Sequence[Any], Any]:
    """Tokens, and terms of blocks and readout; with guidance the conditional half of the batch comes before the unconditional one."""
    given = given_of(model.conditions, asked)
    if guidance.doubles_batch:
        x_BCHW, t_B = torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B])
        given = given.with_nulls(model.conditions, model.nulls)
    terms = model.terms(t_B, given)
    return model.embed(x_BCHW, terms.start), terms.blocks, terms.final


def guided_eps(model: Network, guidance: Guidance, z_BND: Tensor, final: Any) -> Tensor:
    """Guided eps [B, C, H, W] of the tokens after the last block, at least in fp32."""
    C = model.config.in_channels
    eps = model.readout(z_BND, final)[:, :C]
    eps = eps if eps.dtype == torch.float64 else eps.float()
    return guide(eps, guidance.scale, guidance.channels, C) if guidance.doubles_batch else eps


class StepCaches(NamedTuple):
    """What a full step leaves for the soft forms of the next one, block by block: of tokens, and of branches."""

    blocks: list[BlockCache]
    branches: list[BranchCache]


def full_eps(model: Network, guidance: Guidance, x_BCHW: Tensor, t_B: Tensor, asked: Asked) -> tuple[Tensor, StepCaches]:
    """Guided eps [B, C, H, W] at full compute, and what the next step can reuse of it."""
    z_BND, mods, final = enter(model, guidance, x_BCHW, t_B, asked)
    caches = StepCaches([], [])

    def run(b: int, z_BND: Tensor, skip_BND: Tensor | None) -> Tensor:
        out_BND, whole, branches = full_block(model.blocks[b], z_BND, mods[b], skip_BND)  # type: ignore[arg-type]
        caches.blocks.append(whole)
        caches.branches.append(branches)
        return out_BND

    z_BND = run_through(list(model.blocks), z_BND, run)
    return guided_eps(model, guidance, z_BND, final), caches


@torch.no_grad()
def record_caches(model: Network, guidance: Guidance, x_BCHW: Tensor, t_B: Tensor, asked: Asked) -> list[BlockCache]:
    """Run every block in full and return what `mixed_eps` reuses of it."""
    return full_eps(model, guidance, x_BCHW, t_B, asked)[1].blocks


def mixed_eps(
    model: Network,
    guidance: Guidance,
    caches: Sequence[BlockCache],
    x_BCHW: Tensor,
    t_B: Tensor,
    asked: Asked,
    w_BLN: Tensor,
) -> Tensor:
    """Guided eps [B, C, H, W] when block l computes its tokens with weight w and takes them from `caches` with weight 1 - w.

    Weights are those of the image's tokens; others are computed. Both halves of guidance use the same weights.
    """
    z_BND, mods, final = enter(model, guidance, x_BCHW, t_B, asked)
    w_BLN = F.pad(torch.cat([w_BLN, w_BLN]) if guidance.doubles_batch else w_BLN, (model.fixed_tokens, 0), value=1.0)

    def run(b: int, z_BND: Tensor, skip_BND: Tensor | None) -> Tensor:
        return mixed_block(model.blocks[b], z_BND, mods[b], w_BLN[:, b], caches[b], skip_BND)  # type: ignore[arg-type]

    z_BND = run_through(list(model.blocks), z_BND, run)
    return guided_eps(model, guidance, z_BND, final)


def mixed_branches_eps(
    model: Network,
    guidance: Guidance,
    caches: Sequence[BranchCache],
    x_BCHW: Tensor,
    t_B: Tensor,
    asked: Asked,
    w_BL2: Tensor,
) -> tuple[Tensor, list[BranchCache]]:
    """Guided eps [B, C, H, W] when the branches of block l are computed with the weights w[:, l] (attn, mlp) and otherwise reused.

    Both halves of guidance use the same weights. The caches returned are those of the next step.
    """
    z_BND, mods, final = enter(model, guidance, x_BCHW, t_B, asked)
    w_BL211 = (torch.cat([w_BL2, w_BL2]) if guidance.doubles_batch else w_BL2)[..., None, None]
    mixtures: list[BranchCache] = []

    def run(b: int, z_BND: Tensor, skip_BND: Tensor | None) -> Tensor:
        block: Any = model.blocks[b]
        weights = dict(zip(block.branches, w_BL211[:, b].unbind(1), strict=True))
        out_BND, mixture = mixed_branches(block, z_BND, mods[b], weights, caches[b], skip_BND)
        mixtures.append(mixture)
        return out_BND

    z_BND = run_through(list(model.blocks), z_BND, run)
    return guided_eps(model, guidance, z_BND, final), mixtures


@torch.no_grad()
def reused_eps(model: Network, guidance: Guidance, caches: Sequence[BlockCache], x_BCHW: Tensor, t_B: Tensor, asked: Asked) -> Tensor:
    """`mixed_eps` with w = 0 everywhere: all residuals come from `caches`, and no block is run."""
    z_BND, _, final = enter(model, guidance, x_BCHW, t_B, asked)
    for cache in caches:
        z_BND = z_BND + cache.residual
    return guided_eps(model, guidance, z_BND, final)
