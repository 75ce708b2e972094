"""PixArt-alpha (Chen et al., arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692): a DiT that listens to a text.

Time acts through one vector for all blocks, to which each adds a table of its own (adaLN-single). Between attention and MLP every block
attends to the text, without a norm and without a gate. What it attends to depends on the text alone: keys and values of all blocks are
constants of a request. State-dict keys are those of the original release.

Shape suffixes: B batch (both halves of guidance counted), C channels, H W latent height and width, N tokens, n any subset of them,
D width, E tokens of the text, F features of one of them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import TeacherError
from tc_lightning.models.dit import NORM_EPS, Attention, FinalModulation, Mlp, modulate
from tc_lightning.models.embedders import FREQUENCIES, PatchEmbed, TimestepEmbedder, sincos_position_embedding, unpatched
from tc_lightning.models.lean import attend
from tc_lightning.models.network import Block, Constants, KeyValue, Network, See
from tc_lightning.models.signatures import attention_macs, mlp_macs, signature_of
from tc_lightning.plan.conditions import SAME, STORED, Condition
from tc_lightning.plan.signature import LATENTS, OUTPUTS, Macs, ModelSignature

HIDDEN = -10000.0  # what is added to the logits of a token of the text that is padding
ALPHA_TOKENS, SIGMA_TOKENS = 120, 300  # tokens of a text, as the two were trained


@dataclasses.dataclass(frozen=True)
class PixArtConfig:
    """Shape of a PixArt.

    Args:
        input_size: height and width of the latents.
        patch_size: side of a token in latent pixels; divides `input_size`.
        in_channels: latent channels C.
        out_channels: channels of the raw output, of which the first C are eps; 2 C with a learned variance.
        hidden_size: width D.
        depth: blocks.
        num_heads: attention heads; divides `hidden_size`.
        mlp_ratio: width of the MLP over D.
        text_tokens: tokens E of a text; shorter ones are padded, and masked.
        text_width: features F of one, as the text encoder gives them.
        project_text: whether they are mapped to D before the blocks see them.
        position_step: distance of neighbouring tokens in the table of positions.
        sized: whether resolution and aspect ratio are conditions.
        norm_eps: epsilon of the norms in the blocks.
        output: what the model makes: `latents` of a decoder, or `pixels`.

    Raises:
        TeacherError: if a size is not positive, or sizes do not divide.
    """

    input_size: int = 64
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    text_tokens: int = ALPHA_TOKENS
    text_width: int = 4096
    project_text: bool = True
    position_step: float = 1.0
    sized: bool = False
    norm_eps: float = NORM_EPS
    output: str = LATENTS

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise TeacherError(f"PixArt {field.name} is {value}; it must be at least 1.")
            if field.type == "float" and not 0.0 < value < math.inf:
                raise TeacherError(f"PixArt {field.name} is {value}; it must be positive and finite.")
        if self.output not in OUTPUTS:
            raise TeacherError(f"PixArt output is {self.output!r}; choose one of {', '.join(OUTPUTS)}.")
        if self.out_channels < self.in_channels:
            raise TeacherError(f"PixArt out_channels {self.out_channels} are fewer than in_channels {self.in_channels}.")
        if self.input_size % self.patch_size:
            raise TeacherError(f"PixArt input_size {self.input_size} is not a multiple of patch_size {self.patch_size}.")
        if self.hidden_size % self.num_heads or self.hidden_size % 4 or (self.sized and self.hidden_size % 3):
            thirds = ", of 3 (for resolution and aspect ratio)" if self.sized else ""
            raise TeacherError(
                f"PixArt hidden_size {self.hidden_size} must be a multiple of 4{thirds} and of num_heads {self.num_heads}."
            )

    @property
    def num_tokens(self) -> int:
        """N, tokens of one image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)


class Shared(NamedTuple):
    """What time tells all blocks, one tensor for all of them: shift, 1 + scale and gate of attention and of the MLP, [B, 6, D]."""

    six: Tensor


class Text(NamedTuple):
    """What a block attends to: keys and values of the text, [B, E, D] each, and what hides its padding, [B, 1, 1, E]."""

    text_k: Tensor
    text_v: Tensor
    text_bias: Tensor


