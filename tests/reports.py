"""What the tests of reports share: a finished run with scores, and rows by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import FULL
from test_commands import make_run

from export.report.contenders import (
    PLANNED,
    Contender,
)
from export.report.rows import ReportRow
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import plan_macs
from tc_lightning.plan.segments import skip

STEPS = tuple(FULL if i in (0, 1, 2, 4, 7) else (skip(0, 4, 1),) for i in range(10))


def finished_run(folder: Path) -> Path:
    """A run folder with scores, of ten steps of which five are full."""
    run = make_run(folder, STEPS)
    plan = CachePlan.load(run / "plan.json")
    rng = np.random.default_rng(0)
    importance, sensitivity = rng.random((10, 4, 16)), rng.random((10, 4, 2))
    importance[0], sensitivity[0] = 1.0, 0.0
    Scores(importance, sensitivity, plan.model.teacher, sampler_digest(plan.sampler)).save(run / "scores.safetensors")
    return run


def subject(plan: CachePlan, reference: CachePlan, group: str = PLANNED, name: str = "x") -> Contender:
    return Contender(name, group, name, plan, plan_macs(reference) / plan_macs(plan))


def row(plan: CachePlan, reference: CachePlan, group: str, name: str, error: float, ms: float) -> ReportRow:
    errors = {"ode": np.array([error, error]), "reference": np.array([2 * error, 2 * error])}
    return ReportRow(subject(plan, reference, group, name), *[np.zeros((2, 1, 2, 2))] * 2, errors, {"ms_per_image": ms})


def teacher_file(folder: Path):
    from tc_lightning.models.checkpoints import TeacherSpec

    return TeacherSpec(str(folder / "teacher.safetensors"))
