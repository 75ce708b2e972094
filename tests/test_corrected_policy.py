"""Alternate corrected steps as a policy: counts and cost by hand, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import VP, make_teacher, vp_sampler
from corrected_plans import make_corrector
from planning import GUIDANCE, make_scores

from tc_lightning.errors import PlanError
from tc_lightning.models.companions import Companions
from tc_lightning.plan.costs import corrector_macs, full_step_macs, plan_macs
from tc_lightning.planner.corrected import CorrectedPolicy, alternating, corrected_steps
from tc_lightning.policies.base import PlanningContext
from tc_lightning.rollout.sampling import model_signature

STEPS = 12


@pytest.fixture(scope="module")
def context() -> PlanningContext:
    model, table = make_teacher(depth=2), vp_sampler("ddim", STEPS)
    companions = Companions(corrector=make_corrector(model, std=0.02))
    subject = model_signature(model), VP, table, GUIDANCE, make_scores(model, STEPS), table
    return PlanningContext(*subject, lambda plan, images: 0.0, model=model, companions=companions)


def test_counts_and_cost_by_hand(context: PlanningContext) -> None:
    s = context.signature
    one = (s.fixed_macs + corrector_macs(s)) / full_step_macs(s)
    assert 0.3 < one < 0.7  # one of two blocks, and what surrounds them
    assert corrected_steps(s, 3 + 2 * (1 + one)) == (5, 2)
    assert corrected_steps(s, 3 + 2 * (1 + one) - 1e-3) == (5, 1)  # what is left pays for a full step more
    assert corrected_steps(s, 3 + 0.99) == (3, 0)
    full, corrected = corrected_steps(s, 6.0)
    plan = alternating(context, "logsnr", full, corrected, 2)
    kinds = "".join("c" if segments[0].corrected else "f" for segments in plan.steps)
    assert kinds == "f" * (full - corrected) + "cf" * corrected
    assert plan_macs(plan) == pytest.approx((full + corrected * one) * full_step_macs(s))
    assert plan_macs(plan) <= 6.0 * full_step_macs(s)


def test_the_plan_is_refined_and_names_its_rival(context: PlanningContext) -> None:
    policy = CorrectedPolicy(2.0, "reference", (1,), ("logsnr", "no such spacing"), 3, 2, 1, progress=False)
    choice = policy.plan(context)
    assert choice.plan.corrector == context.companions.corrector.digest
    assert choice.plan.sampler.name.endswith("fitted")
    assert len(choice.plan.fewer_steps) == 6
    assert choice.plan.provenance["fit"]["images"] == 5
    kinds = [row["kind"] for row in choice.candidates]
    assert kinds.count("corrected") == 1
    assert kinds.count("full steps alone") == 5
    assert [row["error"] for row in choice.candidates] == sorted(row["error"] for row in choice.candidates)


def test_what_is_refused(context: PlanningContext) -> None:
    for wrong in ({"target_speedup": 1.0}, {"target": "x"}, {"orders": (0,)}, {"spacings": ()}, {"fit_images": 0}, {"refinements": -1}):
        with pytest.raises(PlanError):
            CorrectedPolicy(**wrong)
    with pytest.raises(PlanError, match=r"set `model\.init_args\.corrector` and fit"):
        CorrectedPolicy(2.0).plan(dataclasses.replace(context, companions=Companions()))
    with pytest.raises(PlanError, match="leaves 4 full steps of 12, and 3 must come before the first corrected one"):
        CorrectedPolicy(3.0).check(context.signature, context.sampler)
