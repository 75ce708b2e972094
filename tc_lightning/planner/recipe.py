"""What the planner turns: a plan described by a few choices, and how to build it.

Suffixes: T steps, L blocks, N tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

import numpy as np

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.measure.scores import Scores
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.forecasts import MAX_ORDER
from tc_lightning.plan.guidance import BOTH, GuidanceMode
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import compute
from tc_lightning.policies.pruned_steps import PrunedStep
from tc_lightning.policies.subject import Subject

# full compute with fewer steps; the same with halves of guidance forecast; with steps that skip or prune
Kind = Literal["full", "halves", "cache"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A plan in a few choices.

    Args:
        solver: sampler that the coefficients start from, for example `dpmpp_2m`.
        spacing: its times, for example `mix:0.5`.
        num_steps: sampling steps T.
        full: steps that compute everything, ascending; step 0 is one.
        pruned: what the other steps do.
        alone: of these, the ones that compute the conditional half of guidance alone, and forecast its difference to the other.
    """

    solver: str
    spacing: str
    num_steps: int
    full: tuple[int, ...]
    pruned: PrunedStep
    alone: tuple[int, ...] = ()

    @property
    def kind(self) -> Kind:
        """What the recipe takes from a cache: nothing, guidance's difference alone, or more."""
        if len(self.full) < self.num_steps:
            return "cache"
        return "halves" if self.alone else "full"

    @property
    def digest(self) -> str:
        """Names the recipe: sha256 of its choices, shortened."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: lists, as they come back from a file."""
        return dataclasses.asdict(self) | {"full": list(self.full), "alone": list(self.alone)}


def build_plan(subject: Subject, recipe: Recipe) -> CachePlan:
    """The plan of a recipe, with its solver's own coefficients.

    Raises:
        PlanError: if the recipe describes none.
        TokenCacheError: if its sampler or spacing is unknown.
    """
    s, sampler = subject, make_sampler(subject.schedule, recipe.solver, recipe.num_steps, recipe.spacing)
    scores, full = _scores_at(subject, sampler), set(recipe.full)
    pruned = [i for i in range(recipe.num_steps) if i not in full]
    everything = (compute(0, s.signature.depth),)
    steps = tuple(everything if i in full else recipe.pruned.segments(s.signature, scores, pruned, i) for i in range(recipe.num_steps))
    modes = tuple(GuidanceMode("forecast", MAX_ORDER) if i in recipe.alone else BOTH for i in range(recipe.num_steps))
    provenance = {"policy": "planner", "arguments": recipe.to_json(), **s.scores.provenance(recipe.pruned.orders)}
    modes = modes if recipe.alone else ()
    return CachePlan(s.signature, sampler, s.guidance, steps, s.reference, provenance, guidance_modes=modes)


def _scores_at(subject: Subject, sampler: SamplerTable) -> Scores:
    """The scores at the times of another sampler: those of the nearest time that was scored, step 0 apart.

    Nearness is in the network's own time, along which its output changes, whichever way that runs.
    """
    scores = subject.scores
    known, wanted = (np.array([row.t for row in table.steps]) for table in (subject.sampler, sampler))
    rows = np.maximum(np.abs(wanted[:, None] - known[None]).argmin(1), min(1, len(known) - 1))
    importance_TLN, sensitivity_TL2 = scores.importance_TLN[rows].copy(), scores.sensitivity_TL2[rows].copy()
    importance_TLN[0], sensitivity_TL2[0] = 1.0, 0.0
    return dataclasses.replace(scores, importance_TLN=importance_TLN, sensitivity_TL2=sensitivity_TL2, router_TL2=None)


def spread(num_steps: int, count: int, warmup: int, bend: float) -> tuple[int, ...]:
    """Full steps: the first `warmup`, the others to the last step, evenly (bend 1) or denser towards the end (below 1).

    Args:
        num_steps: sampling steps T.
        count: full steps, 1 to T.
        warmup: of these, how many at the start.
        bend: exponent of the spacing.
    """
    warmup = min(warmup, count)
    rest = count - warmup
    reach = num_steps - warmup
    places = [*range(warmup), *(warmup - 1 + round(reach * ((j + 1) / rest) ** bend) for j in range(rest))]
    for j in range(count - 2, -1, -1):  # rounding may have put two on one step
        places[j] = min(places[j], places[j + 1] - 1)
    return tuple(max(place, j) for j, place in enumerate(places))
