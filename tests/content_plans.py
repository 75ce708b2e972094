"""What the tests of content plans share: steps whose tokens are chosen, and a predictor that tells tokens apart."""

from __future__ import annotations

import dataclasses

import torch
from conftest import FULL, Steps, make_plan

from tc_lightning.models.content_predictor import ContentPredictor, Selector
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, content, partial, skip

LABELS = torch.tensor([0, 3])
# Several segments in a step, the MLP alone, more than one block in a segment, forecasts, and all tokens kept.
STEPS: Steps = (
    FULL,
    (content(0, 1, 5, 1), content(1, 3, 7), skip(3, 4)),
    FULL,
    (content(0, 1, 5, 1), content(1, 3, 7), skip(3, 4)),
    (content(0, 2, 9, 0, ("mlp",)), partial(2, 4, (0, 3, 4, 9))),
    (content(0, 4, 16),),
)


def make_selector(model: DiT, seed: int = 0) -> Selector:
    """A predictor whose scores differ from token to token and from block to block."""
    predictor = ContentPredictor.from_teacher(model)
    with torch.no_grad():
        predictor.head.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(seed))
    return Selector.of(predictor)


def content_plan(model: DiT, selector: Selector, steps: Steps = STEPS, guidance: Guidance | None = None) -> CachePlan:
    chosen = any(s.is_content for segments in steps for s in segments)
    whole = tuple((compute(0, 4),) for _ in steps)
    return dataclasses.replace(make_plan(model, whole, guidance), steps=steps, selector=selector.digest if chosen else "")
