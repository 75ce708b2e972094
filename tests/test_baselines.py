from __future__ import annotations

import pytest
from conftest import VP, signature_for, vp_sampler

from tc_lightning.errors import PlanError
from tc_lightning.models.dit import DiTConfig
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs, macs_speedup, plan_macs, step_macs
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import reuse, skip
from tc_lightning.policies.fewer_steps import fewer_steps_plan
from tc_lightning.policies.fora import fora_plan

SIGNATURE = signature_for(DiTConfig(16, 2, 1, 96, 12, 3, num_classes=10, learn_sigma=False))
GUIDANCE = Guidance(1.5, 1)
FULL = full_step_macs(SIGNATURE)
SKIPPED = step_macs(SIGNATURE, (skip(0, 12),))


@pytest.mark.parametrize(("budget", "steps"), [(20 * FULL, 20), (20.9 * FULL, 20), (FULL, 1)])
def test_fewer_steps_spends_what_it_is_given(budget: float, steps: int):
    plan = fewer_steps_plan(SIGNATURE, VP, "dpmpp_2m", "logsnr", GUIDANCE, budget, vp_sampler("ddim", 50))
    assert plan.num_steps == steps
    assert plan.full_steps == list(range(steps))
    assert plan_macs(plan) == steps * FULL <= budget
    assert plan.sampler == vp_sampler("dpmpp_2m", steps, "logsnr")
    assert macs_speedup(plan) == 50 / steps
    assert CachePlan.from_json(plan.to_json()) == plan


def test_fewer_steps_needs_a_step():
    with pytest.raises(PlanError, match="does not pay for one full step"):
        fewer_steps_plan(SIGNATURE, VP, "ddim", "uniform", GUIDANCE, 0.99 * FULL, vp_sampler("ddim", 50))


def test_fora_at_a_whole_ratio_is_every_nth_step():
    target = 12 * FULL / (4 * FULL + 8 * SKIPPED)  # what every third of 12 steps comes to
    plan = fora_plan(SIGNATURE, vp_sampler("ddim", 12), GUIDANCE, target)
    assert plan.full_steps == [0, 3, 6, 9]
    assert macs_speedup(plan) == pytest.approx(target)
    assert {plan.steps[i] for i in (1, 2, 11)} == {(reuse(0, 12, ("attn", "mlp")),)}


@pytest.mark.parametrize("target", [1.3, 2.5, 3.0, 7.7])
def test_fora_spreads_full_steps_evenly_and_uses_the_budget(target: float):
    plan = fora_plan(SIGNATURE, vp_sampler("ddim", 50), GUIDANCE, target)
    gaps = {b - a for a, b in zip(plan.full_steps, [*plan.full_steps[1:], 50], strict=True)}
    assert max(gaps) - min(gaps) <= 1
    assert plan_macs(plan) <= 50 * FULL / target < plan_macs(plan) + FULL - SKIPPED
    assert CachePlan.from_json(plan.to_json()) == plan


def test_fora_says_what_is_reachable():
    most = 50 * FULL / (FULL + 49 * SKIPPED)
    with pytest.raises(PlanError, match=f"up to {most:.2f}"):
        fora_plan(SIGNATURE, vp_sampler("ddim", 50), GUIDANCE, 1000.0)
    with pytest.raises(PlanError, match="above 1"):
        fora_plan(SIGNATURE, vp_sampler("ddim", 50), GUIDANCE, 1.0)
