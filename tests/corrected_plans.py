"""What the tests of corrected skips share: a corrector whose way out is open, and steps that it corrects."""

from __future__ import annotations

import dataclasses

import torch
from conftest import FULL, Steps, make_plan

from tc_lightning.models.companions import Companions
from tc_lightning.models.corrector import Corrector, ResidualCorrector
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import Segment, skip

LABELS = torch.tensor([0, 3])
REPEATED = Segment(0, 4, "skip", weights=(1.0, 0.0), corrected=True)
# Orders 1 and 2, one of which lacks a value, free weights, the last value repeated, and a skip that is not corrected.
STEPS: Steps = (
    FULL,
    FULL,
    (skip(0, 4, 2, corrected=True),),
    FULL,
    (skip(0, 4, 1, corrected=True),),
    (skip(0, 4, 1),),
    (REPEATED,),
    (skip(0, 4, 2, corrected=True),),
)


def make_corrector(model: Network, seed: int = 0, std: float = 0.3) -> Corrector:
    """A corrector that changes what it is given; with std 0 one as it is before training."""
    torch.manual_seed(seed)
    module = ResidualCorrector(model.config)
    with torch.no_grad():
        module.leave.weight.normal_(0.0, std)
    return Corrector.of(module)


def corrected_plan(model: Network, companions: Companions, steps: Steps = STEPS, guidance: Guidance | None = None) -> CachePlan:
    corrector = companions.corrector
    assert corrector is not None
    corrected = any(s.corrected for segments in steps for s in segments)
    plan = make_plan(model, (FULL,) * len(steps), guidance)
    return dataclasses.replace(plan, steps=steps, corrector=corrector.digest if corrected else "")


def uncorrected(plan: CachePlan) -> CachePlan:
    """The same plan without its corrector."""
    steps = tuple(tuple(dataclasses.replace(s, corrected=False) for s in segments) for segments in plan.steps)
    return dataclasses.replace(plan, steps=steps, corrector="")
