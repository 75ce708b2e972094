"""What is planned for: the one bundle that policies, the planner and its recipes have of it."""

from __future__ import annotations

import dataclasses

from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.measure.scores import Scores
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network, how it is sampled, and what was learned of it.

    Args:
        signature: the model.
        schedule: its schedule, of which samplers are made.
        sampler: the sampler whose steps are to be planned, and of which the scores are.
        guidance: guidance scale and channels.
        scores: learned importance of tokens and measured sensitivity of branches.
        reference: sampler of the full-compute run that a plan is to replace, and whose MACs targets refer to.
    """

    signature: ModelSignature
    schedule: Schedule
    sampler: SamplerTable
    guidance: Guidance
    scores: Scores
    reference: SamplerTable
