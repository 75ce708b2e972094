"""Models of which some blocks cost more than others: what plans, policies and objectives make of it, and what a model cannot say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIGNATURE, make_plan

from tc_lightning.errors import PlanError
from tc_lightning.learn.objectives.superposition import TokenSuperposition
from tc_lightning.plan.block_costs import Macs, UnlikeBlocks
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import entry_shape, full_step_macs, plan_macs, segment_macs, step_macs
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.segments import compute, partial, reuse, skip
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.routers import lowest_within_budget

FULL = (compute(0, 4),)
UNLIKE = UnlikeBlocks((1, 3), (Macs(5, 1, 7), Macs(11)), 3)
# Of 16 tokens 2 are fixed; common blocks cost 16 (2 + 16) + 16 * 3 = 336, the others 16 (5 + 16) - 7 + 16 * 11 = 505.
MODEL = dataclasses.replace(SIGNATURE, macs=(Macs(2, 1), Macs(3)), fixed_macs=100, fixed_tokens=2, unlike=(UNLIKE,))


def test_costs_by_hand() -> None:
    assert [segment_macs(MODEL, compute(b, b + 1)) for b in range(4)] == [336, 505, 336, 505]
    assert full_step_macs(MODEL) == 100 + 2 * (336 + 505)
    assert segment_macs(MODEL, partial(0, 2, (0, 1, 9), 0)) == 3 * (2 + 16 + 3) + 3 * (5 + 16 + 11) - 7
    assert segment_macs(MODEL, partial(0, 2, (0, 1, 9), 0, ("mlp",))) == 3 * (3 + 11)
    assert segment_macs(MODEL, reuse(2, 4, ("mlp",))) == 16 * (2 + 16) + 16 * (5 + 16) - 7
    assert segment_macs(MODEL, skip(0, 4)) == 0
    plan = make_plan(MODEL, (FULL, (skip(0, 4),)))
    assert plan_macs(plan) == 2 * 100 + 2 * (336 + 505)
    assert [entry_shape(plan, Entry("k", b, b + 1)) for b in range(4)] == [(16, 32), (16, 96)] * 2
    assert entry_shape(plan, Entry("attn", 1, 2)) == entry_shape(plan, Entry("span", 0, 4)) == (16, 32)


def test_routers_take_what_is_cheapest_by_score_until_the_budget_is_met() -> None:
    """Leaving out a branch saves what it costs in that block."""
    scores = np.array([[[0.1, 0.9], [0.2, 0.9], [0.9, 0.9], [0.9, 0.9]]])
    whole, anywhere = full_step_macs(MODEL), np.ones((1, 4, 2), dtype=bool)
    for budget, count in ((whole - 288, 1), (whole - 289, 2), (whole - 288 - 329, 2), (whole - 288 - 330, 3)):
        assert lowest_within_budget(MODEL, scores, anywhere, budget).sum() == count


def test_the_share_of_a_step_without_tokens_of_the_image() -> None:
    objective = TokenSuperposition()
    objective.task = type("Task", (), {"signature": MODEL})()  # type: ignore[assignment]
    least = 100 + 2 * (2 * (2 + 16) + 2 * 3) + 2 * (2 * (5 + 16) - 7 + 2 * 11)
    assert objective._macs_share(torch.tensor(0.0)).item() == pytest.approx(least / full_step_macs(MODEL))
    assert least == step_macs(MODEL, (partial(0, 4, (0, 1)),))
    assert objective._macs_share(torch.tensor(1.0)).item() == 1.0


def test_a_plan_file_tells_them(tmp_path: Path) -> None:
    plan = make_plan(MODEL, (FULL,))
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan
    raw = plan.to_json()["model"]
    assert raw["macs"] == {"attn": [2, 1], "mlp": [3, 0]}
    assert raw["unlike"] == [{"blocks": [1, 3], "macs": {"attn": [5, 1, 7], "mlp": [11, 0]}, "kv_widths": 3}]
    assert "unlike" not in make_plan(SIGNATURE, (FULL,)).to_json()["model"]
    with pytest.raises(PlanError, match="differ in unlike"):
        plan.require_model(dataclasses.replace(MODEL, unlike=()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocks": (1, 1)}, r"unlike blocks are \[1, 1\]"),
        ({"blocks": (4,)}, r"unlike blocks are \[4\]: each must be one of its 4"),
        ({"blocks": ()}, "once"),
        ({"kv_widths": 0}, "kv_widths must be at least 1"),
        ({"macs": (Macs(-1), Macs(1))}, "negative"),
        ({"macs": (Macs(1), Macs(1, 0, 3))}, "spare its 2 fixed tokens more than these cost"),
        ({"macs": (Macs(1),)}, "MACs of 1 branches, and has 2"),
    ],
)
def test_what_a_model_cannot_say(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make_plan(dataclasses.replace(MODEL, unlike=(UNLIKE._replace(**changes),)), (FULL,))


@pytest.mark.parametrize(
    "unlike", [{}, [3], [{"blocks": [1]}], [{"blocks": "1", "macs": {}, "kv_widths": 1}], [{"blocks": [1], "macs": [], "kv_widths": 1}]]
)
def test_damaged_files(unlike: Any) -> None:
    with pytest.raises(PlanError, match="model"):
        ModelSignature.from_json(MODEL.to_json() | {"unlike": unlike}, "model")