class CrossAttention(nn.Module):
    """Weights of attention to the text (`PixArtBlock` does the arithmetic)."""

    def __init__(self, hidden_size: int, text_size: int) -> None:
        super().__init__()
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(text_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)


class PixArtBlock(Block):
    """One transformer block with adaLN-single conditioning; its terms are those of `Shared` and `Text`."""

    branches, attends = ("attn", "cross", "mlp"), ("attn",)

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=config.norm_eps)
        self.attn = Attention(D, config.num_heads)
        self.cross_attn = CrossAttention(D, D if config.project_text else config.text_width)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=config.norm_eps)
        self.mlp = Mlp(D, config.mlp_size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)

    def heard(self, text_BEF: Tensor, bias_B11E: Tensor) -> Text:
        """What this block attends to."""
        k, v = self.cross_attn.kv_linear(text_BEF).chunk(2, dim=-1)
        return Text(k, v, bias_B11E)

    def branch(self, name: str, z_BnD: Tensor, mod: Any, at: Tensor | None = None, see: See | None = None) -> tuple[Tensor, Any]:
        """See `Block`."""
        if name == "cross":
            q = self.cross_attn.q_linear(z_BnD)
            return self.cross_attn.proj(attend(q, mod.text_k, mod.text_v, self.attn.num_heads, mod.text_bias)), None
        shift_attn, scale_attn, _, shift_mlp, scale_mlp, _ = self._terms(mod)
        if name == "mlp":
            return self.mlp(modulate(self.norm2(z_BnD), shift_mlp, scale_mlp)), None
        q, k, v = self.attn.qkv(modulate(self.norm1(z_BnD), shift_attn, scale_attn)).chunk(3, dim=-1)
        kv = see(KeyValue(k, v)) if see else KeyValue(k, v)
        return self.attn.proj(attend(q, kv.k, kv.v, self.attn.num_heads)), kv

    def gated(self, name: str, update_BnD: Tensor, mod: Any, at: Tensor | None = None) -> Tensor:
        """See `Block`."""
        if name == "cross":
            return update_BnD
        _, _, gate_attn, _, _, gate_mlp = self._terms(mod)
        return (gate_attn if name == "attn" else gate_mlp) * update_BnD

    def _terms(self, mod: Any) -> tuple[Tensor, ...]:
        """adaLN terms of this block, [B, 1, D] each, in the order of `Shared`."""
        return (mod.six + self.scale_shift_table).chunk(6, dim=-2)


class TextEmbedder(nn.Module):
    """Two linear layers around a tanh-approximated GELU, from the width of the text encoder to the network's."""

    def __init__(self, text_width: int, hidden_size: int) -> None:
        super().__init__()
        self.y_proj = nn.ModuleDict({"fc1": nn.Linear(text_width, hidden_size), "fc2": nn.Linear(hidden_size, hidden_size)})

    def forward(self, text_BEF: Tensor) -> Tensor:
        """[B, E, F] -> [B, E, D]."""
        return self.y_proj["fc2"](F.gelu(self.y_proj["fc1"](text_BEF), approximate="tanh"))


