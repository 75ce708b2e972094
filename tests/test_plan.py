from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from conftest import EVERY_MODE, FULL, SIGNATURE, make_plan, random_steps, vp_sampler

from tc_lightning.errors import PlanError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerStep, SamplerTable
from tc_lightning.plan.segments import Segment, compute, partial, reuse, skip
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.rollout.sampling import reference_plan

PLAN = make_plan(SIGNATURE, policy="test", arguments={"share": 0.1, "names": ["a"]})


def with_step(*segments: Segment) -> CachePlan:
    """A full step, then these segments."""
    return make_plan(SIGNATURE, (FULL, tuple(segments)))


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """JSON of `PLAN` with the value at a path replaced."""
    raw = json.loads(json.dumps(PLAN.to_json()))
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return raw


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
    assert plan.digest == "ea9c2d2e5cd0e7f2ad08bec684449ab073887bfa20139f6d698f4146fc645681"
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


# Validation


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((compute(0, 1), compute(2, 4)), r"step 1, blocks \[2, 4\).*without gap or overlap; 1 was reached"),
        ((compute(0, 3), compute(2, 4)), r"step 1, blocks \[2, 4\).*without gap or overlap; 3 was reached"),
        ((compute(2, 4), compute(0, 2)), "without gap or overlap; 0 was reached"),
        ((compute(0, 2), compute(2, 2), compute(2, 4)), r"blocks \[2, 2\)"),
        ((compute(0, 3),), "step 1 covers 3 of 4 blocks"),
        ((), "step 1 covers 0 of 4 blocks"),
        ((compute(0, 5),), r"step 1, blocks \[0, 5\)"),
        ((Segment(0, 4, "recycle"),), "unknown mode 'recycle'.*compute, partial, reuse, skip"),
        ((skip(0, 4, 3),), "order 3 is not 0, 1 or 2"),
        ((skip(0, 4, -1),), "order -1"),
        ((partial(0, 4, (3, 16)),), "tokens must lie in 0 to 15"),
        ((partial(0, 4, (-1, 3)),), "tokens must lie in 0 to 15"),
        ((Segment(0, 4, "partial", 0, ("attn", "mlp"), (5, 3)),), "ascending and distinct"),
        ((partial(0, 4, (3, 3)),), "ascending and distinct"),
        ((partial(0, 4, ()),), "tokens are listed if and only if the mode is partial"),
        ((Segment(0, 4, "skip", 0, (), (1,)),), "tokens are listed if and only if the mode is partial"),
        ((reuse(0, 4, ()),), "reuse must name the branches"),
        ((reuse(0, 4, ("norm",)),), r"branches \['norm'\] must be distinct and of"),
        ((reuse(0, 4, ("mlp", "mlp")),), "must be distinct"),
        ((partial(0, 4, (1,), 0, ("attn",)),), "partial recomputes attn and mlp, or mlp alone"),
        ((Segment(0, 4, "compute", 1),), "compute takes neither order nor branches"),
        ((Segment(0, 4, "compute", 0, ("attn",)),), "compute takes neither order nor branches"),
        ((Segment(0, 4, "skip", 0, ("attn",)),), "skip takes no branches"),
    ],
)
def test_segments_that_are_refused(segments, message):
    with pytest.raises(PlanError, match=message):
        with_step(*segments)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (FULL, (skip(0, 4),), None),
        ((skip(0, 4),), FULL, r"step 0 reads the cached span of blocks \[0, 4\)"),
        ((reuse(0, 4, ("mlp",)),), FULL, r"step 0 reads the cached mlp of blocks \[0, 1\)"),
        ((partial(0, 4, (1,)),), FULL, "step 0 reads the cached k"),
        ((partial(0, 4, (1,), 0, ("mlp",)),), FULL, "step 0 reads the cached attn"),
        ((partial(0, 4, tuple(range(16))),), (compute(0, 2), skip(2, 4)), r"step 1 reads the cached span of blocks \[2, 4\)"),
    ],
)
def test_only_what_was_computed_can_be_read(first, then, message):
    if message is None:
        make_plan(SIGNATURE, (first, then))
        return
    with pytest.raises(PlanError, match=message):
        make_plan(SIGNATURE, (first, then))


def test_number_of_steps_is_the_samplers():
    with pytest.raises(PlanError, match="2 steps, its sampler 3"):
        CachePlan(SIGNATURE, vp_sampler("ddim", 3), Guidance(), (FULL, FULL), vp_sampler("ddim", 3))


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (Guidance(1.5, 5), "guidance channels 5: the model has 4"),
        (Guidance(1.5, -1), "guidance channels -1"),
        (Guidance(1.5, 0), "acts on no channel"),
        (Guidance(float("nan"), 3), "guidance scale nan"),
        (Guidance(float("inf"), 3), "guidance scale inf"),
    ],
)
def test_guidance_that_is_refused(guidance, message):
    with pytest.raises(PlanError, match=message):
        make_plan(SIGNATURE, (FULL,), guidance)


SEGMENT = ("steps", 5, "segments", 0)


