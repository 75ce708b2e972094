"""What networks of patches tell plans of themselves: their signature, and what their parts cost in multiply-accumulates."""

from __future__ import annotations

from typing import Any

from tc_lightning.models.embedders import FREQUENCIES
from tc_lightning.models.network import Network
from tc_lightning.plan.block_costs import UnlikeBlocks
from tc_lightning.plan.signature import Macs, ModelSignature
from tc_lightning.plan.skips import LongSkips


def attention_macs(width: int) -> Macs:
    """Of self-attention: four products by D x D a token, and q k and the weights times v a pair."""
    return Macs(4 * width**2, 2 * width)


def mlp_macs(width: int, hidden: int) -> Macs:
    """Of two linear layers around a hidden width."""
    return Macs(2 * width * hidden)


def fixed_macs(config: Any) -> int:
    """MACs of one forward of a DiT's shape outside its branches, for one sample: embeddings, all adaLN terms, final layer."""
    c, D = config, config.hidden_size
    ends = c.num_tokens * D * c.patch_size**2 * (c.in_channels + c.out_channels)
    return ends + FREQUENCIES * D + D**2 * (1 + 6 * c.depth + 2)


def signature_of(
    network: Network,
    teacher: str,
    macs: tuple[Macs, ...],
    fixed: int,
    tokens: int | None = None,
    unlike: tuple[UnlikeBlocks, ...] = (),
    merge: int = 0,
) -> ModelSignature:
    """Signature of a network whose configuration has the fields of `tc_lightning.models.dit.DiTConfig`.

    Args:
        network: the network.
        teacher: sha256 of its weights.
        macs: costs of its branches, in order.
        fixed: MACs of a forward outside of them.
        tokens: tokens between `embed` and `readout`; None for the network's fixed ones and those of the image.
        unlike: blocks that are unlike the rest.
        merge: MACs of taking in a token by a long skip.
    """
    config = network.config
    return ModelSignature(
        family=network.family,
        depth=config.depth,
        tokens=tokens or network.fixed_tokens + config.num_tokens,
        width=config.hidden_size,
        heads=config.num_heads,
        mlp_width=config.mlp_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        input_size=config.input_size,
        conditions=network.conditions,
        macs=macs,
        fixed_macs=fixed,
        output=config.output,
        teacher=teacher,
        branches=network.branches.text,
        fixed_tokens=network.fixed_tokens,
        unlike=unlike,
        skips=LongSkips(network.skips, merge),
    )
