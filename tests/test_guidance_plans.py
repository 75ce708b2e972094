"""Plans that leave a half of guidance out: their JSON, what they read and write, and what they cost."""

from __future__ import annotations

import dataclasses
import json

import pytest
from conftest import FULL, SIGNATURE, make_plan, random_modes, random_steps, vp_sampler
from halves import COND, DIFFERENCE, SKIP, UNCOND

from export.runtime.programs import lower
from tc_lightning.errors import PlanError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import cache_bytes_per_image, full_step_macs, macs_speedup, plan_macs
from tc_lightning.plan.dataflow import Entry, Read, assign_slots
from tc_lightning.plan.forecasts import lagrange_weights
from tc_lightning.plan.guidance import Guidance, GuidanceMode
from tc_lightning.plan.segments import partial

# The plan


@pytest.mark.parametrize("seed", range(3))
def test_json_round_trip_is_exact(seed):
    plan = make_plan(SIGNATURE, random_steps(seed), modes=random_modes(seed, 7))
    again = CachePlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest != make_plan(SIGNATURE, random_steps(seed)).digest


def test_json_names_only_the_steps_that_leave_a_half_out():
    steps = make_plan(SIGNATURE, (FULL,) * 4, modes="b1cb").to_json()["steps"]
    assert [step.get("guidance") for step in steps] == [None, {"mode": "forecast", "order": 1}, {"mode": "cond"}, None]


def test_both_everywhere_is_no_mode_at_all():
    both, plain = make_plan(SIGNATURE, modes="b" * 8), make_plan(SIGNATURE)
    assert both == plain
    assert both.digest == plain.digest
    assert lower(both, "cpu") == lower(plain, "cpu")


def test_full_steps_compute_both_halves():
    plan = make_plan(SIGNATURE, (FULL,) * 4, modes="bcb0")
    assert plan.full_steps == [0, 2]
    assert plan.summary == f"custom-ddim4-full2-both2-{plan.digest[:8]}"


@pytest.mark.parametrize(
    ("modes", "guidance", "message"),
    [
        ((GuidanceMode("uncond"), GuidanceMode()), None, "step 0, guidance: unknown mode 'uncond', choose one of both, forecast, cond"),
        ((GuidanceMode(), GuidanceMode("forecast", 3)), None, "step 1, guidance: order 3 is not 0, 1 or 2"),
        ((GuidanceMode(), GuidanceMode("cond", 1)), None, "mode cond takes neither order nor weights"),
        ((GuidanceMode("cond"),) * 2, Guidance(), "leaves out the unconditional half, and at guidance scale 1 there is none"),
        ((GuidanceMode("cond"),), None, "there are 1 guidance modes for 2 steps"),
        ((GuidanceMode("forecast"), GuidanceMode()), None, "step 0 forecasts guidance from the difference of the two halves"),
    ],
)
def test_modes_that_are_refused(modes, guidance, message):
    plan = make_plan(SIGNATURE, (FULL,) * 2, guidance)
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(plan, guidance_modes=modes)


@pytest.mark.parametrize("raw", [[], {}, {"mode": 1}, {"mode": "cond", "colour": 1}, {"mode": "forecast", "order": 1.0}])
def test_json_that_is_refused(raw):
    plan = make_plan(SIGNATURE, (FULL,) * 2).to_json()
    plan["steps"][1]["guidance"] = raw
    with pytest.raises(PlanError, match=r"step 1\b.*guidance"):
        CachePlan.from_json(plan)


def test_a_half_that_was_never_computed_cannot_be_read():
    with pytest.raises(PlanError, match=r"step 1 reads the cached span of blocks \[0, 4\) in the unconditional half"):
        make_plan(SIGNATURE, (FULL, SKIP), modes="cb")
    make_plan(SIGNATURE, (FULL, SKIP), modes="cc")


# Reads and writes


def test_each_half_reads_what_it_wrote_itself():
    flows = make_plan(SIGNATURE, (FULL, FULL, SKIP, SKIP), modes="bcbc").flows
    assert [set(flow.writes) for flow in flows] == [{COND, UNCOND}, {COND}, set(), set()]
    assert flows[2].reads == (Read(COND, (1, 0), (2.0, -1.0)), Read(UNCOND, (0,), (1.0,)))
    assert flows[3].reads == (Read(COND, (1, 0), lagrange_weights((1, 0), 3)),)
    assert assign_slots(flows)[1] == {COND: 2, UNCOND: 1}


def test_the_difference_is_written_with_both_halves_and_read_by_forecasts():
    flows = make_plan(SIGNATURE, (FULL,) * 6, modes="bb1b10").flows
    assert [flow.writes for flow in flows] == [(DIFFERENCE,), (DIFFERENCE,), (), (DIFFERENCE,), (), ()]
    assert [flow.reads for flow in flows[:3]] == [(), (), (Read(DIFFERENCE, (1, 0), (2.0, -1.0)),)]
    assert flows[4].reads == (Read(DIFFERENCE, (3, 1), lagrange_weights((3, 1), 4)),)
    assert flows[5].reads == (Read(DIFFERENCE, (3,), (1.0,)),)
    assert DIFFERENCE.name == "guidance"
    assert (COND.name, Entry("k", 3, 4, "uncond").name) == ("span_0_4_cond", "k_3_uncond")


def test_keys_and_values_are_updated_half_by_half():
    p = (partial(0, 4, (1, 2)),)
    flows = make_plan(SIGNATURE, (FULL, p, p, p), modes="bcbc").flows
    cond, uncond = (Entry("k", 2, 3, half) for half in ("cond", "uncond"))

    def sources(i: int) -> dict[Entry, tuple[int, ...]]:
        return {read.entry: read.sources for read in flows[i].reads if read.entry in (cond, uncond)}

    assert [sources(i) for i in (1, 2, 3)] == [{cond: (0,)}, {cond: (1,), uncond: (0,)}, {cond: (2,)}]
    assert [flow.updates(cond) for flow in flows] == [False, True, True, True]
    assert [flow.updates(uncond) for flow in flows] == [False, False, True, False]


# Costs


def test_a_step_of_one_half_costs_half():
    full, fixed = full_step_macs(SIGNATURE), SIGNATURE.fixed_macs
    plan = make_plan(SIGNATURE, (FULL, FULL, SKIP, SKIP), modes="b0cb", reference=vp_sampler("ddim", 8))
    assert plan_macs(plan) == full + full / 2 + fixed / 2 + fixed
    assert macs_speedup(plan) == pytest.approx(8 * full / (1.5 * full + 1.5 * fixed))


def test_cache_bytes_of_each_kind():
    """Two values of the conditional span, one of the other, two differences of 3 channels in fp32 whatever the precision."""
    plan = make_plan(SIGNATURE, (FULL, FULL, FULL, SKIP), modes="bcb1")
    assert assign_slots(plan.flows)[1] == {COND: 2, DIFFERENCE: 2}
    assert cache_bytes_per_image(plan) == 2 * 16 * 32 * 4 + 2 * 3 * 8 * 8 * 4
    assert cache_bytes_per_image(plan, 2) == 2 * 16 * 32 * 2 + 2 * 3 * 8 * 8 * 4
    whole = make_plan(SIGNATURE, (FULL, FULL, SKIP, FULL), modes="bbbc")
    assert cache_bytes_per_image(whole) == cache_bytes_per_image(make_plan(SIGNATURE, (FULL, FULL, SKIP, FULL)))
