"""The planner as a policy, whole, on a tiny teacher."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import VP, vp_sampler
from planning import GUIDANCE, STEPS, make_scores

from tc_lightning.errors import PlanError
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.planner import trials
from tc_lightning.planner.front import write_front
from tc_lightning.planner.image_choice import images
from tc_lightning.planner.policy import PlannerPolicy
from tc_lightning.planner.run import PlannerRun
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.choice import FrontPoint
from tc_lightning.rollout.ranks import Ranks
from tc_lightning.rollout.sampling import model_signature, sample


class TestPolicy:
    SMALL = PlannerPolicy(
        2.0,
        front=(1.5,),
        evaluations=8,
        front_evaluations=3,
        fit_images=2,
        judge_images=2,
        choice_images=2,
        final_images=3,
        pool_images=0,
        refinements=1,
        progress=False,
    )

    def context(self, model: DiT, folder: Path | None = None) -> PlanningContext:
        table = vp_sampler("ddim", STEPS)
        return PlanningContext(
            model_signature(model), VP, table, GUIDANCE, make_scores(model), table, lambda plan, n: math.nan, model=model, folder=folder
        )

    def test_plans_reach_their_speed_ups_and_the_first_is_chosen(self, model: DiT, tmp_path: Path) -> None:
        choice = self.SMALL.plan(self.context(model))
        assert all(macs_speedup(point.plan) >= 1.5 for point in choice.front)
        assert macs_speedup(choice.plan) >= 2.0
        assert [point.plan for point in choice.front if point.chosen] == [choice.plan]
        assert sum(row["chosen"] for row in choice.candidates) == 2
        write_front(choice.front, tmp_path)
        rows = json.loads((tmp_path / "front" / "front.json").read_text(encoding="utf-8"))
        assert [CachePlan.load(tmp_path / row["plan"]).digest for row in rows] == [
            p.plan.digest for p in sorted(choice.front, key=lambda point: macs_speedup(point.plan))
        ]

    @pytest.mark.parametrize("weights", [False, True])
    def test_forecasts_are_refined_if_that_is_asked_for(self, model: DiT, monkeypatch: pytest.MonkeyPatch, weights: bool) -> None:
        asked: list[bool] = []

        def refine(model: DiT, plan: CachePlan, target: TargetRun, iterations: int, *more: Any, weights: bool) -> CachePlan:
            asked.extend([weights] * iterations)
            return plan

        monkeypatch.setattr(trials, "refine_sampler", refine)
        settings = dataclasses.replace(self.SMALL.settings, evaluations=2, front=(), forecast_weights=weights)
        run = PlannerRun(settings, self.context(model))
        run.finish(run.searches())
        assert set(asked) == {weights}

    def test_the_list_keeps_other_targets_and_says_what_the_run_has(self, model: DiT, tmp_path: Path) -> None:
        point = self.SMALL.plan(self.context(model)).front[0]
        write_front((point,), tmp_path)
        write_front((dataclasses.replace(point, target="ode"),), tmp_path, own=None)
        listing = tmp_path / "front" / "front.json"
        assert [(row["target"], row["chosen"]) for row in json.loads(listing.read_text(encoding="utf-8"))] == [
            ("ode", True),
            ("reference", True),
        ]
        other = dataclasses.replace(point.plan, provenance={})
        write_front((dataclasses.replace(point, target="ode"),), tmp_path, own=other)  # as with --keep-plan
        assert [row["chosen"] for row in json.loads(listing.read_text(encoding="utf-8"))] == [False, False]
        assert len(list((tmp_path / "front").glob("????????.json"))) == 1  # both rows are of the same plan
        last = dataclasses.replace(point, plan=other)
        for _ in range(2):
            write_front((last,), tmp_path)
            write_front((dataclasses.replace(last, target="ode"),), tmp_path)
        assert [p.name for p in (tmp_path / "front").glob("????????.json")] == [f"{other.digest[:8]}.json"]
        for damaged in ("{", "[1]", '[{"plan": "x"}]', '{"a": 1}'):
            listing.write_text(damaged, encoding="utf-8")
            write_front((point,), tmp_path)
            assert len(json.loads(listing.read_text(encoding="utf-8"))) == 1

    def test_every_trial_has_a_line_and_one_of_each_budget_is_chosen(self, model: DiT, tmp_path: Path) -> None:
        policy = PlannerPolicy(2.0, "reference", (1.5, 1.5), 12, 6, "auto", 2, 2, 2, 2, 0, 0, progress=False)
        choice = policy.plan(self.context(model, tmp_path))
        assert sum(row["chosen"] for row in choice.candidates) == 2
        first = [row for row in choice.candidates if row["speedup"] == 2.0]
        second = [row for row in choice.candidates if row["speedup"] == 1.5]
        assert {row["speedup"] for row in choice.candidates} == {2.0, 1.5}
        assert all(row["cost"] <= STEPS / 1.5 for row in second)
        assert len((tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()) >= len(first)

    def test_fewer_images_than_processes_are_refused(self, model: DiT) -> None:
        with pytest.raises(PlanError, match="3 processes cannot share 2 images"):
            self.SMALL.plan(dataclasses.replace(self.context(model), ranks=Ranks(2, 3)))

    def test_an_interrupted_search_goes_on_and_ends_alike(self, model: DiT, tmp_path: Path) -> None:
        whole = self.SMALL.plan(self.context(model, tmp_path))
        trials = tmp_path / "trials.jsonl"
        lines = trials.read_text(encoding="utf-8").splitlines(keepends=True)
        trials.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
        again = self.SMALL.plan(self.context(model, tmp_path))
        assert again.plan == whole.plan
        assert trials.read_text(encoding="utf-8").splitlines(keepends=True) == lines

    def test_what_is_measured_at_the_end_was_not_looked_at_before(self, model: DiT) -> None:
        point = self.SMALL.plan(self.context(model)).front[0]
        run = run_target(model, vp_sampler("ddim", STEPS), GUIDANCE, *images(model, [6, 7, 8]), batch=4)
        mse = (sample(model, point.plan, run.x_T, run.given) - run.x_0).square().mean()
        assert point.mse == pytest.approx(float(mse), rel=1e-3)

    def test_the_converged_run_as_target(self, model: DiT) -> None:
        policy = PlannerPolicy(2.0, "ode", (), 2, 1, "auto", 2, 2, 2, 2, 8, 1, ode_steps=20, progress=False)
        point = policy.plan(self.context(model)).front[0]
        assert isinstance(point, FrontPoint)
        assert point.to_json()["mse_reference"] is None
        assert point.to_json()["mse_ode"] == point.mse

    @pytest.mark.parametrize(
        ("arguments", "what"),
        [({"target_speedup": 1.0}, "above 1"), ({"target": "fid"}, "reference, ode"), ({"evaluations": 0}, "at least 1")],
    )
    def test_bad_arguments(self, arguments: dict[str, object], what: str) -> None:
        with pytest.raises(PlanError, match=what):
            PlannerPolicy(**arguments)  # type: ignore[arg-type]

    def test_a_budget_of_less_than_two_steps_is_refused_before_training(self, model: DiT) -> None:
        with pytest.raises(PlanError, match="fewer than 2"):
            PlannerPolicy(8.0).check(model_signature(model), vp_sampler("ddim", STEPS))

    def test_a_run_that_adds_noise_is_no_target(self, model: DiT) -> None:
        with pytest.raises(PlanError, match="adds noise"):
            PlannerPolicy(2.0).check(model_signature(model), vp_sampler("ddpm", STEPS))
        PlannerPolicy(2.0, "ode", (2.0,)).check(model_signature(model), vp_sampler("ddpm", STEPS))

    def test_without_a_model_nothing_can_be_run(self, model: DiT) -> None:
        with pytest.raises(PlanError, match="needs the model"):
            self.SMALL.plan(dataclasses.replace(self.context(model), model=None))