class FinalLayer(nn.Module):
    """adaLN, by the time itself and a table, and the linear map from a token to its patch."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(D, config.patch_size**2 * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, D) / D**0.5)

    def modulation(self, c_BD: Tensor) -> FinalModulation:
        """adaLN terms from the conditioning vector."""
        shift, scale = (c_BD.unsqueeze(-2) + self.scale_shift_table).chunk(2, dim=-2)
        return FinalModulation(shift, 1 + scale)

    def forward(self, z_BND: Tensor, mod: FinalModulation) -> Tensor:
        """[B, N, D] -> [B, N, P P out_channels]."""
        return self.linear(modulate(self.norm_final(z_BND), mod.shift, mod.scale))


class PixArt(Network):
    """Diffusion transformer with cross-attention to a text, and, of the sizes that it was trained for, resolution and aspect ratio."""

    family: str = "pixart"
    schedule: Schedule = LinearBetas()

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config, D = config, config.hidden_size
        text = Condition("text", "fp32", (config.text_tokens, config.text_width), STORED)
        sizes = (Condition("resolution", "fp32", (2,), SAME), Condition("aspect_ratio", "fp32", (1,), SAME))
        self.conditions = (
            text,
            Condition("text_mask", "int64", (config.text_tokens,), STORED, mask=True),
            *(sizes if config.sized else ()),
        )
        self.x_embedder = PatchEmbed(config.in_channels, D, config.patch_size)
        self.t_embedder = TimestepEmbedder(D)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        if config.project_text:
            self.y_embedder = TextEmbedder(config.text_width, D)
        if config.sized:
            self.csize_embedder, self.ar_embedder = TimestepEmbedder(D // 3), TimestepEmbedder(D // 3)
        table = sincos_position_embedding(D, config.input_size // config.patch_size, step=config.position_step)
        self.pos_embed = nn.Parameter(torch.from_numpy(table)[None].float(), requires_grad=False)
        self.blocks = nn.ModuleList(PixArtBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialise()

    def signature(self, teacher: str) -> ModelSignature:
        """See `Network`."""
        c, D = self.config, self.config.hidden_size
        cross = Macs(2 * D**2 + 2 * D * c.text_tokens)  # keys and values are constants of a request
        ends = c.num_tokens * D * c.patch_size**2 * (c.in_channels + c.out_channels)
        sizes = 3 * (FREQUENCIES + D // 3) * D // 3 if c.sized else 0
        fixed = ends + FREQUENCIES * D + 7 * D**2 + sizes
        return signature_of(self, teacher, (attention_macs(D), cross, mlp_macs(D, c.mlp_size)), fixed)

    def embed(self, x_BCHW: Tensor, start: Any = ()) -> Tensor:
        """Latents -> tokens [B, N, D]."""
        return self.x_embedder(x_BCHW) + self.pos_embed

    def constants(self, text: Tensor, text_mask: Tensor, **sizes: Tensor) -> Constants:  # type: ignore[override]
        """Keys and values of the text in every block; of its mask, 1 is a token of the text and 0 padding."""
        bias_B11E = ((1.0 - text_mask.to(text.dtype)) * HIDDEN)[:, None, None]
        heard_BEF = self.y_embedder(text) if self.config.project_text else text
        return Constants((), [block.heard(heard_BEF, bias_B11E) for block in self.blocks])  # type: ignore[operator]

    def condition(self, t_B: Tensor, **given: Tensor) -> Tensor:
        """Conditioning vector c [B, D] of times (in the schedule's units) and, where they are conditions, sizes; no text acts on it."""
        c = self.t_embedder(t_B)
        if not self.config.sized:
            return c
        resolution, ratio = self.csize_embedder(given["resolution"]), self.ar_embedder(given["aspect_ratio"])
        return c + torch.cat([resolution.flatten(-2), ratio.flatten(-2)], dim=-1)

    def modulations(self, c_BD: Tensor) -> tuple[list[Shared], FinalModulation]:
        """The one vector of all blocks, and the terms of the final layer."""
        six = self.t_block(c_BD).unflatten(-1, (6, -1)).chunk(6, dim=-2)
        shared = Shared(torch.cat([term + 1 if place in (1, 4) else term for place, term in enumerate(six)], dim=-2))
        return [shared] * len(self.blocks), self.final_layer.modulation(c_BD)

    def readout(self, z_BND: Tensor, mod: FinalModulation) -> Tensor:
        """Tokens -> raw output [B, out_channels, H, W]."""
        c = self.config
        return unpatched(self.final_layer(z_BND, mod), c.input_size // c.patch_size, c.patch_size)

    def _initialise(self) -> None:
        """Initialisation of the original release: Xavier; zero for what attention to the text adds, and for the output.

        The text's projection too is Xavier's, which at the release's widths is its 0.02, and at small ones lets the text through.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        for embedder in (self.t_embedder, *((self.csize_embedder, self.ar_embedder) if self.config.sized else ())):
            for index in (0, 2):
                nn.init.normal_(embedder.mlp[index].weight, std=0.02)
        nn.init.normal_(self.t_block[1].weight, std=0.02)  # type: ignore[arg-type]
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.proj.weight)  # type: ignore[arg-type, union-attr]
        nn.init.zeros_(self.final_layer.linear.weight)
