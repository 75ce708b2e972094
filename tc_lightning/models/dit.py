"""The diffusion transformer (Peebles and Xie, arXiv 2212.09748), written so that a cache can be put around its blocks.

State-dict keys are those of the original release. What a network and its blocks owe the rest of the package is said in
`tc_lightning.models.network`.

Shape suffixes: B batch (both halves of guidance counted), C channels, H W latent height and width, N tokens, n any subset of
them, D width, M heads, E head dimension (D = M E), L blocks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import TeacherError
from tc_lightning.models.embedders import (
    FREQUENCIES,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_embedding,
    unpatched,
)
from tc_lightning.models.lean import attend
from tc_lightning.models.network import Block, KeyValue, Network, See
from tc_lightning.models.signatures import attention_macs, fixed_macs, mlp_macs, signature_of
from tc_lightning.plan.conditions import Condition
from tc_lightning.plan.signature import LATENTS, OUTPUTS, ModelSignature

AnyNetwork = TypeVar("AnyNetwork", bound=Network)
NORM_EPS = 1e-6
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # width, depth, heads


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape of a DiT.

    Args:
        input_size: height and width of the (latent) image.
        patch_size: side of a token in latent pixels; divides `input_size`.
        in_channels: latent channels.
        hidden_size: width D.
        depth: blocks L.
        num_heads: attention heads; divides `hidden_size`.
        mlp_ratio: width of the MLP over D.
        num_classes: classes; label `num_classes` is the null label of classifier-free guidance, if there is one.
        learn_sigma: the output carries 2C channels, of which the first C are eps.
        freq_shift: the timestep frequencies are spaced by 1 / (128 - freq_shift); 0 in the release, 1 in diffusers.
        mlp_norm_eps: epsilon of the norm before each MLP; 1e-6 in the release, 1e-5 by default in diffusers.
        null_label: the label table has a row for the null label; without one (label dropout 0) guidance must be 1.
        output: what the model makes: `latents` of a decoder, or `pixels`.

    Raises:
        TeacherError: if a size is not positive, or sizes do not divide.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    freq_shift: float = 0.0
    mlp_norm_eps: float = NORM_EPS
    null_label: bool = True
    output: str = LATENTS

    def __post_init__(self) -> None:
        of = type(self).__name__.removesuffix("Config")
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise TeacherError(f"{of} {name} is {getattr(self, name)}; it must be at least 1.")
        if self.output not in OUTPUTS:
            raise TeacherError(f"{of} output is {self.output!r}; choose one of {', '.join(OUTPUTS)}.")
        for name in ("mlp_ratio", "mlp_norm_eps"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise TeacherError(f"{of} {name} is {getattr(self, name)}; it must be positive and finite.")
        if not math.isfinite(self.freq_shift) or self.freq_shift == FREQUENCIES // 2:
            raise TeacherError(f"{of} freq_shift is {self.freq_shift}; it is 0 or 1 as a rule, and cannot be {FREQUENCIES // 2}.")
        if self.input_size % self.patch_size:
            raise TeacherError(f"{of} input_size {self.input_size} is not a multiple of patch_size {self.patch_size}.")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise TeacherError(f"{of} hidden_size {self.hidden_size} must be a multiple of 4 and of num_heads {self.num_heads}.")

    @property
    def num_tokens(self) -> int:
        """N, tokens of one image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        """Channels of the raw output: C, or 2C with a learned variance."""
        return self.in_channels * (2 if self.learn_sigma else 1)


def preset(name: str, **overrides: int | float | bool) -> DiTConfig:
    """Return the configuration of `DiT-{S,B,L,XL}/{2,4,8}`, with any field overridden.

    Raises:
        TeacherError: if the name is not a preset.
    """
    size, _, patch = name.removeprefix("DiT-").partition("/")
    if not name.startswith("DiT-") or size not in _SIZES or patch not in {"2", "4", "8"}:
        raise TeacherError(f"unknown preset {name!r}: choose DiT-{{S,B,L,XL}}/{{2,4,8}}, for example DiT-XL/2.")
    width, depth, heads = _SIZES[size]
    base = DiTConfig(hidden_size=width, depth=depth, num_heads=heads, patch_size=int(patch))
    return dataclasses.replace(base, **overrides)  # type: ignore[arg-type]


class Modulation(NamedTuple):
    """adaLN terms of one block, each [B, 1, D]; `scale_*` already holds 1 + scale (it can be computed ahead of time)."""

    shift_attn: Tensor
    scale_attn: Tensor
    gate_attn: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class FinalModulation(NamedTuple):
    """adaLN terms of the final layer, each [B, 1, D]; `scale` holds 1 + scale."""

    shift: Tensor
    scale: Tensor


