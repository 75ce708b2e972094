"""Receipts say what ran, and what of it was not fitted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from artefacts import LABELS, close
from conftest import FULL, make_plan, vp_sampler

from export.compiler.compile import export_artefact
from export.runtime.manifest import sha256_of
from export.runtime.request import outside_the_fit
from export.runtime.sampler import CachedSampler
from tc_lightning.plan.costs import cache_bytes_per_image
from tc_lightning.plan.segments import skip


def test_receipt(sampler, plan, artefact):
    receipt = sampler.sample(LABELS, seed=7, first_index=2).receipt
    json.dumps(receipt)
    schedule = [b["program"] for b in sampler.manifest["schedule"]]
    assert receipt["steps_per_program"] == {name: schedule.count(name) for name in set(schedule)}
    assert sum(receipt["steps_per_program"].values()) == plan.num_steps
    assert receipt["cache_engaged"] is True
    assert receipt["steps_reading_cache"] == 5
    assert receipt["full_compute"] is False
    assert receipt["guidance"] == {"scale": 1.5, "planned": 1.5, "as_planned": True, "steps": {"both": 8}}
    assert receipt["plan_digest"] == plan.digest
    assert receipt["teacher"] == plan.model.teacher
    assert receipt["weights_sha256"] == sha256_of(artefact / "weights.data")
    assert (receipt["seed"], receipt["first_index"], receipt["labels"], receipt["images"]) == (7, 2, LABELS, 3)
    assert (receipt["provider"], receipt["precision"]) == ("cpu", "fp32")
    assert set(receipt["nodes_per_provider"]) == {"condition", *schedule}
    for counts in receipt["nodes_per_provider"].values():
        assert set(counts) == {"CPUExecutionProvider"}
        assert counts["CPUExecutionProvider"] > 5
    assert receipt["cache_bytes"] == 3 * cache_bytes_per_image(plan)
    # 3 full steps of 4 x 16; twice 1 block of attention and 3 tokens; twice 2 x 5 tokens and a block
    assert receipt["blocks_x_tokens_computed"] == 3 * 64 + 2 * (16 + 3) + 2 * (10 + 16)
    assert receipt["blocks_x_tokens_share"] == pytest.approx(receipt["blocks_x_tokens_computed"] / (8 * 64))
    assert set(receipt["ms_per_program"]) == {"condition", *schedule}
    assert 0 < sum(receipt["ms_per_program"].values()) < receipt["ms"]


def test_receipt_of_full_compute(sampler):
    result = sampler.sample(LABELS, seed=7, full=True)
    receipt = result.receipt
    assert receipt["steps_per_program"] == {"step_full": 8}
    assert receipt["blocks_x_tokens_share"] == 1.0
    assert receipt["cache_engaged"] is False
    assert receipt["full_compute"] is True
    assert receipt["cache_bytes"] == 0
    assert not close(result.latents, sampler.sample(LABELS, seed=7).latents)


def test_full_compute_is_the_reference(tmp_path, teacher):
    """Three steps, one of them skipped, in place of six."""
    plan = make_plan(teacher, (FULL, FULL, (skip(0, 4),)), reference=vp_sampler("ddim", 6))
    export_artefact(teacher, plan, tmp_path / "artefact", "fp32", "cpu", images=1, report=lambda _: None)
    sampler, seen = CachedSampler(tmp_path / "artefact", max_batch=1), []
    full = sampler.sample([0, 1], full=True, on_step=lambda done, total: seen.append((done, total))).receipt
    assert seen == [(i, 12) for i in range(1, 13)]
    assert full["steps_per_program"] == {"step_full": 12}
    assert full["blocks_x_tokens_share"] == 1.0
    cached = sampler.sample([0, 1]).receipt
    assert cached["steps_per_program"] == {"step_00": 4, "step_01": 2}
    assert cached["blocks_x_tokens_share"] == pytest.approx(2 / 6)
    chunked = CachedSampler(tmp_path / "artefact")
    chunked.manifest["condition_values"] = 2 * 2 * 26 * 32  # two steps at a time for one label and the null one
    for whole in (True, False):
        assert close(chunked.sample([0], full=whole).latents, sampler.sample([0], full=whole).latents)


def test_receipt_shows_other_guidance(sampler):
    planned, other, none = (sampler.sample(LABELS, seed=7, guidance=g) for g in (1.5, 3.0, 1.0))
    assert other.receipt["guidance"] == {"scale": 3.0, "planned": 1.5, "as_planned": False, "steps": {"both": 8}}
    assert none.receipt["guidance"]["as_planned"] is False
    assert not close(other.latents, planned.latents)
    assert np.array_equal(planned.latents, sampler.sample(LABELS, seed=7).latents)


def test_receipt_without_guidance(unguided):
    receipt = CachedSampler(unguided).sample([1, 2]).receipt
    assert receipt["steps_per_program"] == {"step_00": 1, "step_01": 2}
    assert receipt["guidance"] == {"scale": 1.0, "planned": 1.0, "as_planned": True, "steps": {"cond": 3}}
    assert receipt["cache_bytes"] == 2 * 16 * 32 * 4
    assert receipt["blocks_x_tokens_share"] == pytest.approx(1 / 3)


def test_a_receipt_says_when_a_request_leaves_the_range_of_the_fit():
    fit = {"guidance": 1.5, "labels": [0, 1]}
    assert outside_the_fit(None, 4.0, [3]) == outside_the_fit(fit, [1.5], [1, 0, 1]) == []
    told = outside_the_fit(fit, [4.0], [1, 3, 3, 2])
    assert told == ["guidance 4: fitted at 1.5", "2 of its classes: no image of them was fitted on"]


def test_a_receipt_says_what_ran_in_words(artefact, plan):
    receipt = CachedSampler(artefact).sample([0]).receipt
    assert (receipt["plan"], receipt["outside_the_fit"]) == (plan.in_words, [])


def test_full_compute_was_not_fitted_and_leaves_no_range(teacher, tmp_path):
    plan = make_plan(teacher, (FULL, (skip(0, 4, 0),)), fit={"guidance": 1.5, "labels": [0]})
    export_artefact(teacher, plan, tmp_path / "a", "fp32", "cpu", images=2, report=lambda _: None)
    sampler = CachedSampler(tmp_path / "a")
    assert len(sampler.sample([3], guidance=4.0).receipt["outside_the_fit"]) == 2
    assert sampler.sample([3], guidance=4.0, full=True).receipt["outside_the_fit"] == []
