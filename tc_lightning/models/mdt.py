"""MDTv2 (Gao et al., arXiv 2303.14389): DiT's blocks with a relative position bias in attention, and long skips between them.

A masked diffusion transformer learns by filling in tokens that are hidden from its encoder. When it samples, nothing is hidden: its
side interpolater and mask token are no part of the network then, and are not here. What is left:

    encoder     blocks 0 to h - 1; the last token streams of these are taken in, in turn, by
                blocks h to 2 h - 1: block h + j takes in what block h - 1 - j gave
    decoder     the last `decode_layers` blocks; positions are added before the first of them, and each takes in what `embed` gave

To take in a stream is a linear map of both, side by side, before the block. Formulas and initial positions are those of the release
(github.com/sail-sg/MDT, masked_diffusion/models.py), whose sampler also scales guidance along time; that is a sampler's business, and
guidance is constant here.

Shape suffixes: B batch (both halves of guidance counted), C channels, H W latent height and width, N tokens, n any subset of them,
D width, M heads, R relative positions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.errors import TeacherError
from tc_lightning.models.dit import DiTBlock, DiTConfig, FinalLayer, FinalModulation, Modulation
from tc_lightning.models.embedders import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_position_embedding, unpatched
from tc_lightning.models.lean import attend, beside
from tc_lightning.models.network import KeyValue, Network, See
from tc_lightning.models.signatures import attention_macs, fixed_macs, mlp_macs, signature_of
from tc_lightning.plan.conditions import Condition
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.plan.skips import EMBEDDING

CLASS_ROWS = 3  # rows at the end of the table of relative positions that no pair of tokens has: the release keeps them


@dataclasses.dataclass(frozen=True)
class MDTConfig(DiTConfig):
    """Shape of an MDTv2: that of a DiT, and how many of its blocks decode.

    Args:
        decode_layers: blocks of the decoder; those before it are as many in the first half of the encoder as in the second.

    Raises:
        TeacherError: if a size is not positive, or sizes do not divide.
    """

    decode_layers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.decode_layers < self.depth or (self.depth - self.decode_layers) % 2:
            raise TeacherError(
                f"MDT decode_layers is {self.decode_layers} of {self.depth} blocks; there must be at least 1, and before it an even "
                "number of blocks, at least 2."
            )

    @property
    def half_depth(self) -> int:
        """h, blocks of the first half of the encoder: as many as take in their tokens."""
        return (self.depth - self.decode_layers) // 2

    @property
    def grid(self) -> int:
        """Tokens along a side of the image."""
        return self.input_size // self.patch_size

    def source(self, block: int) -> int | None:
        """The block whose tokens a block takes in by a long skip; None where it has none."""
        if block < self.half_depth:
            return None
        return 2 * self.half_depth - 1 - block if block < 2 * self.half_depth else EMBEDDING


def relative_positions(grid: int) -> Tensor:
    """Row of the table for each pair of tokens of a grid of side G, [N, N].

    Of a query at (y, x) and a key at (v, u) it is (y - v + G - 1) (2 G - 1) + x - u + G - 1.
    """
    y, x = np.divmod(np.arange(grid**2), grid)
    down, right = (p[:, None] - p[None, :] + grid - 1 for p in (y, x))
    return torch.from_numpy(down * (2 * grid - 1) + right)


class MDTBlock(DiTBlock):
    """A DiT's block with a relative position bias, behind a long skip and new positions where it has them."""

    def __init__(self, config: MDTConfig, source: int | None = None, placed: bool = False) -> None:
        super().__init__(config)
        D, rows = config.hidden_size, (2 * config.grid - 1) ** 2 + CLASS_ROWS
        self.source = source
        self.skip_linear = None if source is None else nn.Linear(2 * D, D)
        self.pos_embed = nn.Parameter(_positions(config)) if placed else None
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, config.num_heads))
        self._index_NN = relative_positions(config.grid)  # no weight: it follows the tokens to their device

    def merge(self, z_BnD: Tensor, skip_BnD: Tensor, at: Tensor | None = None) -> Tensor:
        """See `Block`."""
        assert self.skip_linear is not None, "a block without a source has nothing to merge"
        if self.pos_embed is not None:
            z_BnD = z_BnD + (self.pos_embed if at is None else F.embedding(at, self.pos_embed))
        return self.skip_linear(torch.cat([z_BnD, skip_BnD], dim=-1))

    def position_bias(self, z_BnD: Tensor, at: Tensor | None = None) -> Tensor:
        """What is added to the attention logits of the tokens `at`, [1 or B, M, n, N]."""
        self._index_NN = self._index_NN.to(z_BnD.device)
        index_NN = beside(z_BnD, self._index_NN)
        bias_nNM = F.embedding(index_NN if at is None else F.embedding(at, index_NN), self.relative_position_bias_table)
        return bias_nNM.permute(2, 0, 1)[None] if bias_nNM.ndim == 3 else bias_nNM.permute(0, 3, 1, 2)

    def branch(
        self, name: str, z_BnD: Tensor, mod: Modulation, at: Tensor | None = None, see: See | None = None
    ) -> tuple[Tensor, KeyValue | None]:
        """See `Block`."""
        if name == "mlp":
            return self.mlp_branch(z_BnD, mod), None
        q, k, v = self.qkv(z_BnD, mod)
        kv = see(KeyValue(k, v)) if see else KeyValue(k, v)
        return self.attn.proj(attend(q, kv.k, kv.v, self.attn.num_heads, self.position_bias(z_BnD, at))), kv


