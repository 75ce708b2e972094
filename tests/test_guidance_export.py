"""Programs and artefacts of plans that leave a half of guidance out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import FULL, SIGNATURE, make_plan, make_teacher, random_modes, random_steps
from exporting import export, graphs_of, torch_latents, worst_error
from halves import COND, DIFFERENCE, SKIP, UNCOND

from export.compiler.explain import explain, plan_figure
from export.compiler.parity import relative_l2
from export.runtime.programs import FULL as STEP_FULL
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from tc_lightning.plan.costs import cache_bytes_per_image, full_step_macs
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, partial, reuse, skip
from tc_lightning.rollout.sampling import reference_plan

# Programs


def test_steps_of_different_halves_have_programs_of_their_own():
    lowered = lower(make_plan(SIGNATURE, (FULL, SKIP, SKIP, FULL, SKIP, FULL), modes="bb0b1c"), "cpu")
    assert [(p.name, p.steps, p.guidance.mode) for p in lowered.programs] == [
        ("step_00", (0, 3), "both"),
        ("step_01", (1,), "both"),
        ("step_02", (2,), "forecast"),
        ("step_03", (4,), "forecast"),
        ("step_04", (5,), "cond"),
        (STEP_FULL, (), "both"),
    ]
    assert lowered.programs[3].reads == ((DIFFERENCE, 2), (COND, 2))
    assert lowered.programs[0].writes == (DIFFERENCE, COND, UNCOND)


def test_step_full_is_for_both_halves():
    programs = lower(make_plan(SIGNATURE, (FULL,) * 3, modes="bcb"), "cpu").programs
    assert [(p.name, p.steps) for p in programs] == [("step_00", (1,)), (STEP_FULL, (0, 2))]


def test_listing_and_picture(tmp_path):
    plan = make_plan(SIGNATURE, (FULL, FULL, SKIP, (partial(0, 4, (1, 2)),), SKIP), modes="bb1cb")
    text = explain(plan, lower(plan, "cpu"))
    assert "step_01: 1 steps" in text
    for line in (
        "of a full step; conditional half alone, guided by a forecast of order 1",
        "of a full step; conditional half alone, not guided",
        "    reads  guidance x2, span [0,4) cond x2",
        "    reads  span [0,4) cond, k 0-3 cond, v 0-3 cond",
        "    reads  span [0,4) cond x2, span [0,4) uncond x2",
        "    writes guidance, span [0,4) cond, span [0,4) uncond, k 0-3 cond, v 0-3 cond",
    ):
        assert line in text
    assert text.endswith("in 12 places of 2 kB a sample and 2 places of 1 kB a sample")
    macs = SIGNATURE.fixed_macs / full_step_macs(SIGNATURE)
    assert f"{macs / 2:.3f} of a full step; conditional half alone, guided" in text
    plan_figure(plan, lower(plan, "cpu"), tmp_path / "modes.png")
    plan_figure(dataclasses.replace(plan, guidance_modes=()), lower(plan, "cpu"), tmp_path / "plain.png")
    assert (tmp_path / "modes.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


# The artefact

MIXED = (
    FULL,
    FULL,
    (reuse(0, 1, ("mlp",), 1), skip(1, 3, 2), partial(3, 4, (0, 3, 7), 0, ("mlp",))),
    (partial(0, 2, (1, 5, 6), 1), compute(2, 4)),
    (partial(0, 2, (0, 2, 13), 1), compute(2, 4)),
    (partial(0, 2, (2, 3, 4), 1), compute(2, 4)),
    FULL,
    (partial(0, 2, (2, 3, 8), 1), skip(2, 4, 2)),
    (skip(0, 4, 1),),
)


@pytest.mark.parametrize(
    ("modes", "guidance", "sampler"),
    [("bb1bc2bbc", Guidance(1.5, 3), "dpmpp_2m"), ("bb0cbb21b", Guidance(2.5, 4), "ddim"), ("bbcccccc2", Guidance(0.5, 1), "dpmpp_3m")],
)
def test_mixed_halves_agree_with_torch(tmp_path, modes, guidance, sampler):
    model = make_teacher(2)
    plan = make_plan(model, MIXED, guidance, sampler, "logsnr", modes=modes)
    manifest = export(model, plan, tmp_path / "artefact")
    assert max(row["rel_l2"] for row in manifest["parity"]["programs"]) < 1e-5
    assert {row["where"].split(",")[0] for row in manifest["parity"]["programs"]} == {*manifest["programs"]}
    loaded = CachedSampler(tmp_path / "artefact", max_batch=3)
    for labels in ([4], [0, 3, 1], [2, 2, 0, 4, 1]):
        result = loaded.sample(labels, seed=11)
        assert worst_error(result.latents, torch_latents(model, plan, labels, 11)) < 1e-5
    assert worst_error(loaded.sample(labels, seed=11, full=True).latents, torch_latents(model, reference_plan(plan), labels, 11)) < 1e-5
    assert relative_l2(result.latents, torch_latents(model, dataclasses.replace(plan, guidance_modes=()), labels, 11)) > 1e-3
    assert result.receipt["cache_bytes"] == 3 * cache_bytes_per_image(plan)


@pytest.mark.parametrize("seed", range(4))
def test_random_halves_agree_with_torch(tmp_path, seed):
    model = make_teacher(seed, depth=3)
    plan = make_plan(model, random_steps(seed, num_steps=6, depth=3), modes=random_modes(seed, 6))
    export(model, plan, tmp_path / "artefact")
    loaded = CachedSampler(tmp_path / "artefact", preload=False)
    assert worst_error(loaded.sample([1, 3], seed=5).latents, torch_latents(model, plan, [1, 3], 5)) < 1e-5


def test_half_precision_keeps_the_difference_in_fp32(tmp_path, teacher):
    plan = make_plan(teacher, (FULL, FULL, SKIP, SKIP), modes="bb1b")
    manifest = export(teacher, plan, tmp_path / "half", "fp16")
    assert manifest["parity"]["trajectory_rel_l2"] < 3e-2
    entries = manifest["entries"]
    assert entries["guidance"] == {"shape": (3, 8, 8), "rows": 1, "dtype": "fp32", "slots": 2}
    assert entries["span_0_4_uncond"] == {"shape": (16, 32), "rows": 1, "dtype": "fp16", "slots": 2}
    receipt = CachedSampler(tmp_path / "half").sample([1, 2]).receipt
    assert receipt["cache_bytes"] == 2 * cache_bytes_per_image(plan, 2)


def test_receipt_tells_which_halves_were_computed(tmp_path, teacher):
    plan = make_plan(teacher, (FULL, FULL, FULL, SKIP, SKIP), modes="b0c1b")
    export(teacher, plan, tmp_path / "artefact")
    sampler = CachedSampler(tmp_path / "artefact")
    cached, full, strong = (sampler.sample([0, 3], seed=1, **kw) for kw in ({}, {"full": True}, {"guidance": 4.0}))
    assert cached.receipt["guidance"]["steps"] == {"both": 2, "forecast": 2, "cond": 1}
    assert full.receipt["guidance"]["steps"] == {"both": 5}
    assert cached.receipt["blocks_x_tokens_computed"] == 64 + 32 + 32
    assert cached.receipt["blocks_x_tokens_share"] == pytest.approx(2 / 5)
    expected = torch_latents(teacher, dataclasses.replace(plan, guidance=Guidance(4.0, 3)), [0, 3], 1)
    assert worst_error(strong.latents, expected) < 1e-5
    assert not np.allclose(strong.latents, cached.latents)


def test_a_step_of_one_half_knows_nothing_of_the_other(tmp_path, teacher):
    """No graph of one half divides or doubles its batch, and without guidance its scale is no input."""
    plan = make_plan(teacher, (FULL, FULL, SKIP, SKIP), modes="b0bc")
    export(teacher, plan, tmp_path / "artefact")
    graphs = graphs_of(tmp_path / "artefact")
    for program in lower(plan, "cpu").programs:
        graph = graphs[program.name].graph
        axes = [a.i for node in graph.node if node.op_type in ("Split", "Concat") for a in node.attribute if a.name == "axis"]
        inputs = {value.name for value in graph.input}
        assert (0 in axes) == (not program.guidance.single), program.name
        assert ("guidance" in inputs) == (program.guidance.mode != "cond")
