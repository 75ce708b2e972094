"""Plans with corrected skips, drawn at random: what a corrector is trained and validated on."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.learn.objectives.base import Task
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import compute, skip

UNTRAINED = "corrector in training"  # in place of the digest, which is known at the end


@dataclasses.dataclass(frozen=True)
class Grid:
    """Steps on which plans are drawn.

    Args:
        solver: ddim, dpmpp_2m or dpmpp_3m.
        spacing: of its times.
        num_steps: sampling steps.
    """

    solver: str
    spacing: str
    num_steps: int


def table_of(task: Task, grid: Grid) -> SamplerTable:
    """The sampler of a grid.

    Raises:
        TokenCacheError: if the solver or its spacing is unknown.
    """
    return make_sampler(task.teacher.schedule, grid.solver, grid.num_steps, grid.spacing)


def drawn_plan(task: Task, sampler: SamplerTable, orders: Sequence[int], longest: int, seed: int) -> CachePlan:
    """A plan whose steps are full or corrected skips.

    Two full steps come first. How far apart full steps stand at most is drawn for the plan, from 2 to `longest`, and so is its order;
    then each distance, from 1 to that.

    Args:
        task: what is distilled.
        sampler: the plan's steps.
        orders: forecast orders to choose from.
        longest: distance of two full steps at most.
        seed: of the draws.
    """
    rng = random.Random(seed)
    order, most, L = rng.choice(list(orders)), rng.randint(2, longest), task.signature.depth
    full, last = {0, 1}, 1
    while last < len(sampler):
        last += rng.randint(1, most)
        full.add(last)
    corrected = set(range(2, len(sampler))) - full or {len(sampler) - 1}  # one at least
    segments = {False: (compute(0, L),), True: (skip(0, L, order, corrected=True),)}
    steps = tuple(segments[i in corrected] for i in range(len(sampler)))
    return CachePlan(task.signature, sampler, task.guidance, steps, sampler, {"policy": "drawn"}, corrector=UNTRAINED)
