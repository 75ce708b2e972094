"""The multimodal diffusion transformer of Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206).

Tokens of a text, which stand first, and those of the image are one sequence; `tc_lightning.models.joint_block` says what is done to it.
Text enters twice: token by token there, and pooled in the conditioning vector.

Shape suffixes: B batch (both halves of guidance counted), C channels, H W latent height and width, N tokens (the text's S first), n any
subset of them, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tc_lightning.diffusion.flow import Flow
from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import TeacherError
from tc_lightning.models.dit import modulate
from tc_lightning.models.embedders import FREQUENCIES, PatchEmbed, TimestepEmbedder, sincos_position_embedding, unpatched
from tc_lightning.models.joint_block import NORM_EPS, DualBlock, FinalTerms, JointBlock, JointShape, StreamModulation
from tc_lightning.models.network import Constants, Network
from tc_lightning.models.signatures import attention_macs, mlp_macs, signature_of
from tc_lightning.plan.block_costs import BranchMacs, Macs, UnlikeBlocks
from tc_lightning.plan.conditions import STORED, Condition
from tc_lightning.plan.signature import LATENTS, OUTPUTS, ModelSignature

MLP_RATIO = 4
TRAINING_STEPS = 1000.0


@dataclasses.dataclass(frozen=True)
class SD3Config:
    """Shape of an SD3, that of Stable Diffusion 3 Medium unless told otherwise.

    Args:
        input_size: height and width of the latents.
        patch_size: side of a token in latent pixels; divides `input_size`.
        in_channels: latent channels.
        hidden_size: width D of both streams.
        depth: blocks L.
        num_heads: attention heads; divides `hidden_size`.
        text_width: width of the text's embeddings.
        text_tokens: how many of them there are, S: 77 of CLIP and 256 of T5 as a rule.
        pooled_width: width of the pooled text.
        position_grid: side of the table of positions, in tokens, from whose middle those of an image are taken.
        position_base: side of the grid of tokens that the table was spread for.
        dual_blocks: numbers of the blocks that hold a second attention, ascending, a space between them.
        qk_norm: queries and keys are normalised in each head.
        output: what the model makes: `latents` of a decoder, or `pixels`.

    Raises:
        TeacherError: if a size is not positive, sizes do not divide, or there is no such block.
    """

    input_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    hidden_size: int = 1536
    depth: int = 24
    num_heads: int = 24
    text_width: int = 4096
    text_tokens: int = 333
    pooled_width: int = 2048
    position_grid: int = 192
    position_base: int = 64
    dual_blocks: str = ""
    qk_norm: bool = False
    output: str = LATENTS

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int" and getattr(self, field.name) < 1:
                raise TeacherError(f"SD3 {field.name} is {getattr(self, field.name)}; it must be at least 1.")
        if self.output not in OUTPUTS:
            raise TeacherError(f"SD3 output is {self.output!r}; choose one of {', '.join(OUTPUTS)}.")
        if self.input_size % self.patch_size:
            raise TeacherError(f"SD3 input_size {self.input_size} is not a multiple of patch_size {self.patch_size}.")
        if self.grid > self.position_grid:
            raise TeacherError(
                f"SD3 input_size {self.input_size} makes {self.grid} tokens a side, and the table of positions has only "
                f"{self.position_grid}."
            )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise TeacherError(f"SD3 hidden_size {self.hidden_size} must be a multiple of 4 and of num_heads {self.num_heads}.")
        words = self.dual_blocks.split()
        known = [str(b) for b in range(self.depth)]
        if words != sorted({*words} & {*known}, key=int) or self.dual_blocks != " ".join(words):
            raise TeacherError(
                f"SD3 dual_blocks is {self.dual_blocks!r}; numbers of blocks from 0 to {self.depth - 1} were expected, ascending, "
                "a space between them."
            )

    @property
    def grid(self) -> int:
        """Tokens of the image a side."""
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return self.grid**2

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLPs."""
        return MLP_RATIO * self.hidden_size

    @property
    def out_channels(self) -> int:
        """Channels of the raw output."""
        return self.in_channels

    @property
    def joint(self) -> JointShape:
        """Shape of a block."""
        return JointShape(self.hidden_size, self.num_heads, self.mlp_size, self.text_tokens, self.qk_norm)

    @property
    def duals(self) -> frozenset[int]:
        """The blocks that hold a second attention."""
        return frozenset(map(int, self.dual_blocks.split()))


class Start(NamedTuple):
    """What `embed` takes beside latents."""

    text: Tensor  # the text's tokens [B, S, D]


