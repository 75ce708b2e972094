"""What a report compares: the run's own plans, published policies, and fewer steps."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import FULL, VP, make_plan
from reports import STEPS, finished_run, row, subject, teacher_file

from export.report import verdict
from export.report.contenders import (
    FEWER,
    PLANNED,
    PUBLISHED,
    REFERENCE,
    distinct,
    fewer_steps,
    fitted,
    planned,
    published,
    rounded_down,
)
from export.report.rows import spread
from tc_lightning.errors import PlanError, RunError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs, plan_macs
from tc_lightning.plan.segments import skip
from tc_lightning.policies.registry import standard_policies
from tc_lightning.rollout.sampling import full_plan, reference_plan
from tc_lightning.rollout.targets import TargetKey, compute_targets
from tc_lightning.runs.folder import read_run
from tc_lightning.runs.loaded import load_run, planning_context


def test_spread():
    assert spread(np.array([1.0, 3.0])) == {"mean": 2.0, "stderr": 1.0, "worst": 3.0}


def test_equal_computations_are_one_subject(teacher):
    plan = make_plan(teacher, STEPS)
    reference = full_plan(plan.model, plan.sampler, plan.guidance)
    same = dataclasses.replace(plan, provenance={"policy": "another"})
    other = make_plan(teacher, (FULL, *STEPS[1:-1], FULL))
    kept = distinct([subject(plan, reference), subject(same, reference, PUBLISHED), subject(other, reference)])
    assert [(s.name, s.plan) for s in kept] == [("x", plan), ("x (2)", other)]


def test_fewer_steps_round_in_their_favour(teacher):
    reference = make_plan(teacher, (FULL,) * 10)

    def judge(plan: CachePlan) -> float:  # the best spacing is logsnr, the best sampler dpmpp_2m
        return (plan.sampler.spacing != "logsnr") + 0.1 * (plan.sampler.name != "dpmpp_2m")

    found = list(fewer_steps(VP, reference, (3.0,), judge))
    assert {s.plan.sampler.spacing for s in found} == {"logsnr"}
    assert {s.plan.num_steps for s in found[:-1]} == {4}
    assert (found[-1].plan.sampler.name, found[-1].plan.num_steps) == ("dpmpp_2m", 5)
    assert {s.group for s in found} == {FEWER}


def test_front_of_the_planner(teacher, tmp_path):
    reference = make_plan(teacher, (FULL,) * 10)
    plans = [make_plan(teacher, (FULL,) * n + ((skip(0, 4, 1),),) * (10 - n)) for n in (1, 2, 3, 4, 5)]
    (tmp_path / "front").mkdir()
    entries = []
    for plan in plans:
        plan.save(tmp_path / "front" / f"{plan.digest[:8]}.json")
        speedup, name = plan_macs(reference) / plan_macs(plan), f"front/{plan.digest[:8]}.json"
        entries.append(
            {
                "plan": name,
                "macs_speedup": speedup,
                "mse_ode": 1 / len(plan.full_steps),
                "mse_reference": None,
                "target": "ode",
                "chosen": False,
                "role": "planned",
                "budgets": [],
            }
        )
    (tmp_path / "front" / "front.json").write_text(json.dumps(entries), encoding="utf-8")
    own = make_plan(teacher, STEPS)
    found = list(planned(reference, own, tmp_path, budgets=(2.0, 3.0), most=3))
    assert [s.plan for s in found[:1]] == [own]
    for budget in (2.0, 3.0):  # of the plans that reach a budget the dearest has the least error
        reaches = [plan for plan in plans if plan_macs(reference) / plan_macs(plan) >= budget]
        assert reaches[-1] in [s.plan for s in found[1:]]
    assert len(found) == 4
    fewer = make_plan(teacher, (FULL,) * 5, reference=reference.sampler)
    fewer.save(tmp_path / "front" / "fewer.json")
    row = entries[0] | {"plan": "front/fewer.json", "macs_speedup": 2.0, "role": "fewer steps", "target": "reference"}
    (tmp_path / "front" / "front.json").write_text(json.dumps([*entries, row]), encoding="utf-8")
    context: Any = SimpleNamespace(model=teacher)
    told: list[str] = []
    rivals = list(fitted(context, reference, tmp_path, (2.0, 4.6, 5.0), told.append))  # the last two pay for two steps each
    assert [(s.group, s.plan.num_steps, s.plan.caches) for s in rivals] == [(FEWER, 5, False), (FEWER, 2, False)]
    assert rivals[0].plan == fewer
    assert rivals[1].plan.sampler.name == "dpmpp_2m-fitted"
    assert told == ["fewer steps, fitted and refined, 4.6x"]
    (tmp_path / "front" / "front.json").write_text(json.dumps([row | {"target": "ode"}]), encoding="utf-8")
    rivals = list(fitted(context, reference, tmp_path, (2.0,), told.append))  # one fitted to the ODE is not one for the reference
    assert [s.method.rsplit(" ", 1)[1] for s in rivals] == ["ODE", "reference"]
    assert fewer not in [s.plan for s in planned(reference, own, tmp_path, (2.0,), 9)]
    (tmp_path / "front" / "front.json").write_text("[{}]", encoding="utf-8")
    with pytest.raises(RunError, match="is damaged"):
        list(planned(reference, own, tmp_path, (2.0,), 3))


def test_comparisons_by_hand(teacher):
    reference = make_plan(teacher, (FULL,) * 10)
    cached = make_plan(teacher, (FULL,) * 4 + ((skip(0, 4, 1),),) * 6)
    few = [make_plan(teacher, (FULL,) * n) for n in (5, 6, 7)]
    rows = [
        row(cached, reference, PLANNED, "ours", 1.0, ms=50.0),
        row(few[0], reference, FEWER, "five", 4.0, ms=45.0),
        row(few[1], reference, FEWER, "six", 2.0, ms=51.0),
        row(few[2], reference, FEWER, "seven", 0.5, ms=60.0),
    ]
    base = row(reference, reference, REFERENCE, "reference", 0.0, 100.0)
    found = verdict.compare(rows, base, (2.0,))
    assert {(c.equal, c.target, c.best) for c in found} == {(e, t, "six") for e in ("MACs", "time") for t in ("ode", "reference")}
    assert {c.ratio for c in found} == {0.5}
    assert {c.closer for c in found} == {1.0}
    assert "wins at every budget" in verdict.headline(found)
    beaten = verdict.compare([rows[0], row(few[0], reference, FEWER, "five", 0.5, ms=45.0)], base, (2.0,))
    assert "loses at every budget" in verdict.headline(beaten)
    assert any("LOSES to five: its error is 2 times as large" in s for s in verdict.sentences(beaten, 0, 0, 2))
    assert verdict.compare(rows, base, (9.0,)) == []
    assert plan_macs(few[1]) == full_step_macs(reference.model) * 6
    uncached = row(few[0], reference, PLANNED, "planned without a cache", 1.5, ms=45.0)
    found = verdict.compare([rows[0], uncached, rows[1]], base, (2.0,))
    assert {(c.planned, c.best, c.fewer) for c in found} == {("ours", uncached.name, uncached.name)}


def test_missing_policies_are_told(tmp_path):
    run = finished_run(tmp_path)
    loaded = load_run(dataclasses.replace(read_run(run), teacher=teacher_file(tmp_path)))
    reference = reference_plan(loaded.plan)
    targets = compute_targets(loaded.model, TargetKey(reference.model, VP, reference.sampler, reference.guidance, 1, 2, ode_steps=4))
    context = planning_context(loaded, targets)
    subjects, missing = published(context, reference, (2.0, 50.0), lambda s: {"fora": standard_policies(s)["fora"]})
    assert [(s.group, s.method) for s in subjects] == [(PUBLISHED, "fora")]
    assert [(m.method, m.budget) for m in missing] == [("fora", 50.0)]
    assert "not reachable" in missing[0].reason
    greatest, missing = published(context, reference, (50.0,), lambda s: {"fora": standard_policies(s)["fora"]})
    assert [(m.method, m.budget) for m in missing] == [("fora", 50.0)]
    assert f"up to {greatest[0].speedup:.2f}" in missing[0].reason  # what it does reach is shown


@pytest.mark.parametrize(("given", "expected"), [(1.8, 1.8), (1.899, 1.89), (1.7999999999999998, 1.8), (2.0, 2.0), (1.15, 1.15)])
def test_rounding_down_keeps_what_rounding_alone_took(given, expected):
    assert rounded_down(given) == expected


def test_runs_are_checked(tmp_path, teacher):
    run = finished_run(tmp_path)
    info = dataclasses.replace(read_run(run), teacher=teacher_file(tmp_path))
    make_plan(teacher, STEPS).save(info.plan)
    with pytest.raises(PlanError, match="made for another model"):
        load_run(info)
