"""A learned corrector for what is skipped: what the forecast of a skipped step's residual lacks, from what that step still knows.

A step that skips all blocks adds to its tokens the forecast of their summed residual. The corrector sees these tokens, the forecast,
and how the residual moved (the difference of its last two values), and adds to the forecast. It is one block, with attention over all
tokens and an MLP of half the usual width; the other half pays for the maps that lead in and out, so that it costs what a block of a DiT
does. Its terms depend on times alone: that of the step, and how far back the last two values are. They are constants of a plan.
(TokenCache v2, arXiv 2409.18523, makes up for what is skipped by adapters on the last blocks, which it computes.)

Shape suffixes: B rows (both halves of guidance counted), S steps, R terms, N tokens, D width.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.models.dit import NORM_EPS, DiTBlock, DiTConfig, Modulation, modulate
from tc_lightning.models.embedders import FREQUENCIES
from tc_lightning.models.frozen_files import load_frozen, save_frozen, state_digest
from tc_lightning.models.lean import time_features
from tc_lightning.plan.cache_plan import CachePlan

MLP_RATIO = 2.0
TERMS = 8  # rows of a step's terms: six of the block, shift and scale before the way out
_OPEN = (2, 5)  # of the block's, the gates

Correct = Callable[[Tensor, Tensor, Tensor], Tensor]  # tokens, forecast, movement [B, N, D] -> what the forecast lacks


class ResidualCorrector(nn.Module):
    """What a forecast lacks, [B, N, D]; nothing before training, since the way out starts at zero.

    Its output is in units of the mean movement of each token, which spans orders of magnitude along a run, as errors do.

    Args:
        config: shape of the teacher: its `hidden_size` and `num_heads`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        D = config.hidden_size
        self.enter = nn.Linear(3 * D, D)
        self.block = DiTBlock(DiTConfig(hidden_size=D, num_heads=config.num_heads, mlp_ratio=MLP_RATIO))
        self.leave = nn.Linear(D, D)
        self.clock = nn.Linear(3 * FREQUENCIES, D)
        self.out_modulation = nn.Linear(D, 2 * D)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        nn.init.zeros_(self.out_modulation.bias)
        terms: Any = self.block.adaLN_modulation[1]
        nn.init.zeros_(terms.bias)
        for gate in _OPEN:
            nn.init.ones_(terms.bias[gate * D : (gate + 1) * D])

    def terms(self, clocks_S3: Tensor) -> Tensor:
        """The terms of steps, [S, R, D], from the times of `correction_clocks`."""
        now, last, before = clocks_S3.unbind(1)
        features = time_features(torch.stack([now, last - now, before - last], 1), FREQUENCIES, 0.0).flatten(1)
        c_SD = F.silu(self.clock(features.to(self.clock.weight.dtype)))
        shift, scale = self.out_modulation(c_SD).unsqueeze(1).chunk(2, -1)
        return torch.cat([*self.block.modulation(c_SD), shift, 1 + scale], 1)

    def forward(self, z_BND: Tensor, forecast_BND: Tensor, moved_BND: Tensor, terms_RD: Tensor) -> Tensor:
        """What the forecast lacks.

        Args:
            z_BND: tokens of x_t.
            forecast_BND: forecast of the residual of all blocks.
            moved_BND: the last value of that residual less the one before.
            terms_RD: the step's terms, or [B, R, D] for rows of different steps.
        """
        *of_block, shift, scale = terms_RD.chunk(TERMS, -2)
        seen = torch.cat([_normed(value) for value in (z_BND, forecast_BND, moved_BND)], -1)
        h_BND = self.block(self.enter(seen), Modulation(*of_block))
        return self.leave(modulate(_normed(h_BND), shift, scale)) * moved_BND.abs().mean(-1, keepdim=True)


def _normed(x_BND: Tensor) -> Tensor:
    return F.layer_norm(x_BND, x_BND.shape[-1:], eps=NORM_EPS)


def correction_clocks(plan: CachePlan, schedule: Schedule) -> Tensor:
    """Of each step its time, and when the last two values were computed of the residual that it corrects (of the conditional half, if
    they differ), as `Schedule.clock` has them, [T, 3]; its own time three times where it corrects nothing."""
    rows = []
    for i, segments in enumerate(plan.steps):
        sources = next((read.sources for read in plan.flows[i].reads if read.entry.kind == "span"), ())
        steps = (i, *sources[:2]) if any(segment.corrected for segment in segments) else (i, i, i)
        rows.append([schedule.clock(plan.sampler.steps[step].t) for step in steps])
    return torch.tensor(rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Corrector:
    """A frozen corrector, and the digest by which plans name it; an artefact may hold it rounded to its own precision."""

    module: ResidualCorrector
    digest: str

    @classmethod
    def of(cls, module: ResidualCorrector) -> Corrector:
        """A frozen copy of the module as it is."""
        return cls(copy.deepcopy(module).eval().requires_grad_(False), state_digest(module.state_dict()))

    def terms(self, plan: CachePlan, schedule: Schedule) -> Tensor:
        """Terms of all steps of a plan, [T, R, D]."""
        return self.module.terms(correction_clocks(plan, schedule).to(self.module.clock.weight.device))

    def to(self, device: torch.device | str) -> Corrector:
        """The same on a device."""
        return Corrector(copy.deepcopy(self.module).to(device), self.digest)

    def save(self, path: Path) -> None:
        """Write `.safetensors` atomically; shape and digest are in its metadata."""
        save_frozen(self.module, self.digest, path)

    @classmethod
    def load(cls, path: Path, config: Any) -> Corrector:
        """Read what `save` wrote.

        Args:
            path: the file.
            config: shape of the teacher.

        Raises:
            RunError: if the file is missing, damaged, or of a corrector for another teacher.
        """
        return cls.of(load_frozen(ResidualCorrector(config), path, "corrector"))