class SD3(Network):
    """Stable Diffusion 3's transformer. Its flow counts from noise at 1,000 to data at 0, and the network gives eps - x_0."""

    family: str = "sd3"
    schedule: Schedule = Flow(noise_at=TRAINING_STEPS, data_at=0.0)

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.config, self.fixed_tokens, D = config, config.text_tokens, config.hidden_size
        self.conditions = (
            Condition("text", "fp32", (config.text_tokens, config.text_width), STORED),
            Condition("pooled", "fp32", (config.pooled_width,), STORED),
        )
        self.x_embedder = PatchEmbed(config.in_channels, D, config.patch_size)
        self.pos_embed = nn.Parameter(_middle_of_table(config), requires_grad=False)
        self.text_embedder = nn.Linear(config.text_width, D)
        self.t_embedder = TimestepEmbedder(D)
        self.pooled_embedder = nn.Sequential(nn.Linear(config.pooled_width, D), nn.SiLU(), nn.Linear(D, D))
        kinds = (DualBlock if b in config.duals else JointBlock for b in range(config.depth))
        self.blocks = nn.ModuleList(kind(config.joint, last=b == config.depth - 1) for b, kind in enumerate(kinds))
        self.norm_out = nn.LayerNorm(D, elementwise_affine=False, eps=NORM_EPS)
        self.final_adaLN, self.proj_out = StreamModulation(D, FinalTerms), nn.Linear(D, config.patch_size**2 * config.out_channels)

    def signature(self, teacher: str) -> ModelSignature:
        """See `Network`."""
        c = self.config
        macs = attention_macs(c.hidden_size), mlp_macs(c.hidden_size, c.mlp_size)
        unlike = tuple(
            UnlikeBlocks(blocks, _unlike_macs(c, dual, last), 1 + dual)
            for dual, last in ((True, False), (False, True), (True, True))
            if (blocks := tuple(b for b in range(c.depth) if (b in c.duals, b == c.depth - 1) == (dual, last)))
        )
        return signature_of(self, teacher, macs, _fixed_macs(c), unlike=unlike)

    def constants(self, text: Tensor, **_: Tensor) -> Constants:  # type: ignore[override]  # of the names that its conditions have
        """The text's tokens as they enter the first block."""
        return Constants(Start(self.text_embedder(text)), [()] * len(self.blocks))

    def embed(self, x_BCHW: Tensor, start: Start) -> Tensor:  # type: ignore[override]  # of what its constants have
        """Latents and text -> tokens [B, N, D]."""
        return torch.cat([start.text, self.x_embedder(x_BCHW) + self.pos_embed], 1)

    def condition(self, t_B: Tensor, pooled: Tensor, **_: Tensor) -> Tensor:  # type: ignore[override]  # of the names that its conditions have
        """Conditioning vector c [B, D] of times (in the schedule's units) and pooled texts."""
        return self.t_embedder(t_B) + self.pooled_embedder(pooled)

    def modulations(self, c_BD: Tensor) -> tuple[list[Any], FinalTerms]:
        """adaLN terms of all blocks and of the readout."""
        return [block.modulation(c_BD) for block in self.blocks], self.final_adaLN(c_BD)  # type: ignore[operator]

    def readout(self, z_BND: Tensor, mod: FinalTerms) -> Tensor:
        """Tokens -> velocity [B, C, H, W]."""
        h_BnD = modulate(self.norm_out(z_BND[:, self.fixed_tokens :]), mod.shift, mod.scale)
        return unpatched(self.proj_out(h_BnD), self.config.grid, self.config.patch_size)


def _middle_of_table(config: SD3Config) -> Tensor:
    """Positions of an image's tokens [1, N - S, D]: the middle of a table of `position_grid` a side, as it is before training."""
    step = config.position_base / config.position_grid
    first = (config.position_grid - config.grid) // 2 * step
    return torch.from_numpy(sincos_position_embedding(config.hidden_size, config.grid, first, step))[None].float()


def _fixed_macs(config: SD3Config) -> int:
    """MACs of one forward outside its branches, for one sample: embeddings, all adaLN terms, the readout.

    Not those of the text's embedder, which runs once a request.
    """
    c, D = config, config.hidden_size
    terms = 12 * c.depth + 3 * len(c.duals) - 4 + 2
    ends = c.num_tokens * D * c.patch_size**2 * (c.in_channels + c.out_channels)
    return ends + (FREQUENCIES + c.pooled_width) * D + D**2 * (2 + terms)


def _unlike_macs(config: SD3Config, dual: bool, last: bool) -> BranchMacs:
    """Costs of a block with a second attention among the image's tokens, or without queries and updates of the text, or both."""
    (token, pair, _), mlp = attention_macs(config.hidden_size), mlp_macs(config.hidden_size, config.mlp_size)
    S, N = config.text_tokens, config.num_tokens
    second = dual * (token + N * pair)  # of a token of the image
    queries = last * (token // 2 + (S + N) * pair)  # of the text's, and what is made of what they find
    return Macs(token + second, pair, S * (second + queries)), mlp._replace(spared=last * mlp.of(S, S + N))
