"""Plans and files of plans that are refused, and how the message names what is wrong."""

from __future__ import annotations

import copy
import json
import os
import re
from typing import Any

import pytest
from conftest import FULL, SIGNATURE, make_plan, vp_sampler
from plans import PLAN, changed

from tc_lightning.errors import PlanError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import Segment, compute, partial, reuse, skip


def with_step(*segments: Segment) -> CachePlan:
    """A full step, then these segments."""
    return make_plan(SIGNATURE, (FULL, tuple(segments)))


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
        ((Segment(0, 4, "compute", 1),), "compute takes neither order nor weights nor branches"),
        ((Segment(0, 4, "compute", 0, ("attn",)),), "compute takes neither order nor weights nor branches"),
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
        (changed("format_version", to=99), "format version 99 is not 6: make the plan again"),
        (old_format(), "format version 1 is not 6: make the plan again"),
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
        (changed(*SEGMENT, "order", to=1.0), "order must be an integer"),
        (changed(*SEGMENT, "order", to=True), "order must be an integer"),
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
        *((changed("model", "fixed_tokens", to=count), f"model has {count} fixed tokens of 16") for count in (-1, 16)),
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
