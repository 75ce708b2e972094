"""The search for the plan of least error within a budget.

Three rounds, all of them deterministic. First a grid over sampler, spacing, number of steps and forecast order, with P-steps that skip
all blocks. Then variations of the best: where the full steps stand, what P-steps do, guidance, spacings in between. Then steps up
the hill: single full steps of the best are moved. Every recipe uses its budget as far as whole steps allow, and is judged by a
real run.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from tc_lightning.planner.bench import Bench, Trial
from tc_lightning.planner.recipe import Recipe, spread
from tc_lightning.policies.pruned_steps import PrunedStep

SPACINGS = ("mix:0.5", "quadratic", "logsnr")
RATIOS = (1.0, 1.5, 2.0, 3.0)  # sampling steps over full steps
ORDERS = (1, 2)
WARMUP = 3  # full steps at the start: forecasts of order 2 are what they say from the third on
MAX_STEPS = 250
FEWEST_STEPS = 11  # ratios are below it, numbers of steps are not
SKIP = PrunedStep("skip", 1)

Progress = Callable[[Trial, Trial], None]  # this trial, the best so far


@dataclasses.dataclass(frozen=True)
class Shape:
    """A recipe without its number of full steps, which the budget decides.

    Args:
        solver: see `Recipe`.
        spacing: see `Recipe`.
        ratio: sampling steps over full steps; or the number of sampling steps, from `FEWEST_STEPS` on.
        pruned: see `Recipe`.
        warmup: full steps at the start.
        bend: see `recipe.spread`.
        alone: share of the full steps that compute the conditional half of guidance alone.
    """

    solver: str
    spacing: str
    ratio: float
    pruned: PrunedStep = SKIP
    warmup: int = WARMUP
    bend: float = 1.0
    alone: float = 0.0


class Search:
    """One search within one budget.

    Args:
        bench: where recipes are tried.
        budget: what a plan may cost, in full steps.
        progress: told of every trial.
    """

    def __init__(self, bench: Bench, budget: float, progress: Progress | None = None) -> None:
        self.bench, self.budget, self._progress = bench, budget, progress
        self.trials: dict[Recipe, Trial] = {}
        self._shapes: dict[Recipe, Shape] = {}

    @property
    def best(self) -> Trial:
        """The trial of least error."""
        return min(self.trials.values(), key=lambda trial: trial.error)

    def adopt(self, other: Search) -> None:
        """Take over what another search has tried within this one's budget: more time is never worth less."""
        self.trials |= {recipe: trial for recipe, trial in other.trials.items() if trial.cost <= self.budget}

    def ranking(self) -> list[tuple[Shape, Trial]]:
        """Shapes that were tried, best first."""
        known = [(shape, self.trials[recipe]) for recipe, shape in self._shapes.items()]
        return sorted(known, key=lambda pair: pair[1].error)

    def try_shapes(self, shapes: Iterable[Shape]) -> None:
        """Try every shape that the budget has room for."""
        for shape in shapes:
            recipe = fill(shape, self.budget, self.bench.cost)
            if recipe is not None:
                self._shapes.setdefault(recipe, shape)
                self._attempt(recipe)

    def climb(self, attempts: int) -> None:
        """Move single full steps of the best recipe for as long as there are attempts and moves; a move that helps is kept."""
        chooser = random.Random(0)
        while attempts > 0 and self.trials:
            at = self.best.recipe
            moves = [move for move in neighbours(at) if move not in self.trials]
            chooser.shuffle(moves)
            for move in moves[:attempts]:
                attempts -= 1
                self._attempt(move)
                if self.best.recipe != at:
                    break
            else:
                return

    def _attempt(self, recipe: Recipe) -> None:
        if recipe not in self.trials and self.bench.cost(recipe) <= self.budget:
            self.trials[recipe] = self.bench.attempt(recipe)
            if self._progress is not None:
                self._progress(self.trials[recipe], self.best)


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
    num_steps = round(shape.ratio) if shape.ratio >= FEWEST_STEPS else round(shape.ratio * count)
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


def grid(reference: tuple[str, str, int]) -> Iterator[Shape]:
    """The first round; `reference` is sampler, spacing and number of steps of the run that is replaced."""
    yield from (Shape("dpmpp_2m", spacing, 1.0) for spacing in SPACINGS)
    for spacing, ratio, order in itertools.product(SPACINGS, RATIOS[1:], ORDERS):
        yield Shape("dpmpp_2m", spacing, ratio, PrunedStep("skip", order))
    yield from native(reference, (1.0, 0.75, 0.55, 0.4))


def native(reference: tuple[str, str, int], bends: tuple[float, ...] = (0.75, 0.55)) -> Iterator[Shape]:
    """Shapes on the very steps of the run that is replaced: what comes nearest to it when there is time for many of them."""
    solver, spacing, steps = reference
    for order, bend in itertools.product(ORDERS, bends):
        yield Shape(solver, spacing, max(steps, FEWEST_STEPS), PrunedStep("skip", order), bend=bend)


def variations(shape: Shape, guided: bool) -> Iterator[Shape]:
    """The second round: neighbours of a good shape."""
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
