"""Shapes: recipes without their number of full steps, which a budget decides.

Three kinds of recipe are compared within every budget (`Recipe.kind`): full compute with fewer steps, which caches nothing; the same
with the unconditional half of guidance forecast at some of its steps; and recipes with steps that skip or prune.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from tc_lightning.planner.recipe import Recipe, spread
from tc_lightning.policies.pruned_steps import PrunedStep

FEWER_SPACINGS = ("mix:0.5", "mix:0.75", "quadratic", "mix:0.25", "logsnr")  # of full steps alone
PRUNED_SPACINGS = ("mix:0.5", "quadratic", "logsnr")  # of recipes with P-steps
ALONE_SHARES = (0.4, 0.5, 0.3)
RATIOS = (1.5, 2.0, 3.0)  # sampling steps over full steps, where there are P-steps
ORDERS = (1, 2)
WARMUP = 3  # full steps at the start: forecasts of order 2 are what they say from the third on
MAX_STEPS = 250
SKIP = PrunedStep("skip", 1)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A recipe without its number of full steps.

    Args:
        solver: see `Recipe`.
        spacing: see `Recipe`.
        ratio: sampling steps over full steps; not looked at where `num_steps` is given.
        pruned: see `Recipe`.
        warmup: full steps at the start.
        bend: see `recipe.spread`.
        alone: share of the full steps that compute the conditional half of guidance alone.
        num_steps: sampling steps, whatever the budget; None: `ratio` decides.
    """

    solver: str
    spacing: str
    ratio: float = 1.0
    pruned: PrunedStep = SKIP
    warmup: int = WARMUP
    bend: float = 1.0
    alone: float = 0.0
    num_steps: int | None = None


def fill(shape: Shape, budget: float, cost: Callable[[Recipe], float]) -> Recipe | None:
    """The recipe of a shape with the most full steps that the budget pays for; None if it pays for too few."""
    low = 1 if at_count(shape, 1) else 2  # of one step there is no recipe
    high = min(MAX_STEPS, int(2 * budget) + 1)  # a full step costs a half at least
    found: Recipe | None = None
    while low <= high:  # the cost rises with the number of full steps
        middle = (low + high) // 2
        recipe = at_count(shape, middle)
        if recipe is not None and cost(recipe) <= budget:
            found, low = recipe, middle + 1
        else:
            high = middle - 1
    return found


def at_count(shape: Shape, count: int) -> Recipe | None:
    """The recipe of a shape with so many full steps; None if its steps cannot hold them."""
    num_steps = round(shape.ratio * count) if shape.num_steps is None else shape.num_steps
    if not count <= num_steps <= MAX_STEPS or num_steps < 2:
        return None
    full = spread(num_steps, count, shape.warmup, shape.bend)
    pruned = SKIP if count == num_steps else shape.pruned  # of none, all are alike
    return Recipe(shape.solver, shape.spacing, num_steps, full, pruned, alone_steps(full, shape.alone))


def alone_steps(full: Sequence[int], share: float) -> tuple[int, ...]:
    """Every so many of the full steps, but for the first three, which the forecast of the difference needs."""
    candidates = full[WARMUP:]
    count = round(share * len(candidates))
    chosen = {int((j + 0.5) * len(candidates) / count) for j in range(count)} if count else set()
    return tuple(candidates[j] for j in sorted(chosen))


def fewer_steps() -> Iterator[Shape]:
    """Full compute alone."""
    yield from (Shape("dpmpp_2m", spacing) for spacing in FEWER_SPACINGS)


def halves(shape: Shape) -> Iterator[Shape]:
    """A shape whose full steps compute one half of guidance in part."""
    yield from (dataclasses.replace(shape, alone=share) for share in ALONE_SHARES)


def grid(reference: tuple[str, str, int]) -> Iterator[Shape]:
    """P-steps that skip all blocks; `reference` is sampler, spacing and number of steps of the run that is replaced."""
    for spacing, ratio, order in itertools.product(PRUNED_SPACINGS, RATIOS, ORDERS):
        yield Shape("dpmpp_2m", spacing, ratio, PrunedStep("skip", order))
    yield from native(reference, (1.0, 0.75, 0.55, 0.4))


def native(reference: tuple[str, str, int], bends: tuple[float, ...] = (0.75, 0.55)) -> Iterator[Shape]:
    """Shapes on the very steps of the run that is replaced: what comes nearest to it when there is time for many of them."""
    solver, spacing, steps = reference
    for order, bend in itertools.product(ORDERS, bends):
        yield Shape(solver, spacing, pruned=PrunedStep("skip", order), bend=bend, num_steps=steps)


def variations(shape: Shape, guided: bool) -> Iterator[Shape]:
    """Neighbours of a good shape with P-steps."""
    for bend in (0.8, 0.65, 1.2):
        yield dataclasses.replace(shape, bend=shape.bend * bend)
    yield from (dataclasses.replace(shape, warmup=warmup) for warmup in (2, 5))
    yield from (dataclasses.replace(shape, spacing=spacing) for spacing in _between(shape.spacing))
    yield dataclasses.replace(shape, pruned=dataclasses.replace(shape.pruned, order=3 - shape.pruned.order))
    for kind, blocks, tokens in (("edges", 0.1, 0.0), ("partial", 0.1, 0.25), ("partial", 0.25, 0.25), ("branch", 0.1, 0.0)):
        yield dataclasses.replace(shape, pruned=PrunedStep(kind, shape.pruned.order, blocks, tokens))
    if guided:
        yield from (dataclasses.replace(shape, alone=share) for share in (0.3, 0.5))


def _between(spacing: str) -> tuple[str, ...]:
    """Spacings near one."""
    known = {"logsnr": 0.0, "quadratic": 1.0} | {f"mix:{w:g}": w for w in (0.25, 0.5, 0.75)}
    if spacing not in known:
        return ()
    near = (known[spacing] - 0.25, known[spacing] + 0.25)
    return tuple(f"mix:{w:g}" for w in near if 0.0 < w < 1.0)


def neighbours(recipe: Recipe) -> list[Recipe]:
    """Recipes in which one full step stands a step earlier or later; the first stays."""
    taken, found = set(recipe.full), []
    for place, shift in itertools.product(recipe.full[1:], (-1, 1)):
        if place + shift in taken or not 0 < place + shift < recipe.num_steps:
            continue
        full = tuple(sorted(taken - {place} | {place + shift}))
        alone = tuple(sorted({place + shift if step == place else step for step in recipe.alone}))
        found.append(dataclasses.replace(recipe, full=full, alone=alone))
    return found
