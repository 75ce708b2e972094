"""What a plan is to reproduce: the images of a full-compute run, and the path that leads to them.

Shape suffixes: S steps of the target run, B images, C H W latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.measure.scores import sampler_digest
from tc_lightning.models.conditions import Asked, Given, given_of
from tc_lightning.models.network import Network
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.rollout.sampling import full_plan, model_signature, sample_steps

NEIGHBOURS = 4  # states of the target run that one in between is interpolated from: a cubic


@dataclasses.dataclass(frozen=True)
class TargetRun:
    """Latents of a full-compute run, before each of its steps and at the end.

    Args:
        schedule: the network's, which says what the times mean.
        times: times of its steps in the network's own units, noisiest first, [S].
        path_SBCHW: latents before each step.
        given: conditions of each image.
        x_0: final latents, [B, C, H, W].
        sampler: digest of the sampler that made it.
        weights_B: how much each image counts, [B]; None: all alike.
    """

    schedule: Schedule
    times: np.ndarray
    path_SBCHW: Tensor
    given: Given
    x_0: Tensor
    sampler: str = ""
    weights_B: Tensor | None = None

    @property
    def counts_B(self) -> Tensor:
        """How much each image counts, [B]."""
        return torch.ones(len(self.x_0), device=self.x_0.device) if self.weights_B is None else self.weights_B

    @property
    def x_T(self) -> Tensor:
        """Initial noise, [B, C, H, W]."""
        return self.path_SBCHW[0]

    def at(self, t: float | None) -> Tensor:
        """Latents at any time, [B, C, H, W]; None for the end.

        Interpolated as a cubic where the schedule says that paths are smooth (`Schedule.smooth`: x / alpha in log(sigma / alpha), or x
        in sigma); at a time of the run itself this is what it passed through. Outside of its times, where a cubic would run away:
        before the first, the initial noise; after the last, what has the final latents, and the noise that the last state then has,
        in the shares of that time.
        """
        if t is None:
            return self.x_0
        (known_S, scale_S), (at, scale) = self.schedule.smooth(self.times), self.schedule.smooth(t)
        if at >= known_S[0]:
            return self.x_T
        if at < known_S[-1]:
            (alpha, sigma), (alpha_S, sigma_S) = self.schedule.alpha_sigma(t), self.schedule.alpha_sigma(self.times)
            share = float(sigma / sigma_S[-1])
            return self.x_0 * (float(alpha) - share * float(alpha_S[-1])) + self.path_SBCHW[-1] * share
        place = int(np.searchsorted(-known_S, -at))
        first = min(max(place - NEIGHBOURS // 2, 0), max(len(known_S) - NEIGHBOURS, 0))
        near = range(first, min(first + NEIGHBOURS, len(known_S)))
        weights = _lagrange([known_S[j] for j in near], float(at))
        parts = [self.path_SBCHW[j] * (w * float(scale) / float(scale_S[j])) for j, w in zip(near, weights, strict=True)]
        return torch.stack(parts).sum(0)

    def part(self, images: slice) -> TargetRun:
        """The same of some images."""
        weights_B = None if self.weights_B is None else self.weights_B[images]
        path_SBCHW, given, x_0 = self.path_SBCHW[:, images], self.given.part(images), self.x_0[images]
        return TargetRun(self.schedule, self.times, path_SBCHW, given, x_0, self.sampler, weights_B)


def run_target(
    model: Network, sampler: SamplerTable, guidance: Guidance, x_BCHW: Tensor, asked: Asked, batch: int, progress: str | None = None
) -> TargetRun:
    """Compute a target run in full.

    Args:
        model: the teacher.
        sampler: its sampler.
        guidance: guidance scale and channels.
        x_BCHW: initial noise.
        asked: conditions of each image; of a class-conditional model its labels [B] will do.
        batch: images at a time.
        progress: what a progress bar is to say; None for none.

    Raises:
        TokenCacheError: if a condition cannot be what it is, or the latents become NaN.
    """
    plan = full_plan(model_signature(model, "target"), sampler, guidance)
    given = given_of(model.conditions, asked)
    paths, ends = [], []
    starts = range(0, len(x_BCHW), batch)
    with tqdm(total=len(starts) * len(sampler), desc=progress, unit="step", disable=progress is None) as bar:
        for start in starts:
            part = slice(start, start + batch)
            states = []
            for state in sample_steps(model, plan, x_BCHW[part], given.part(part)):
                states.append(state.x)
                bar.update()
            paths.append(torch.stack(states))
            ends.append(state.x_next)
    times = np.array([row.t for row in sampler.steps])
    return TargetRun(model.schedule, times, torch.cat(paths, 1), given, torch.cat(ends), sampler_digest(sampler))


def _lagrange(known: Iterable[float], at: float) -> list[float]:
    nodes = list(known)
    return [float(np.prod([(at - b) / (a - b) for b in nodes if b != a])) for a in nodes]