def old_format() -> dict[str, Any]:
    """A plan of the first format, which knew nothing of references."""
    return {key: value for key, value in changed("format_version", to=1).items() if key != "reference"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "plan: expected an object, found list"),
        (PLAN.to_json() | {"extra": 1}, "plan: unknown extra"),
        ({k: v for k, v in PLAN.to_json().items() if k != "guidance"}, "plan: missing guidance"),
        (changed("format_version", to=99), "format version 99 is not 4: make the plan again"),
        (old_format(), "format version 1 is not 4: make the plan again"),
        (changed("eps_scale", to=0.98), "eps_scale: expected a list, found float"),
        (changed("eps_scale", to=["0.98"] * 8), "eps_scale: expected a list of numbers"),
        (changed("eps_scale", to=[0.98]), "eps_scale holds 1 factors for 8 steps"),
        (changed("reference", to=[]), "sampler table must have the keys"),
        (changed("model", to=None), "model: expected an object"),
        (changed("model", "depth", to="4"), "model.depth: expected int, found '4'"),
        (changed("model", "depth", to=True), "model.depth: expected int, found True"),
        (changed("model", "colour", to=1), "model: unknown colour"),
        (changed("guidance", "scale", to="big"), "guidance.scale: expected float"),
        (changed("guidance", "channels", to=3.0), "guidance.channels: expected int"),
        (changed("sampler", "t", to=[1.0]), "columns must be lists of numbers of one length"),
        (changed("sampler", "t", 0, to=None), "columns must be lists of numbers"),
        (changed("sampler", "t", 0, to=float("nan")), "sampler step 0 holds a coefficient that is not finite"),
        (changed("sampler", "sigma", to=[]), "sampler table must have the keys"),
        (changed("sampler", to=[]), "sampler table must have the keys"),
        (changed("steps", to={}), "steps: expected a list, found dict"),
        (changed("steps", 3, "step", to=4), "found step 4 at place 3"),
        (changed("steps", 3, to=[]), "step 3: expected an object"),
        (changed("steps", 3, "segments", to=None), "step 3: expected a list"),
        (changed(*SEGMENT, to="compute"), "step 5, segment 0: expected an object, found str"),
        (changed(*SEGMENT, "colour", to=1), "step 5, segment 0: unknown colour"),
        (changed(*SEGMENT, "blocks", to=[0]), "step 5, segment 0: blocks must be two integers"),
        (changed(*SEGMENT, "blocks", to=[0, 2.0]), "blocks must be two integers"),
        (changed(*SEGMENT, "order", to=1.0), "order an integer each"),
        (changed(*SEGMENT, "order", to=True), "order an integer each"),
        (changed(*SEGMENT, "tokens", to=["1"]), "tokens a list of integers"),
        (changed(*SEGMENT, "keep", to=4), "keep is 4, but 5 tokens are listed"),
        (changed(*SEGMENT, "branches", to="mlp"), "branches must be a list of names"),
        (changed(*SEGMENT, "branches", to=[["mlp"]]), "branches must be a list of names"),
        (changed(*SEGMENT, "mode", to=1), "unknown mode 1"),
        (changed(*SEGMENT, "mode", to=[]), r"unknown mode \[\]"),
        (changed("provenance", to=[]), "provenance: expected an object"),
        (changed(*SEGMENT, "tokens", to=5), "tokens a list of integers"),
        (changed(*SEGMENT, to={"blocks": [0, 2], "mode": "partial", "tokens": None}), "tokens a list of integers"),
        (changed(*SEGMENT, "tokens", 0, to=10**400), "tokens a list of integers"),
        *(
            (changed("model", name, to=size), f"model has {name} {size}")
            for name in ("depth", "tokens", "fixed_macs")
            for size in (0, -1)
        ),
        (changed("model", "depth", to=10**400), "model.depth: expected int, found 1000"),
        (changed("model", "teacher", to="\ud800"), "model.teacher: expected str"),
        (changed("guidance", "scale", to=10**400), "guidance.scale: expected float"),
        (changed("eps_scale", to=[10**400] * 8), "eps_scale: expected a list of numbers"),
        (changed("sampler", "t", 0, to=10**400), "columns must be lists of numbers"),
        *(
            (changed("sampler", "name", to=name), "sampler's name and spacing must be names")
            for name in (None, 3, ["ddim"], {}, "\ud800")
        ),
        (changed("sampler", "spacing", to=0.5), "sampler's name and spacing must be names"),
        (changed("steps", 1, "step", to=True), "found step True at place 1"),
    ],
)
def test_json_that_is_refused(raw, message):
    with pytest.raises(PlanError, match=message):
        CachePlan.from_json(raw)


def test_the_json_itself_is_not_touched():
    raw = PLAN.to_json()
    before = copy.deepcopy(raw)
    CachePlan.from_json(raw)
    assert raw == before


# Files


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file(tmp_path, share):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: int(share * len(text))], encoding="utf-8")
    with pytest.raises(PlanError, match=r"cannot read the plan .*plan\.json.*lightning fit"):
        CachePlan.load(path)


def test_missing_and_binary_files(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(PlanError, match="cannot read the plan"):
            CachePlan.load(path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot read the plan"):
        CachePlan.load(tmp_path / "binary.json")


def test_invalid_plan_in_a_file_is_named(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(changed("format_version", to=0)), encoding="utf-8")
    with pytest.raises(PlanError, match=f"{re.escape(str(path))}: plan format version 0"):
        CachePlan.load(path)


def test_interrupted_save_keeps_the_old_plan(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    PLAN.save(path)

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_plan(SIGNATURE, (FULL,)).save(path)
    assert CachePlan.load(path) == PLAN


# Model


def test_require_model_accepts_its_own():
    PLAN.require_model(SIGNATURE)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelSignature)])
def test_require_model_names_the_field(field):
    value = getattr(SIGNATURE, field)
    others = {"output": "pixels", "conditions": (), "macs": ((1, 2), (3, 4))}
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
