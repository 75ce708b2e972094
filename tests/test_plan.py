"""Plans: their JSON, their digest, what follows from them, and the model they are for."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from conftest import EVERY_MODE, FULL, SIGNATURE, make_plan, random_steps, vp_sampler
from plans import PLAN

from tc_lightning.errors import PlanError
from tc_lightning.plan.block_costs import Macs, UnlikeBlocks
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerStep, SamplerTable
from tc_lightning.plan.segments import compute, partial, skip
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.plan.skips import LongSkips, Skip
from tc_lightning.rollout.sampling import reference_plan

# JSON and digest


@pytest.mark.parametrize("seed", range(5))
def test_json_round_trip_is_exact(seed):
    other = make_plan(SIGNATURE, random_steps(seed), sampler="dpmpp_3m", spacing="logsnr", reference=vp_sampler("ddim", 20))
    scaled = make_plan(SIGNATURE, random_steps(seed), eps_scale=tuple(1 - 0.1 / (i + 3) for i in range(7)))
    for plan in (PLAN, other, scaled):
        again = CachePlan.from_json(json.loads(json.dumps(plan.to_json())))
        assert again == plan
        assert again.digest == plan.digest
        assert again.to_json() == plan.to_json()


def test_json_is_the_documented_one():
    segments = PLAN.to_json()["steps"][5]["segments"]
    kept = {"blocks": [0, 2], "mode": "partial", "keep": 5, "tokens": [1, 5, 6, 9, 15], "branches": ["attn", "mlp"], "order": 1}
    reused = {"blocks": [3, 4], "mode": "reuse", "branches": ["attn", "mlp"], "order": 2}
    assert segments == [kept, {"blocks": [2, 3], "mode": "compute"}, reused]


def test_partial_branches_and_keep_may_be_left_out():
    raw = PLAN.to_json()
    for key in ("branches", "keep"):
        del raw["steps"][5]["segments"][0][key]
    assert CachePlan.from_json(raw) == PLAN


def test_save_and_load(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_digest_is_stable():
    """A change of this value means that every plan on disk has changed its name."""
    steps = (FULL, (skip(0, 4),))
    table = SamplerTable("test", "none", (SamplerStep(t=1.0, m_x=0.0, m_eps=1.0, next_x=1.0, next_m=0.5),) * 2)
    plan = CachePlan(SIGNATURE, table, Guidance(1.5, 3), steps, table)
    assert plan.digest == "8c00c2624b15bf861c7c8847c157070fe1cfa131e4b89b3afc8f73a8bbe3b375"
    assert make_plan(SIGNATURE).digest == make_plan(SIGNATURE).digest


def test_digest_feels_every_change():
    steps = list(EVERY_MODE)
    steps[5] = (partial(0, 2, (1, 5, 6, 9, 14), 1), *steps[5][1:])
    teacher = dataclasses.replace(SIGNATURE, teacher="1" * 64)
    variants = [
        make_plan(SIGNATURE),
        make_plan(SIGNATURE, tuple(steps)),
        make_plan(SIGNATURE, (*EVERY_MODE[:-1], (skip(0, 4, 1),))),
        make_plan(SIGNATURE, (*EVERY_MODE[:-1], (skip(0, 2), skip(2, 4)))),
        make_plan(SIGNATURE, guidance=Guidance(1.5, 4)),
        make_plan(SIGNATURE, guidance=Guidance(1.6, 3)),
        make_plan(SIGNATURE, spacing="logsnr"),
        make_plan(SIGNATURE, sampler="dpmpp_2m"),
        make_plan(SIGNATURE, policy="other"),
        make_plan(SIGNATURE, reference=vp_sampler("ddim", 9)),
        make_plan(SIGNATURE, eps_scale=(0.98,) * 8),
        make_plan(teacher),
    ]
    assert len({plan.digest for plan in variants}) == len(variants)


def test_equal_plans_have_equal_digests():
    whole, real = make_plan(SIGNATURE, guidance=Guidance(2, 3)), make_plan(SIGNATURE, guidance=Guidance(2.0, 3))
    assert whole == real
    assert whole.digest == real.digest


def test_derived_properties():
    assert PLAN.num_steps == 8
    assert PLAN.full_steps == [0, 1, 3]
    assert PLAN.summary == f"test-ddim8-full3-{PLAN.digest[:8]}"
    assert make_plan(SIGNATURE).summary.startswith("custom-")


@pytest.mark.parametrize("reference", [vp_sampler("ddim", 50), vp_sampler("ddim", 8)], ids=["another", "the plan's own"])
@pytest.mark.parametrize("through_json", [False, True])
def test_a_plan_whose_sampler_is_replaced_replaces_the_same_run(reference, through_json):
    plan = make_plan(SIGNATURE, reference=reference)
    plan = CachePlan.from_json(json.loads(json.dumps(plan.to_json()))) if through_json else plan
    fitted = dataclasses.replace(plan, sampler=dataclasses.replace(plan.sampler, name="ddim-fitted"))
    assert fitted.reference == reference
    assert reference_plan(fitted).sampler == reference
    assert macs_speedup(fitted) == macs_speedup(plan)


def test_a_reference_is_stated_in_the_file():
    raw = PLAN.to_json()
    assert raw["reference"] == PLAN.sampler.to_json()
    with pytest.raises(PlanError, match="sampler table"):
        CachePlan.from_json(raw | {"reference": None})
    with pytest.raises(PlanError, match="missing reference"):
        CachePlan.from_json({key: value for key, value in raw.items() if key != "reference"})


def test_what_the_plan_has_to_beat_is_kept_and_named():
    fewer = vp_sampler("dpmpp_2m", 3)
    plan = dataclasses.replace(PLAN, fewer_steps=fewer)
    assert CachePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.digest != PLAN.digest
    assert "fewer_steps" not in PLAN.to_json()


def test_full_compute_caches_nothing():
    assert PLAN.caches
    assert not make_plan(SIGNATURE, (FULL, (compute(0, 2), compute(2, 4)))).caches
    assert make_plan(SIGNATURE, (FULL, FULL), modes="b1").caches


def test_eps_scale_is_folded_into_the_coefficients():
    factors = (1.0, 0.5, 0.25, 1.0, 1.0, 1.0, 1.0, 2.0)
    plan = make_plan(SIGNATURE, eps_scale=factors, sampler="dpmpp_2m")
    changed = [dataclasses.replace(s, m_eps=s.m_eps * f) for s, f in zip(plan.sampler.steps, factors, strict=True)]
    assert plan.scaled_sampler.steps == tuple(changed)
    assert make_plan(SIGNATURE, eps_scale=(1,) * 8).scaled_sampler == PLAN.scaled_sampler == PLAN.sampler


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_of_eps_that_are_refused(factor):
    with pytest.raises(PlanError, match="step 2: eps_scale is"):
        make_plan(SIGNATURE, eps_scale=(1.0, 1.0, factor, *(1.0,) * 5))


# Model


def test_require_model_accepts_its_own():
    PLAN.require_model(SIGNATURE)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelSignature)])
def test_require_model_names_the_field(field):
    value = getattr(SIGNATURE, field)
    macs = (Macs(1, 2), Macs(3, 4))
    others = {"output": "pixels", "conditions": (), "macs": macs, "unlike": (UnlikeBlocks((1,), macs),)}
    others["skips"] = LongSkips((Skip(0, 2),), 5)
    other = dataclasses.replace(SIGNATURE, **{field: others.get(field, "other" if isinstance(value, str) else value)})
    other = other if other != SIGNATURE else dataclasses.replace(SIGNATURE, **{field: value + 1})
    with pytest.raises(PlanError, match=rf"differ in {field} \(plan .*, model .*\)\. Make a plan"):
        PLAN.require_model(other)


def test_require_model_names_every_field():
    other = dataclasses.replace(SIGNATURE, width=64, teacher="2" * 64)
    with pytest.raises(PlanError, match=r"width \(plan 32, model 64\); teacher \(plan 0+, model 2+\)"):
        PLAN.require_model(other)


def test_plans_need_no_torch(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    script = (
        "import sys; from pathlib import Path\n"
        "sys.modules |= dict.fromkeys(('torch', 'lightning', 'numpy', 'onnx'))\n"
        "from tc_lightning.plan.cache_plan import CachePlan; from tc_lightning.plan.costs import macs_speedup\n"
        "plan = CachePlan.load(Path(sys.argv[1])); print(plan.digest, macs_speedup(plan) > 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "plan.json"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [PLAN.digest, "True"], done.stderr