class MDT(Network):
    """Masked diffusion transformer, second version, with class conditioning, as it samples."""

    family = "mdt"
    schedule = LinearBetas()

    def __init__(self, config: MDTConfig) -> None:
        super().__init__()
        self.config, classes = config, config.num_classes
        self.conditions = (Condition("label", "int64", null=classes if config.null_label else None, classes=classes),)
        self.x_embedder = PatchEmbed(config.in_channels, config.hidden_size, config.patch_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size, config.freq_shift)
        self.y_embedder = LabelEmbedder(classes, config.hidden_size, config.null_label)
        self.pos_embed = nn.Parameter(_positions(config)[None])
        decoder = 2 * config.half_depth
        self.blocks = nn.ModuleList(MDTBlock(config, config.source(b), placed=b == decoder) for b in range(config.depth))
        self.final_layer = FinalLayer(config)

    def signature(self, teacher: str) -> ModelSignature:
        """See `Network`."""
        c, D = self.config, self.config.hidden_size
        macs = attention_macs(D), mlp_macs(D, c.mlp_size)
        return signature_of(self, teacher, macs, fixed_macs(c), merge=2 * D**2)

    def embed(self, x_BCHW: Tensor, start: Any = ()) -> Tensor:
        """Latents -> tokens [B, N, D]."""
        return self.x_embedder(x_BCHW) + self.pos_embed

    def condition(self, t_B: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]  # of the names that its conditions have
        """Conditioning vector c [B, D] of times (in the schedule's units) and labels."""
        return self.t_embedder(t_B) + self.y_embedder(label)

    def modulations(self, c_BD: Tensor) -> tuple[list[Modulation], FinalModulation]:
        """adaLN terms of all blocks and of the final layer."""
        return [block.modulation(c_BD) for block in self.blocks], self.final_layer.modulation(c_BD)  # type: ignore[operator]

    def readout(self, z_BND: Tensor, mod: FinalModulation) -> Tensor:
        """Tokens -> raw output [B, out_channels, H, W]."""
        return unpatched(self.final_layer(z_BND, mod), self.config.grid, self.config.patch_size)


def _positions(config: MDTConfig) -> Tensor:
    """What learnt positions start as, [N, D]."""
    return torch.from_numpy(sincos_position_embedding(config.hidden_size, config.grid)).float()
