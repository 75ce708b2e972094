"""A family of networks that the package has never heard of: branches and conditions with names of their own, tokens of two kinds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.models.dit import DiTConfig
from tc_lightning.models.embedders import LabelEmbedder, TimestepEmbedder
from tc_lightning.models.lean import attend, patch_tokens, take
from tc_lightning.models.network import Block, Constants, KeyValue, Network, See
from tc_lightning.models.signatures import mlp_macs, signature_of
from tc_lightning.plan.conditions import Condition
from tc_lightning.plan.signature import Macs, ModelSignature

REGISTERS = 3  # tokens beside those of the image, which come first


class Terms(NamedTuple):
    widen: Tensor  # gates of the two branches that have one, each [B, 1, D]
    shade: Tensor


class Opening(NamedTuple):
    registers: Tensor  # what is added to the registers, [B, 1, D]


class Told(NamedTuple):
    k: Tensor  # of the mood, which every block listens to, [B, 2, D]
    v: Tensor
    bias: Tensor  # [B, 1, 1, 2], the same in every block


class Readout(NamedTuple):
    lift: Tensor  # what is added before the output, [B, 1, D]


class ToyBlock(Block):
    """`look` attends, without a gate; `widen` is an MLP; `shade` depends on where a token is, and those of the image hear the mood."""

    branches, attends = ("look", "widen", "shade"), ("look",)

    def __init__(self, D: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.heads, self.q, self.kv = heads, nn.Linear(D, D), nn.Linear(D, 2 * D, bias=False)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.Tanh(), nn.Linear(2 * D, D))
        self.scale, self.place = nn.Parameter(torch.ones(D)), nn.Parameter(torch.randn(1, tokens, D))
        self.gates, self.told = nn.Linear(D, 2 * D), nn.Linear(3, 2 * D)

    def branch(self, name: str, z: Tensor, mod: Any, at: Tensor | None = None, see: See | None = None) -> tuple[Tensor, Any]:
        h = nn.functional.rms_norm(z, z.shape[-1:], self.scale, 1e-5)
        if name == "look":
            own = KeyValue(*self.kv(h).chunk(2, dim=-1))
            kv = see(own) if see else own
            return attend(self.q(h), kv.k, kv.v, self.heads), kv
        if name == "widen":
            return self.mlp(h), None
        placed, heard = h * (self.place if at is None else take(self.place, at)), h[:, REGISTERS:]
        heard = attend(heard, mod.k, mod.v, self.heads, bias=mod.bias)
        return torch.cat([placed[:, :REGISTERS], placed[:, REGISTERS:] + heard], 1), None

    def gated(self, name: str, update: Tensor, mod: Any, at: Tensor | None = None) -> Tensor:
        return update if name == "look" else getattr(mod, name) * update


class Toy(Network):
    """A network of such blocks; a class and a mood act with the time through two gates a block and a shift at the end."""

    family, schedule, fixed_tokens = "toy", LinearBetas(), REGISTERS

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, D, tokens = config, config.hidden_size, REGISTERS + config.num_tokens
        self.conditions = Condition("kind", "int64", (), 4, 4), Condition("mood", "fp32", (2, 3), -0.5)
        self.patches = nn.Conv2d(config.in_channels, D, config.patch_size, config.patch_size, bias=False)
        self.registers, self.time = nn.Parameter(torch.randn(1, REGISTERS, D)), TimestepEmbedder(D)
        self.label, self.mood, self.opening = LabelEmbedder(4, D), nn.Linear(6, D), nn.Linear(6, D)
        self.blocks = nn.ModuleList(ToyBlock(D, config.num_heads, tokens) for _ in range(config.depth))
        self.out = nn.Linear(D, config.patch_size**2 * config.out_channels)

    def signature(self, teacher: str) -> ModelSignature:
        D = self.config.hidden_size
        return signature_of(self, teacher, (Macs(3 * D**2, 2 * D), mlp_macs(D, 2 * D), Macs(5 * D)), 1000)

    def embed(self, x: Tensor, start: Any = ()) -> Tensor:
        return torch.cat([self.registers + start.registers, patch_tokens(x, self.patches.weight, None)], 1)

    def constants(self, kind: Tensor, mood: Tensor) -> Constants:  # type: ignore[override]
        bias = 2 * mood[:, None, None, :, 0]
        told = [Told(*block.told(mood).chunk(2, dim=-1), bias) for block in self.blocks]
        return Constants(Opening(self.opening(mood.flatten(-2))[:, None]), told)

    def condition(self, t: Tensor, kind: Tensor, mood: Tensor) -> Tensor:  # type: ignore[override]
        return torch.tanh(self.time(t)) * (self.label(kind) + self.mood(mood.flatten(-2)))

    def modulations(self, c: Tensor) -> tuple[list[Terms], Readout]:
        blocks = [Terms(*block.gates(c).unsqueeze(-2).chunk(2, dim=-1)) for block in self.blocks]
        return [Terms(terms.widen, terms.shade * 2) for terms in blocks], Readout(c.unsqueeze(-2))

    def readout(self, z: Tensor, mod: Readout) -> Tensor:
        P, side, z = self.config.patch_size, self.config.input_size, z[:, REGISTERS:]
        patches = self.out(nn.functional.layer_norm(z, z.shape[-1:]) + mod.lift).unflatten(1, (side // P, -1)).unflatten(3, (P, P, -1))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def make_toy(seed: int = 0) -> Toy:
    """A frozen one whose branches matter."""
    torch.manual_seed(seed)
    toy = Toy(DiTConfig(8, 2, 3, hidden_size=16, depth=3, num_heads=2, learn_sigma=False, output="pixels")).eval().requires_grad_(False)
    for parameter in toy.parameters():
        parameter.normal_(0.0, 0.3)
    return toy
