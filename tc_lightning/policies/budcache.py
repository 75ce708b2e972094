"""BudCache: full steps by simulated annealing, then hill climbing, on the final image (Lei et al., arXiv 2606.13496).

The number of full steps is given, and every candidate is judged by a run to the end: the mean squared error of its final latents. A
quarter of the full steps stand at the start and stay there; the others move, one at a time or two, mostly to near places. The rest of
the paper, time steps that are trained for the schedule found, is not a cache's: the planner's fit of the sampler does that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.residual_steps import affordable, repeated_step, repeating_steps
from tc_lightning.policies.targeted import Offer, TargetedPolicy

Placement = tuple[int, ...]
NEAR, NEARLY_ALWAYS, MOSTLY = 3, 0.9, 0.7  # the authors': a near place, one step moves rather than two, and to a near place


class BudCachePolicy(TargetedPolicy):
    """The placement of least error that the search finds; between full steps the last residual is repeated.

    The authors try 200 placements while annealing, and then all near ones, 20 times; the default here is what a report has time for.

    Args:
        target_speedup: in MACs, at least; None takes the number of full steps as it is given.
        full_steps: how many steps compute everything (10 of 28 for FLUX).
        evaluations: placements that are tried, of which the first half anneals.
        images: held-out images on which they are.
        seed: of the search.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "budcache"

    def __init__(
        self, target_speedup: float | None = None, full_steps: int = 17, evaluations: int = 24, images: int = 2, seed: int = 0
    ) -> None:
        super().__init__(target_speedup, images)
        if full_steps < 1 or evaluations < 1:
            raise PlanError(f"full_steps {full_steps} and evaluations {evaluations} must be at least 1.")
        self.full_steps, self.evaluations, self.seed = full_steps, evaluations, seed

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """One full step."""
        return full_step_macs(signature) + (len(sampler) - 1) * step_macs(signature, repeated_step(signature))

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return [self._found(context, min(self.full_steps, len(context.sampler)))]

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        return [self._found(context, affordable(context.signature, context.sampler, budget))]

    def _found(self, context: PlanningContext, count: int) -> Offer:
        arguments = {"placed": count, "evaluations": self.evaluations, "images": self.images, "seed": self.seed}

        def offer(placement: Placement) -> Offer:
            return Offer(repeating_steps(context.signature, context.sampler, placement), arguments)

        def error(placement: Placement) -> float:
            return context.evaluate(self._build(context, offer(placement)), self.images)

        return offer(search(len(context.sampler), count, error, self.evaluations, self.seed))


class _Judge:
    """Errors of placements, each found out once, and no more of them than there is time for."""

    def __init__(self, error: Callable[[Placement], float], evaluations: int) -> None:
        self.error, self.left = error, evaluations
        self.known: dict[Placement, float] = {}

    def of(self, placement: Placement) -> float:
        """The error; infinite for what there is no time to try."""
        if placement not in self.known and self.left:
            self.left -= 1
            self.known[placement] = self.error(placement)
        return self.known.get(placement, math.inf)

    @property
    def best(self) -> Placement:
        """The placement of least error."""
        return min(self.known, key=lambda placement: (self.known[placement], placement))


def search(num_steps: int, count: int, error: Callable[[Placement], float], evaluations: int, seed: int = 0) -> Placement:
    """The best placement of `count` full steps that annealing and climbing find.

    Temperatures fall from a tenth of the first placement's error to a ten-thousandth of it: errors have another size on every model.

    Args:
        num_steps: sampling steps.
        count: full steps, the first among them.
        error: of a placement, ascending.
        evaluations: calls of `error`, at most.
        seed: of all that is drawn.
    """
    rng, judge, fixed = np.random.default_rng(seed), _Judge(error, evaluations), max(1, count // 4)
    now = _drawn(num_steps, count, fixed, rng)
    scale, rounds = judge.of(now), max(1, evaluations // 2)
    for i in range(rounds):
        proposed = _moved(now, num_steps, fixed, rng)
        worse = judge.of(proposed) - judge.of(now)
        temperature = 0.1 * scale * 1e-3 ** (i / rounds)
        if worse < 0 or (temperature > 0 and math.isfinite(worse) and rng.random() < math.exp(-worse / temperature)):
            now = proposed
    now = judge.best
    while judge.left:
        near = [placement for placement in _neighbours(now, num_steps, fixed, rng) if placement not in judge.known]
        for placement in near[: judge.left]:
            judge.of(placement)
        if judge.best == now:
            break
        now = judge.best
    return judge.best


def _drawn(num_steps: int, count: int, fixed: int, rng: np.random.Generator) -> Placement:
    others = rng.permutation(np.arange(fixed, num_steps))[: count - fixed]
    return (*range(fixed), *sorted(int(i) for i in others))


def _moved(now: Placement, num_steps: int, fixed: int, rng: np.random.Generator) -> Placement:
    """A full step, or two, elsewhere."""
    movable, free = [i for i in now if i >= fixed], [i for i in range(fixed, num_steps) if i not in now]
    if not movable or not free:
        return now
    if rng.random() < NEARLY_ALWAYS or min(len(movable), len(free)) < 2:
        source = int(rng.choice(movable))
        near = [i for i in free if abs(i - source) <= NEAR] if rng.random() < MOSTLY else []
        sources, targets = {source}, {int(rng.choice(near or free))}
    else:
        sources, targets = ({int(i) for i in rng.choice(pool, 2, replace=False)} for pool in (movable, free))
    return tuple(sorted({*now} - sources | targets))


def _neighbours(now: Placement, num_steps: int, fixed: int, rng: np.random.Generator) -> list[Placement]:
    """One full step at a near place instead, for each step and place, in an order that is drawn."""
    free = [i for i in range(fixed, num_steps) if i not in now]
    found = [tuple(sorted({*now} - {a} | {b})) for a in now if a >= fixed for b in free if abs(a - b) <= NEAR]
    return [found[int(i)] for i in rng.permutation(len(found))]
