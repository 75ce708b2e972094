"""What planning has found, budget by budget: by hand, and by the command on a tiny run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import FULL, VP, vp_sampler
from test_commands import call, is_one_paragraph
from test_report import finished_run

from export.benchmark_budgets import budgets, compared
from tc_lightning.errors import RunError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.planner.front import FrontPoint, write_front
from tc_lightning.rollout.sampling import full_plan, sample
from tc_lightning.rollout.targets import TargetKey, compute_targets


def planned_run(folder: Path) -> tuple[Path, CachePlan, CachePlan]:
    """A run whose front has one cached plan for 1.5x and 2x, which names five full steps as its rival, where 1.5x pays for six; and
    full compute for 4x."""
    run = finished_run(folder)
    own = CachePlan.load(run / "plan.json")
    cached = dataclasses.replace(own, fewer_steps=vp_sampler("dpmpp_2m", 5, "logsnr"))
    full = dataclasses.replace(full_plan(own.model, vp_sampler("ddim", 2), own.guidance), reference=own.reference)
    fewer = {
        budget: full_plan(own.model, vp_sampler("dpmpp_2m", steps, "logsnr"), own.guidance) for budget, steps in ((1.5, 6), (2.0, 5))
    }
    points = (
        FrontPoint(cached, "reference", 1.0, 0.1, True, "planned", (1.5, 2.0)),
        FrontPoint(full, "reference", 1.0, 0.1, False, "planned", (4.0,)),
        *(FrontPoint(plan, "reference", 1.0, 0.1, False, "fewer steps", (budget,)) for budget, plan in fewer.items()),
    )
    write_front(points, run)
    return run, cached, full


def test_the_ratio_of_two_means_and_its_error() -> None:
    """Ratio 8 / 4: what is left over is -2, 0, 2 in units of the second mean 4, so (2/4) / sqrt 3."""
    ours_B, theirs_B = torch.tensor([4.0, 8.0, 12.0]).double(), torch.tensor([3.0, 4.0, 5.0]).double()
    found = compared(ours_B, theirs_B)
    assert found["ratio"] == pytest.approx(2.0)
    assert found["ratio_stderr"] == pytest.approx(0.5 / 3**0.5)


def test_images_that_are_hard_for_both_tell_nothing_about_the_ratio() -> None:
    theirs_B = torch.tensor([1.0, 1000.0]).double()
    assert compared(3 * theirs_B, theirs_B) == pytest.approx({"ratio": 3.0, "ratio_stderr": 0.0})


def test_budgets_of_a_front(tmp_path: Path) -> None:
    """A plan stands beside the run of fewer steps that the budget pays for, once for each budget that ended on it."""
    run, cached, full = planned_run(tmp_path)
    found = budgets(run)
    assert [(one.speedup, one.plan, one.planned_for) for one in found] == [
        (1.5, cached, "reference"),
        (2.0, cached, "reference"),
        (4.0, full, "reference"),
    ]
    assert [one.fewer_steps and one.fewer_steps.steps for one in found] == [(FULL,) * 6, (FULL,) * 5, None]
    assert found[1].fewer_steps is not None
    assert found[1].fewer_steps.sampler == cached.fewer_steps


def test_without_a_front_one_is_told_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no front: plan with"):
        budgets(finished_run(tmp_path))


def test_command(tmp_path: Path) -> None:
    run, cached, _ = planned_run(tmp_path)
    done = call(tmp_path, "benchmark_budgets.py", "--images", 3, "--seed", 5)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (run / "budgets.md").read_text(encoding="utf-8").strip()
    assert len(done.stdout.strip().splitlines()) == 2 + 3 * 2  # three budgets, two targets
    content = json.loads((run / "budgets.json").read_text(encoding="utf-8"))
    assert (content["images"], content["seed"]) == (3, 5)
    rows = {(row["budget"], row["target"]): row for row in content["rows"]}
    assert rows[4.0, "ode"]["fewer_steps"] is None
    model = load_teacher(TeacherSpec(str(tmp_path / "teacher.safetensors")))
    targets = compute_targets(model, TargetKey(cached.model, VP, cached.reference, cached.guidance, 5, 3))
    for target in ("reference", "ode"):
        row = rows[2.0, target]
        rival = full_plan(cached.model, vp_sampler("dpmpp_2m", 5, "logsnr"), cached.guidance)
        ours, theirs = (
            (sample(model, plan, targets.x_T, targets.given) - getattr(targets, target)).square().flatten(1).mean(1)
            for plan in (cached, rival)
        )
        assert row["planned"]["mean"] == pytest.approx(float(ours.mean()), rel=1e-4)
        assert row["fewer_steps"]["median"] == pytest.approx(float(theirs.median()), rel=1e-4)
        assert row["ratio"] == pytest.approx(float(ours.mean() / theirs.mean()), rel=1e-4)
        assert row["macs_speedup"] == pytest.approx(macs_speedup(cached))
    assert call(tmp_path, "benchmark_budgets.py", "--images", 3, "--seed", 5).stdout == done.stdout


def test_bad_arguments(tmp_path: Path) -> None:
    is_one_paragraph(call(tmp_path, "benchmark_budgets.py", "--run", "gone"), "gone is not a finished run")
    assert "at least 2" in call(tmp_path, "benchmark_budgets.py", "--images", 1).stderr
