"""The soft forms of caching that training runs: a superposition of computing and reusing.

They equal the hard forms (`tc_lightning.cache.semantics`) wherever their weights are 0 or 1: `mixed_block` a partial step,
`mixed_branches` a reuse.

Shape suffixes: B batch (both halves of guidance), N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tc_lightning.models.network import Block, KeyValue, compose


class BlockCache(NamedTuple):
    """What the soft form takes from the neighbouring step: residual update, and keys and values if any, each [B, N, D]."""

    residual: Tensor
    kv: KeyValue | None = None


BranchCache = dict[str, Tensor]  # what the soft form of reuse takes from the step before: each branch before its gate, [B, N, D]


def full_block(block: Block, z_BND: Tensor, mod: Any, skip_BND: Tensor | None = None) -> tuple[Tensor, BlockCache, BranchCache]:
    """Compute a block and return its tokens, and what `mixed_block` and `mixed_branches` need of it."""
    branches: BranchCache = {}
    attended: list[KeyValue] = []

    def take_branch(name: str, z_BND: Tensor) -> Tensor:
        branches[name], kv = block.branch(name, z_BND, mod)
        attended.extend([kv] if kv else [])
        return branches[name]

    out_BND = compose(block, z_BND, mod, take_branch, skip_BnD=skip_BND)
    return out_BND, BlockCache(out_BND - z_BND, *attended), branches


def mixed_block(block: Block, z_BND: Tensor, mod: Any, w_BN: Tensor, cached: BlockCache, skip_BND: Tensor | None = None) -> Tensor:
    """Superposition of computing and reusing, token by token (TokenCache v1): z + w f(z) + (1 - w) cached.

    Keys and values are mixed with the same weights, so that with w in {0, 1} this is exactly the partial step of a one-block
    segment: kept tokens attend to all tokens, those of weight 0 through their cached keys and values.
    """
    w_BN1 = w_BN[:, :, None]

    def mixed(own: KeyValue) -> KeyValue:
        assert cached.kv is not None, "what attends has left keys and values"
        return KeyValue(*(new * w_BN1 + old * (1 - w_BN1) for new, old in zip(own, cached.kv, strict=True)))

    own_BND = compose(block, z_BND, mod, lambda name, z: block.branch(name, z, mod, see=mixed)[0], skip_BnD=skip_BND)
    f_BND = own_BND - z_BND
    return z_BND + w_BN1 * f_BND + (1 - w_BN1) * cached.residual


def mixed_branches(
    block: Block,
    z_BND: Tensor,
    mod: Any,
    weights: Mapping[str, Tensor],
    cached: BranchCache,
    skip_BND: Tensor | None = None,
) -> tuple[Tensor, BranchCache]:
    """Superposition of computing and reusing, branch by branch (routers: Learning-to-Cache, arXiv 2406.01733; HarmoniCa, 2410.01723).

    A branch is w b(z) + (1 - w) cached, before the current gate. What it leaves for the next step is that mixture, so that with w in
    {0, 1} this is, bit for bit, compute or a reuse segment of order 0: an entry keeps the value that was last computed.

    Args:
        block: the block.
        z_BND: its tokens.
        mod: its terms of the conditioning.
        weights: weight of computing each branch, of any shape that broadcasts to [B, N, D]: [B, 1, 1] for each image, [B, N, 1] for
            each token.
        cached: branches of the step before.
        skip_BND: the tokens that the block takes in by a long skip, if it has one.

    Returns:
        Tokens [B, N, D], and the mixtures.
    """
    mixtures: BranchCache = {}

    def take_branch(name: str, z_BND: Tensor) -> Tensor:
        w = weights[name]
        mixtures[name] = w * block.branch(name, z_BND, mod)[0] + (1 - w) * cached[name]
        return mixtures[name]

    return compose(block, z_BND, mod, take_branch, skip_BnD=skip_BND), mixtures
