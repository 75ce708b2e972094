from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import EVERY_MODE, FULL, SIGNATURE, make_plan, random_steps, vp_sampler
from PIL import Image

from export.bench.plans import benchmark_plans
from export.compiler.explain import conditioning_in_words, explain, plan_figure, values_held
from export.runtime.programs import lower
from tc_lightning.errors import PlanError
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.dataflow import assign_slots
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, partial, reuse, skip

SKIP = (skip(0, 4, 1),)


def test_listing():
    plan = make_plan(SIGNATURE, (FULL, SKIP, (partial(0, 3, (1, 2)), reuse(3, 4, ("mlp",)))), Guidance())
    lines = explain(plan, lower(plan, "cpu")).splitlines()
    assert lines[0] == f"{plan.summary}: 3 steps, 1 full, with ddim"
    assert lines[1].startswith(f"  4 programs, {macs_speedup(plan):.2f}x fewer MACs, cache 0.02 MB")
    assert lines[2:5] == [
        "  step_00: 1 steps, 0.9 MMACs a sample, 1.000 of a full step",
        "    runs   [0,4) compute",
        "    writes span [0,3), span [0,4), k 0-2, mlp 3, v 0-2",
    ]
    assert "    reads  span [0,4) x2" in lines
    assert "    runs   [0,3) partial 2 tokens order 0, [3,4) reuse mlp order 0" in lines
    assert lines[-3].endswith("(F = step_full): 0 1 2")
    assert lines[-2].endswith("after it:                 9 8 0")
    assert lines[-1] == "  at most 9 at a time, in 9 places of 2 kB a sample"


def test_listing_names_programs_that_share_a_graph():
    plan = make_plan(SIGNATURE, (FULL, (partial(0, 4, (1, 2)),), SKIP, (partial(0, 4, (1, 2, 3)),)))
    lines = explain(plan, lower(plan, "cpu")).splitlines()
    assert [line for line in lines if line.startswith("    graph")] == [
        "    graph  shared with step_01, step_03",
        "    graph  shared with step_00, step_03",
        "    graph  shared with step_00, step_01",
    ]
    assert "shared" not in explain(plan, lower(plan, "cuda"))


def test_listing_names_the_reference():
    plan = make_plan(SIGNATURE, (FULL, SKIP), reference=vp_sampler("dpmpp_2m", 50))
    assert explain(plan, lower(plan, "cpu")).splitlines()[0].endswith(": 2 steps, 1 full, with ddim in place of 50 of dpmpp_2m")


def test_a_plan_without_a_cache_says_so(tmp_path):
    fitted = dataclasses.replace(vp_sampler("dpmpp_2m", 2), name="dpmpp_2m-fitted")
    plan = dataclasses.replace(make_plan(SIGNATURE, (FULL, FULL), reference=vp_sampler("ddim", 5)), sampler=fitted)
    lowered = lower(plan, "cpu")
    listing = explain(plan, lowered)
    assert "no cache: 2 full steps with a fitted sampler (dpmpp_2m-fitted) in place of 5 of ddim" in listing
    assert "2.50x fewer MACs, cache 0.00 MB" in listing
    plan_figure(plan, lowered, tmp_path / "plan.png")
    assert Image.open(tmp_path / "plan.png").size[0] > 100


def test_values_held_by_hand():
    """Order 1: of the three full steps at 0, 1 and 3 the last two are held; after the last read nothing is."""
    assert values_held(make_plan(SIGNATURE, (FULL, FULL, SKIP, FULL, SKIP, FULL))) == [1, 2, 1, 2, 0, 0]


@pytest.mark.parametrize("seed", range(10))
def test_no_more_is_held_than_there_is_room_for(seed):
    plan = make_plan(SIGNATURE, random_steps(seed, num_steps=12))
    _, depth = assign_slots(plan.flows)
    assert max(values_held(plan)) <= sum(depth.values())


def test_what_conditioning_takes():
    """Two rows of 4000 values a step and 6000 constants, of two bytes each."""
    manifest = {"precision": "fp16", "modulations": 2, "model": {"width": 4000}, "constants": {"a": [1000, 2, 2], "b": [2000]}}
    assert conditioning_in_words(manifest) == "0.01 MB a request and 16 kB a step for each distinct row of conditions"


def test_picture(tmp_path: Path):
    plan = make_plan(SIGNATURE, EVERY_MODE)
    plan_figure(plan, lower(plan, "cpu"), tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in ((0x1B, 0x49, 0x65), (0x5F, 0xA8, 0xD3), (0xF2, 0xB8, 0x80), (0xF4, 0xF1, 0xEA)):  # all four modes are there
        assert (pixels == colour).all(1).sum() > 500


def test_benchmark_plans():
    """Equally many full steps, and the MACs that their names promise."""
    plans = benchmark_plans(SIGNATURE, vp_sampler("ddim", 50), 18)
    assert [len(plan.full_steps) for plan in plans.values()] == [18] * 4
    skipping, third, quarter, ahead = plans.values()
    assert skipping.steps[3] == (skip(0, 4, 2),)
    assert sum(len(s.blocks) for s in third.steps[3] if s.mode == "compute") == 2
    assert {len(s.tokens) for segments in quarter.steps for s in segments if s.mode == "partial"} == {4}
    assert len({segments[0].tokens for segments in quarter.steps if segments[0].mode == "partial"}) > 10
    assert [[s.tokens for s in step] for step in ahead.steps] == [[s.tokens for s in step] for step in quarter.steps]
    assert {s.kv_order for step in ahead.steps for s in step if s.mode == "partial"} == {2}
    assert macs_speedup(skipping) > macs_speedup(quarter) > macs_speedup(third) > 1.4
    assert skipping.full_steps[-1] == 49
    assert max(np.diff(skipping.full_steps)) <= 4
    assert lower(skipping, "cpu").slots == dict.fromkeys(lower(skipping, "cpu").slots, 3)
    for wrong in (4, 51):
        with pytest.raises(PlanError, match="cannot be spread"):
            benchmark_plans(SIGNATURE, vp_sampler("ddim", 50), wrong)
    assert compute(0, 4) in skipping.steps[0]
