"""A family of networks that the package has never heard of: three branches with names of their own, one of them ungated."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tc_lightning.models.dit import DiTConfig, signature_of
from tc_lightning.models.embedders import LabelEmbedder, TimestepEmbedder
from tc_lightning.models.lean import attend, patch_tokens, take
from tc_lightning.models.network import Block, KeyValue, Network, See
from tc_lightning.plan.signature import ModelSignature


class Terms(NamedTuple):
    """Gates of the two branches that have one, each [B, 1, D]."""

    widen: Tensor
    shade: Tensor


class Readout(NamedTuple):
    """What is added before the output, [B, 1, D]."""

    lift: Tensor


class ToyBlock(Block):
    """`look` attends, without a gate; `widen` is an MLP; `shade` depends on where a token is."""

    branches, attends = ("look", "widen", "shade"), ("look",)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D, self.heads = config.hidden_size, config.num_heads
        self.q, self.kv = nn.Linear(D, D), nn.Linear(D, 2 * D, bias=False)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.Tanh(), nn.Linear(2 * D, D))
        self.scale, self.place = nn.Parameter(torch.ones(D)), nn.Parameter(torch.randn(1, config.num_tokens, D))
        self.gates = nn.Linear(D, 2 * D)

    def branch(self, name: str, z: Tensor, mod: Terms, at: Tensor | None = None, see: See | None = None) -> tuple[Tensor, Any]:
        h = F.rms_norm(z, z.shape[-1:], self.scale, 1e-5)
        if name == "look":
            own = KeyValue(*self.kv(h).chunk(2, dim=-1))
            kv = see(own) if see else own
            return attend(self.q(h), kv.k, kv.v, self.heads), kv
        if name == "widen":
            return self.mlp(h), None
        return h * (self.place if at is None else take(self.place, at)), None

    def gated(self, name: str, update: Tensor, mod: Terms, at: Tensor | None = None) -> Tensor:
        return update if name == "look" else getattr(mod, name) * update


class Toy(Network):
    """A network of such blocks; all times and labels act through two gates a block and a shift at the end."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, D = config, config.hidden_size
        self.patches = nn.Conv2d(config.in_channels, D, config.patch_size, config.patch_size, bias=False)
        self.time, self.label = TimestepEmbedder(D), LabelEmbedder(config.num_classes, D)
        self.blocks = nn.ModuleList(ToyBlock(config) for _ in range(config.depth))
        self.out = nn.Linear(D, config.patch_size**2 * config.out_channels)

    def signature(self, teacher: str) -> ModelSignature:
        return signature_of(self.config, "toy", self.branches, teacher)

    def embed(self, x: Tensor) -> Tensor:
        return patch_tokens(x, self.patches.weight, None)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.time(t)) * self.label(y)

    def modulations(self, c: Tensor) -> tuple[list[Terms], Readout]:
        blocks = [Terms(*block.gates(c).unsqueeze(-2).chunk(2, dim=-1)) for block in self.blocks]
        return [Terms(terms.widen, terms.shade * 2) for terms in blocks], Readout(c.unsqueeze(-2))

    def readout(self, z: Tensor, mod: Readout) -> Tensor:
        P, side = self.config.patch_size, self.config.input_size
        patches = self.out(F.layer_norm(z, z.shape[-1:]) + mod.lift).unflatten(1, (side // P, -1)).unflatten(3, (P, P, -1))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def make_toy(seed: int = 0) -> Toy:
    """A frozen one whose branches matter."""
    torch.manual_seed(seed)
    toy = Toy(DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=3, num_heads=2, num_classes=4, learn_sigma=False))
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.normal_(0.0, 0.3)
    return toy.eval().requires_grad_(False)