class Attention(nn.Module):
    """Weights of multi-head self-attention (`DiTBlock` does the arithmetic)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)


class Mlp(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        """[B, n, D] -> [B, n, D]."""
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


def modulate(x_BnD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """Apply adaLN; `scale` holds 1 + scale."""
    return x_BnD * scale_B1D + shift_B1D


class DiTBlock(Block):
    """One transformer block with adaLN-Zero conditioning."""

    branches, attends = ("attn", "mlp"), ("attn",)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=NORM_EPS)
        self.attn = Attention(D, config.num_heads)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=config.mlp_norm_eps)
        self.mlp = Mlp(D, config.mlp_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def modulation(self, c_BD: Tensor) -> Modulation:
        """adaLN terms from the conditioning vector."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c_BD).unsqueeze(-2).chunk(6, dim=-1)
        return Modulation(shift_a, 1 + scale_a, gate_a, shift_m, 1 + scale_m, gate_m)

    def qkv(self, z_BnD: Tensor, mod: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the given tokens, each [B, n, D]."""
        q, k, v = self.attn.qkv(modulate(self.norm1(z_BnD), mod.shift_attn, mod.scale_attn)).chunk(3, dim=-1)
        return q, k, v

    def attention(self, q_BnD: Tensor, k_BND: Tensor, v_BND: Tensor) -> Tensor:
        """Attend from the tokens of q to those of k and v; [B, n, D] before the gate."""
        return self.attn.proj(attend(q_BnD, k_BND, v_BND, self.attn.num_heads))

    def attn_branch(self, z_BnD: Tensor, mod: Modulation, see: See | None = None) -> tuple[Tensor, KeyValue]:
        """Self-attention of the given tokens, before the gate, and the keys and values that they attended to."""
        q, k, v = self.qkv(z_BnD, mod)
        kv = see(KeyValue(k, v)) if see else KeyValue(k, v)
        return self.attention(q, kv.k, kv.v), kv

    def mlp_branch(self, z_BnD: Tensor, mod: Modulation) -> Tensor:
        """MLP of the given tokens, before the gate."""
        return self.mlp(modulate(self.norm2(z_BnD), mod.shift_mlp, mod.scale_mlp))

    def branch(
        self, name: str, z_BnD: Tensor, mod: Modulation, at: Tensor | None = None, see: See | None = None
    ) -> tuple[Tensor, KeyValue | None]:
        """See `Block`."""
        return self.attn_branch(z_BnD, mod, see) if name == "attn" else (self.mlp_branch(z_BnD, mod), None)

    def gated(self, name: str, update_BnD: Tensor, mod: Modulation, at: Tensor | None = None) -> Tensor:
        """See `Block`."""
        return (mod.gate_attn if name == "attn" else mod.gate_mlp) * update_BnD


class FinalLayer(nn.Module):
    """adaLN and the linear map from a token to its patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(D, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def modulation(self, c_BD: Tensor) -> FinalModulation:
        """adaLN terms from the conditioning vector."""
        shift, scale = self.adaLN_modulation(c_BD).unsqueeze(-2).chunk(2, dim=-1)
        return FinalModulation(shift, 1 + scale)

    def forward(self, z_BND: Tensor, mod: FinalModulation) -> Tensor:
        """[B, N, D] -> [B, N, P P out_channels]."""
        return self.linear(modulate(self.norm_final(z_BND), mod.shift, mod.scale))


class DiT(Network):
    """Diffusion transformer with class conditioning."""

    family: str = "dit"
    schedule: Schedule = LinearBetas()

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, classes = config, config.num_classes
        self.conditions = (Condition("label", "int64", null=classes if config.null_label else None, classes=classes),)
        self.x_embedder = PatchEmbed(config.in_channels, config.hidden_size, config.patch_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size, config.freq_shift)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size, config.null_label)
        grid = config.input_size // config.patch_size
        table = torch.from_numpy(sincos_position_embedding(config.hidden_size, grid))
        self.pos_embed = nn.Parameter(table[None].float(), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialise()

    def signature(self, teacher: str) -> ModelSignature:
        """See `Network`."""
        c = self.config
        macs = attention_macs(c.hidden_size), mlp_macs(c.hidden_size, c.mlp_size)
        return signature_of(self, teacher, macs, fixed_macs(c))

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
        P = self.config.patch_size
        return unpatched(self.final_layer(z_BND, mod), self.config.input_size // P, P)

    def _initialise(self) -> None:
        """Initialisation of the original release: Xavier, and zero for gates and the output (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for index in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[index].weight, std=0.02)  # type: ignore[arg-type]
        for layer in [*self.blocks, self.final_layer]:
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)


def randomise_(model: AnyNetwork, seed: int, std: float = 0.05) -> AnyNetwork:
    """Fill every trainable weight with noise in place, so that gates are open and no branch is silent (tests, benchmarks)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.normal_(0.0, std, generator=generator)
    return model
