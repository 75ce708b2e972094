"""Which images to plan on: a pool's hardest ones, and some of the others to stand for the rest.

The mean error over many images is made by the few whose path comes near a fork. A handful of images taken as they come has none of
them, and a plan that was fitted and chosen on those meets them later. Two coarse runs at full compute show which they are: where these
differ most, other plans differ too.

Shape suffixes: P images of the pool, B images that are planned on.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.models.conditions import Asked, Given
from tc_lightning.models.network import Network
from tc_lightning.plan.given import PLANNING
from tc_lightning.plan.guidance import Guidance
from tc_lightning.planner.target import run_target
from tc_lightning.rollout.sampling import given_for, noise_for

COARSE = ((0.28, "quadratic"), (0.4, "mix:0.5"))  # steps of the two runs over those of the run that is replaced; their spacing
FEWEST = 4
SEED = 0x506C616E  # of the planner's images: apart from any seed that a person would choose
HARD = 3  # one of so many images is one of the hardest


@dataclasses.dataclass(frozen=True)
class Sample:
    """Images that stand for a pool.

    Args:
        indices: which they are.
        weights: how many of the pool each stands for.
    """

    indices: tuple[int, ...]
    weights: tuple[float, ...]

    def split(self, first: int) -> tuple[Sample, Sample]:
        """Two parts, of which the first has so many images; hard and easy ones are spread over both alike."""
        count = len(self.indices)
        chosen = {(2 * j + 1) * count // (2 * first) for j in range(first)}
        parts = [[j for j in range(count) if (j in chosen) is wanted] for wanted in (True, False)]
        a, b = (Sample(tuple(self.indices[j] for j in part), tuple(self.weights[j] for j in part)) for part in parts)
        return a, b

    def part(self, which: slice) -> Sample:
        """Some of the images."""
        return Sample(self.indices[which], self.weights[which])


def images(model: Network, indices: list[int]) -> tuple[Tensor, Given]:
    """Noise [B, C, H, W] and conditions of the planner's images, on the model's device."""
    device = next(model.parameters()).device
    noise = torch.cat([noise_for(SEED, range(index, index + 1), model, device) for index in indices])
    return noise, given_for(SEED, indices, model, device, PLANNING)


def as_they_come(start: int, count: int) -> Sample:
    """Images of the indices from `start` on, each of which stands for itself."""
    return Sample(tuple(range(start, start + count)), (1.0,) * count)


def dealt(difficulty_P: Tensor, share: float) -> tuple[list[int], list[int]]:
    """A pool in two, hardest first, of which the first has this share of the pool, and both have as much of every difficulty."""
    ranking = difficulty_P.argsort(descending=True, stable=True).tolist()
    taken = {j for j in range(len(ranking)) if int((j + 1) * share) > int(j * share)}
    first, second = ([index for j, index in enumerate(ranking) if (j in taken) is wanted] for wanted in (True, False))
    return first, second


def stratified(ranking: list[int], count: int) -> Sample:
    """A third of `count` images are the hardest of a pool; the others are spread evenly over the rest of its ranking.

    Args:
        ranking: indices of the pool's images, hardest first.
        count: how many to take.
    """
    if count >= len(ranking):
        return Sample(tuple(ranking), (1.0,) * len(ranking))
    hardest = count // HARD
    rest, others = ranking[hardest:], count - hardest
    spread = [rest[(2 * j + 1) * len(rest) // (2 * others)] for j in range(others)]
    return Sample((*ranking[:hardest], *spread), (1.0,) * hardest + (len(rest) / others,) * others)


def difficulty(
    model: Network, guidance: Guidance, steps: int, x_PCHW: Tensor, asked: Asked, batch: int, progress: str | None
) -> Tensor:
    """Mean squared difference of two coarse runs, [P].

    Args:
        model: the teacher.
        guidance: guidance scale and channels.
        steps: sampling steps of the run that is replaced.
        x_PCHW: initial noise.
        asked: their conditions.
        batch: images at a time.
        progress: what a progress bar is to say; None for none.

    Raises:
        TokenCacheError: if the latents become NaN.
    """
    ends = [
        run_target(model, make_sampler(model.schedule, "dpmpp_2m", count, spacing), guidance, x_PCHW, asked, batch, progress).x_0
        for count, spacing in ((max(FEWEST, round(share * steps)), spacing) for share, spacing in COARSE)
    ]
    return (ends[0] - ends[1]).square().flatten(1).mean(1)
