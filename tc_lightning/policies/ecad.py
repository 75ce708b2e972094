"""ECAD: which branch of which block to compute at which step, by a genetic search (Aggarwal et al., arXiv 2506.15682).

A genome says it for each step, block and branch; others come from the cache as they were last computed. Two things are minimised by
NSGA-II: multiplications, and here the error of the final latents (the paper judges images by a reward model). Parents win tournaments
by rank and distance from their like; children come of a crossover at four points and flipped bits. The first generation holds the
schedules of FORA, as the paper's does, and random ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tc_lightning.errors import PlanError
from tc_lightning.plan.costs import full_step_macs, step_macs
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.routers import branch_macs, macs_of_branches, router_steps
from tc_lightning.policies.targeted import Offer, TargetedPolicy, reference_macs
from tc_lightning.policies.whole_steps import affordable_full_steps, affordable_interval, interval_steps, reused_step

FAST = 1.97  # speed-up of the schedule that the paper calls fast
POINTS = 4  # of the crossover


class ECADPolicy(TargetedPolicy):
    """The genome of least error within the budget, of all generations.

    A target bounds the search: of genomes beyond it, branches that are drawn come from the cache as well, until it is met. The paper
    has 72 genomes and 550 generations; the default here is what a report has time for.

    Args:
        target_speedup: in MACs, at least; None for the paper's fast schedule, 1.97.
        population: genomes of a generation.
        generations: how often they have children.
        mutation: share of the bits that flip.
        images: held-out images on which they are judged.
        seed: of the search.

    Raises:
        PlanError: if an argument is out of range.
    """

    name = "ecad"

    def __init__(
        self,
        target_speedup: float | None = None,
        population: int = 6,
        generations: int = 3,
        mutation: float = 0.01,
        images: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(target_speedup, images)
        if population < 2 or generations < 0 or not 0.0 <= mutation <= 1.0:
            raise PlanError(f"population {population} must be at least 2, generations {generations} at least 0, mutation in [0, 1].")
        self.population, self.generations, self.mutation, self.seed = population, generations, mutation, seed

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """One full step."""
        return full_step_macs(signature) + (len(sampler) - 1) * step_macs(signature, reused_step(signature, 0))

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return self.within(context, reference_macs(context.signature, context.reference) / FAST)

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        search = GeneticSearch(context.signature, len(context.sampler), budget, np.random.default_rng(self.seed), self.mutation)
        names = context.signature.block.names
        arguments = {key: getattr(self, key) for key in ("population", "generations", "mutation", "images", "seed")}

        def offer(computed_TLB: np.ndarray) -> Offer:
            return Offer(router_steps(~computed_TLB, names), arguments)

        def error(computed_TLB: np.ndarray) -> float:
            return context.evaluate(self._build(context, offer(computed_TLB)), self.images)

        fora = affordable_full_steps(context.signature, context.sampler, budget, reused_step(context.signature, 0))
        return [offer(search.run(error, search.first(self.population, fora), self.generations))]


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """A genome [T, L, branches], true where a branch is computed, with what is minimised."""

    computed_TLB: np.ndarray
    macs: float
    error: float

    @property
    def objectives(self) -> tuple[float, float]:
        """Both."""
        return self.macs, self.error


@dataclasses.dataclass(frozen=True, eq=False)
class GeneticSearch:
    """NSGA-II within a budget.

    Args:
        signature: the model, whose costs count.
        num_steps: sampling steps.
        budget: most MACs of a genome.
        rng: all that is drawn.
        mutation: share of the bits that flip.
    """

    signature: ModelSignature
    num_steps: int
    budget: float
    rng: np.random.Generator
    mutation: float

    def first(self, population: int, full_steps: int) -> list[np.ndarray]:
        """FORA with as many full steps as the budget pays for and with fewer, and every other genome random."""
        shape = self.num_steps, self.signature.depth, len(self.signature.block.names)
        found = []
        for k in range(population):
            computed = np.zeros(shape, dtype=bool)
            if k % 2 == 0:
                count = max(1, full_steps - k // 2)
                computed[interval_steps(self.num_steps, affordable_interval(self.num_steps, count))] = True
            else:
                computed = self.rng.random(shape) < self.budget / (self.num_steps * full_step_macs(self.signature))
            found.append(self.affordable(computed))
        return found

    def run(self, error: Callable[[np.ndarray], float], first: list[np.ndarray], generations: int) -> np.ndarray:
        """The genome of least error."""
        judged = {g.tobytes(): self._judge(g, error) for g in first}
        living = list(judged.values())
        for _ in range(generations):
            for child in self._children(living, len(first)):
                if child.tobytes() not in judged:
                    judged[child.tobytes()] = self._judge(child, error)
                    living.append(judged[child.tobytes()])
            living = survivors(living, len(first))
        return min(judged.values(), key=lambda j: (j.error, j.macs)).computed_TLB

    def affordable(self, computed_TLB: np.ndarray) -> np.ndarray:
        """The genome with step 0 full, and as many branches more from the cache as the budget asks for, drawn."""
        computed = computed_TLB.copy()
        computed[0] = True
        costs = np.broadcast_to(branch_macs(self.signature), computed.shape).ravel()
        over = macs_of_branches(self.signature, computed) - self.budget * (1 - 1e-12)
        later = np.flatnonzero(computed.ravel())
        later = self.rng.permutation(later[later >= computed[0].size])
        if over > 0:
            computed.ravel()[later[: 1 + int(np.searchsorted(np.cumsum(costs[later]), over))]] = False
        return computed

    def _judge(self, computed_TLB: np.ndarray, error: Callable[[np.ndarray], float]) -> Judged:
        return Judged(computed_TLB, macs_of_branches(self.signature, computed_TLB), error(computed_TLB))

    def _children(self, living: list[Judged], count: int) -> list[np.ndarray]:
        order, children = ranking([one.objectives for one in living]), list[np.ndarray]()
        for _ in range(count):
            one, other = (living[self._winner(order)].computed_TLB.ravel() for _ in range(2))
            cuts = np.sort(self.rng.integers(0, one.size + 1, POINTS))
            from_other = np.searchsorted(cuts, np.arange(one.size), side="right") % 2 == 1
            child = np.where(from_other, other, one) ^ (self.rng.random(one.size) < self.mutation)
            children.append(self.affordable(child.reshape(living[0].computed_TLB.shape)))
        return children

    def _winner(self, order: Sequence[int]) -> int:
        """Of two that are drawn the one that ranks first."""
        return order[int(self.rng.integers(0, len(order), 2).min())]


def survivors(living: list[Judged], count: int) -> list[Judged]:
    """The first of the ranking."""
    return [living[i] for i in ranking([one.objectives for one in living])[:count]]


def ranking(objectives: Sequence[tuple[float, float]]) -> list[int]:
    """Indices by front, of one front by crowding distance: those at its ends first, then the loneliest (NSGA-II)."""
    left, order = set(range(len(objectives))), list[int]()
    while left:
        front = sorted(i for i in left if not any(_dominates(objectives[j], objectives[i]) for j in left))
        distance = _crowding([objectives[i] for i in front])
        order += [front[k] for k in sorted(range(len(front)), key=lambda k: -distance[k])]
        left -= set(front)
    return order


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _crowding(front: Sequence[tuple[float, float]]) -> np.ndarray:
    """Distance of the neighbours on both sides, over the front's extent, summed over objectives; infinite at the ends."""
    distance = np.zeros(len(front))
    for values in np.array(front, dtype=np.float64).T:
        order = np.argsort(values, kind="stable")
        distance[order[[0, -1]]] = np.inf
        least, most = values[order[0]], values[order[-1]]
        if least < most < np.inf:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / (most - least)
    return distance
