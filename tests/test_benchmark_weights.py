"""The command that says what forecasts gain by weights of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planning import GUIDANCE

from export.benchmark_weights import SHAPES, WeightsBench, WeightsRow, table
from tc_lightning.errors import PlanError
from tc_lightning.models.dit import DiT
from tc_lightning.policies.subject import Subject
from tc_lightning.rollout.sampling import full_plan


def loaded(model: DiT, subject: Subject) -> Any:
    return SimpleNamespace(model=model, plan=full_plan(subject.signature, subject.reference, GUIDANCE), scores=subject.scores)


def test_a_line_for_every_plan_and_number_of_images(model: DiT, subject: Subject) -> None:
    rows = list(WeightsBench(loaded(model, subject), 2.0, "reference", 3).rows([2]))
    assert [row.what for row in rows] == list(SHAPES)
    assert all(row.weights > 0 and len(row.with_B) == len(row.without_B) == 3 for row in rows)
    assert any(not torch.equal(row.with_B, row.without_B) for row in rows)
    assert table(rows).count("\n") == len(rows) + 1


def test_a_line_by_hand() -> None:
    row = WeightsRow("skips", 24, 16, torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert table([row]).splitlines()[-1] == "| skips | 24 | 16 | 4 (4) | 2 (2) | 0.50 ± 0.00 |"


def test_a_budget_that_pays_for_no_cache_says_so(model: DiT, subject: Subject) -> None:
    with pytest.raises(PlanError, match="measure at a lower speed-up"):
        WeightsBench(loaded(model, subject), 5.9, "reference", 3).plans()
