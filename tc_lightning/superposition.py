"""A whole network in TokenCache's soft form: every block a superposition of computing and reusing (arXiv 2409.18523).

The arithmetic of a block is `tc_lightning.cache.mixed_block`; here are the network around it and guidance.

Shape suffixes: B images (guidance doubles them inside), C H W latent, L blocks, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tc_lightning.cache import BlockCache, TorchOps, full_block, mixed_block
from tc_lightning.diffusion.update import guide
from tc_lightning.models.dit import DiT, FinalModulation, Modulation
from tc_lightning.plan import Guidance

OPS = TorchOps()


def enter(
    model: DiT, guidance: Guidance, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor
) -> tuple[Tensor, list[Modulation], FinalModulation]:
    """Tokens and adaLN terms; with guidance the conditional half of the batch comes first, then the unconditional one."""
    if guidance.doubles_batch:
        x_BCHW, t_B = torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B])
        labels_B = torch.cat([labels_B, torch.full_like(labels_B, model.config.num_classes)])
    return model.embed(x_BCHW), *model.modulations(model.condition(t_B, labels_B))


def guided_eps(model: DiT, guidance: Guidance, z_BND: Tensor, final: FinalModulation) -> Tensor:
    """Guided eps [B, C, H, W] of the tokens after the last block, at least in fp32."""
    C = model.config.in_channels
    eps = model.readout(z_BND, final)[:, :C]
    eps = eps if eps.dtype == torch.float64 else eps.float()
    return guide(eps, guidance.scale, guidance.channels, C, OPS) if guidance.doubles_batch else eps


@torch.no_grad()
def record_caches(model: DiT, guidance: Guidance, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> list[BlockCache]:
    """Run every block in full and return what `mixed_eps` reuses of it."""
    z_BND, mods, _ = enter(model, guidance, x_BCHW, t_B, labels_B)
    caches = []
    for block, mod in zip(model.blocks, mods, strict=True):
        z_BND, cache = full_block(block, z_BND, mod)  # type: ignore[arg-type]
        caches.append(cache)
    return caches


def mixed_eps(
    model: DiT,
    guidance: Guidance,
    caches: Sequence[BlockCache],
    x_BCHW: Tensor,
    t_B: Tensor,
    labels_B: Tensor,
    w_BLN: Tensor,
) -> Tensor:
    """Guided eps [B, C, H, W] when block l computes its tokens with weight w and takes them from `caches` with weight 1 - w.

    Both halves of guidance use the same weights.
    """
    z_BND, mods, final = enter(model, guidance, x_BCHW, t_B, labels_B)
    w_BLN = torch.cat([w_BLN, w_BLN]) if guidance.doubles_batch else w_BLN
    for block, mod, w_BN, cache in zip(model.blocks, mods, w_BLN.unbind(1), caches, strict=True):
        z_BND = mixed_block(block, z_BND, mod, w_BN, cache)  # type: ignore[arg-type]
    return guided_eps(model, guidance, z_BND, final)


@torch.no_grad()
def reused_eps(model: DiT, guidance: Guidance, caches: Sequence[BlockCache], x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
    """`mixed_eps` with w = 0 everywhere: all residuals come from `caches`, and no block is run."""
    z_BND, _, final = enter(model, guidance, x_BCHW, t_B, labels_B)
    for cache in caches:
        z_BND = z_BND + cache.residual
    return guided_eps(model, guidance, z_BND, final)
