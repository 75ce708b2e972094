"""The search for the plans of least error within a budget.

All of it is deterministic. First full compute with fewer steps at several spacings, and the same with halves of guidance forecast;
then a grid over spacing, number of steps and forecast order, with P-steps that skip all blocks; variations of the best: where the
full steps stand, what P-steps do, guidance, spacings in between; and steps up the hill: single full steps of the best are moved.
Every recipe uses its budget as far as whole steps allow, and is judged by a real run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from tc_lightning.planner.recipe import Kind, Recipe
from tc_lightning.planner.shapes import Shape, fewer_steps, fill, halves, neighbours, variations
from tc_lightning.planner.trials import Trial, TrialRunner

HALVED = 3  # spacings of full compute that are tried with halves of guidance forecast

Progress = Callable[[Trial, Trial], None]  # this trial, the best so far


class Search:
    """One search within one budget.

    Args:
        bench: where recipes are tried.
        budget: what a plan may cost, in full steps.
        progress: told of every trial.
    """

    def __init__(self, bench: TrialRunner, budget: float, progress: Progress | None = None) -> None:
        self.bench, self.budget, self._progress = bench, budget * (1 + 1e-9), progress  # 28 / 1.12 is 25, not a little less
        self.trials: dict[Recipe, Trial] = {}
        self._shapes: dict[Recipe, Shape] = {}

    @property
    def best(self) -> Trial:
        """The trial of least error."""
        return min(self.trials.values(), key=lambda trial: trial.error)

    def best_of(self, kind: Kind) -> Trial | None:
        """The trial of least error of one kind of recipe; None if none was tried, or all of them became NaN."""
        tried = [trial for trial in self.trials.values() if trial.recipe.kind == kind and trial.error < float("inf")]
        return min(tried, key=lambda trial: trial.error, default=None)

    def ranking(self, kind: Kind) -> list[tuple[Shape, Trial]]:
        """Shapes of a kind that were tried, best first."""
        known = [(shape, self.trials[recipe]) for recipe, shape in self._shapes.items() if recipe.kind == kind]
        return sorted(known, key=lambda pair: pair[1].error)

    def try_shapes(self, shapes: Iterable[Shape]) -> None:
        """Try every shape that the budget has room for."""
        for shape in shapes:
            recipe = fill(shape, self.budget, self.bench.cost)
            if recipe is not None:
                self._shapes.setdefault(recipe, shape)
                self._attempt(recipe)

    def try_without_skips(self, forecast_guidance: bool) -> None:
        """What every budget is tried with: full compute with fewer steps, the best of it with halves of guidance forecast, and the best
        of these with halves at more steps and at fewer: the spacing that is best without need not be so with them."""
        self.try_shapes(fewer_steps())
        if forecast_guidance:
            self.try_shapes([next(halves(shape)) for shape, _ in self.ranking("full")[:HALVED]])
            for shape, _ in self.ranking("halves")[:1]:
                self.try_shapes(halves(shape))

    def try_around(self, attempts: int, guided: bool) -> None:
        """Two thirds of the attempts on variations of the two best shapes with P-steps, the others on moves of single steps."""
        before = len(self.trials)
        for shape, _ in self.ranking("cache")[:2]:
            room = max(0, (2 * attempts) // 3 - (len(self.trials) - before))
            self.try_shapes(list(variations(shape, guided))[:room])
        self.climb(attempts - (len(self.trials) - before))

    def climb(self, attempts: int) -> None:
        """Move single full steps of the best recipe with P-steps while there are attempts and moves; a move that helps is kept."""
        chooser = random.Random(0)
        while attempts > 0 and (best := self.best_of("cache")) is not None:
            moves = [move for move in neighbours(best.recipe) if move not in self.trials]
            chooser.shuffle(moves)
            for move in moves[:attempts]:
                attempts -= 1
                self._attempt(move)
                if self.best_of("cache") != best:
                    break
            else:
                return

    def _attempt(self, recipe: Recipe) -> None:
        if recipe not in self.trials and self.bench.cost(recipe) <= self.budget:
            self.trials[recipe] = self.bench.attempt(recipe)
            if self._progress is not None:
                self._progress(self.trials[recipe], self.best)
