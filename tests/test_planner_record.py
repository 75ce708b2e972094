"""The record of trials: what is remembered, for whom, and what damage costs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from tc_lightning.errors import RunError
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.planner import trials as bench_module
from tc_lightning.planner.price import macs_price
from tc_lightning.planner.recipe import Recipe
from tc_lightning.planner.record import TrialRecord
from tc_lightning.planner.refine import OnPass
from tc_lightning.planner.target import TargetRun
from tc_lightning.planner.theta import Places
from tc_lightning.planner.trials import TrialRunner
from tc_lightning.policies.pruned_steps import PrunedStep
from tc_lightning.policies.subject import Subject
from tc_lightning.rollout.ranks import ALONE, Ranks


class TestRecord:
    def test_trials_are_not_made_twice(self, tmp_path: Path, model: DiT, subject: Subject, target: TargetRun) -> None:
        recipe = Recipe("ddim", "uniform", 5, (0, 2, 4), PrunedStep("skip", 1))
        first = TrialRunner(model, subject, macs_price, target, 4, ALONE, tmp_path / "trials.jsonl").attempt(recipe)
        lines = (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()
        again = TrialRunner(model, subject, macs_price, target, 4, ALONE, tmp_path / "trials.jsonl").attempt(recipe)
        assert again == first
        assert (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines() == lines
        assert len(lines) == 1

    def test_another_search_does_not_take_them(self, tmp_path: Path, model: DiT, subject: Subject, target: TargetRun) -> None:
        recipe = Recipe("ddim", "uniform", 5, (0, 2, 4), PrunedStep("skip", 1))
        for fitted in (4, 5):
            TrialRunner(model, subject, macs_price, target, fitted, ALONE, tmp_path / "trials.jsonl").attempt(recipe)
        assert len((tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()) == 2

    def test_processes_of_unequal_shares_remember_under_one_name(self, model: DiT, subject: Subject, target: TargetRun) -> None:
        """Three images of the fit on two processes: one has one of them, the other two, and both sum to the same."""
        whole = torch.tensor([3.0, 8.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
        benches = [
            TrialRunner(model, subject, macs_price, target.part(part), fitted, Ranks(rank, 2, lambda values: whole))
            for rank, (part, fitted) in enumerate([(slice(0, 4), 1), (slice(4, 8), 2)])
        ]
        assert benches[0]._name() == benches[1]._name()

    def test_what_the_first_process_knows_is_known_to_all(self, model: DiT, subject: Subject, target: TargetRun) -> None:
        answers = iter([1.0, 0.25])  # it knows the recipe; its error

        def total(values: torch.Tensor) -> torch.Tensor:
            return values if values.ndim else torch.tensor(next(answers))

        bench = TrialRunner(model, subject, macs_price, target, 4, Ranks(1, 2, total))
        assert bench.attempt(Recipe("ddim", "uniform", 5, (0, 2, 4), PrunedStep("skip", 1))).error == 0.25

    def test_targets_of_equal_times_are_not_confused(self, model: DiT, subject: Subject, target: TargetRun) -> None:
        other = dataclasses.replace(target, sampler="other")
        assert len({TrialRunner(model, subject, macs_price, run, 4, ALONE)._name() for run in (target, other)}) == 2

    def test_a_damaged_file_costs_its_damaged_lines(self, tmp_path: Path) -> None:
        (tmp_path / "t").write_bytes(b'\xff\xfe\n[]\n{"search": "s", "recipe": "a", "error": NaN}\n{"search": "s"')
        record = TrialRecord(tmp_path / "t", "s")
        assert "a" not in record
        record.add("b", 2.0, write=True)
        assert TrialRecord(tmp_path / "t", "s").get("b") == 2.0
        (tmp_path / "folder").mkdir()
        with pytest.raises(RunError, match="cannot read"):
            TrialRecord(tmp_path / "folder", "s")

    def test_refined_coefficients_are_remembered_to_the_last_bit(
        self, tmp_path: Path, model: DiT, subject: Subject, target: TargetRun
    ) -> None:
        recipe = Recipe("dpmpp_2m", "mix:0.5", 5, tuple(range(5)), PrunedStep("skip", 1))
        passes: list[int] = []
        benches = [TrialRunner(model, subject, macs_price, target, 8, ALONE, tmp_path / "trials.jsonl") for _ in range(3)]
        first = benches[0].refined(recipe, 1, lambda: passes.append(1))
        again = TrialRunner(model, subject, macs_price, target, 8, ALONE, tmp_path / "trials.jsonl").refined(
            recipe, 1, lambda: passes.append(1)
        )
        assert again == first
        assert len(passes) == 1
        benches[1].refined(recipe, 2, lambda: passes.append(1))  # more iterations are another thing
        assert len(passes) > 1
        text = (tmp_path / "trials.jsonl").read_text(encoding="utf-8")
        (tmp_path / "trials.jsonl").write_text(text.replace('"theta": [', '"theta": [NaN, '), encoding="utf-8")
        spoilt = TrialRunner(model, subject, macs_price, target, 8, ALONE, tmp_path / "trials.jsonl")
        assert spoilt.refined(recipe, 1, lambda: passes.append(1)) == first

    def test_refined_weights_are_remembered_apart_from_samplers_alone(
        self, tmp_path: Path, model: DiT, subject: Subject, target: TargetRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = Recipe("dpmpp_2m", "mix:0.5", 5, (0, 1, 2, 4), PrunedStep("skip", 1), alone=(4,))
        passes: list[bool] = []

        def refine(
            model: DiT, plan: CachePlan, target: TargetRun, iterations: int, ranks: Ranks, on_pass: OnPass, weights: bool
        ) -> CachePlan:
            """Moves the last place of theta."""
            passes.extend([weights] * iterations)
            places = Places.of(plan, weights)
            return places.moved(plan, 0.01 * iterations * torch.eye(places.size)[-1])

        def refined(weights: bool) -> CachePlan:
            bench = TrialRunner(model, subject, macs_price, target, 8, ALONE, tmp_path / "trials.jsonl")
            return bench.refined(recipe, 1, lambda: None, weights)

        monkeypatch.setattr(bench_module, "refine_sampler", refine)
        first = [refined(weights) for weights in (False, True)]
        assert [refined(weights) for weights in (False, True)] == first
        assert passes == [False, True]
        assert [plan.steps[3][0].weights != () for plan in first] == [False, True]
        assert [plan.guidance_modes[4].weights != () for plan in first] == [False, True]

    def test_what_was_not_refined_is_not_remembered_as_refined(
        self, tmp_path: Path, model: DiT, subject: Subject, target: TargetRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For want of memory the sampler stays as it was fitted; with more of it, the same command refines it."""
        recipe = Recipe("dpmpp_2m", "mix:0.5", 5, tuple(range(5)), PrunedStep("skip", 1))
        short = TrialRunner(model, subject, macs_price, target, 8, ALONE, tmp_path / "trials.jsonl")
        monkeypatch.setattr(bench_module, "refine_sampler", lambda model, plan, *_, **__: plan)
        fitted = short.refined(recipe, 1, lambda: None)
        monkeypatch.undo()
        again = TrialRunner(model, subject, macs_price, target, 8, ALONE, tmp_path / "trials.jsonl").refined(recipe, 1, lambda: None)
        assert again.sampler != fitted.sampler

    def test_refined_coefficients_reach_processes_that_do_not_see_the_file(self) -> None:
        theta, cpu = [1.0, 2.0, 3.0], torch.device("cpu")
        second = Ranks(1, 2, lambda values: values + torch.tensor(theta, dtype=torch.float64))
        assert second.values_of_first([9.0, 9.0, 9.0], 3, cpu).tolist() == theta
        assert second.values_of_first(None, 3, cpu).tolist() == theta
        assert ALONE.values_of_first(theta, 3, cpu).tolist() == theta

    def test_a_line_that_was_cut_off_is_passed_over(self, tmp_path: Path) -> None:
        record = TrialRecord(tmp_path / "t", "s")
        record.add("a", 1.0, write=True)
        record.add("b", math.inf, write=True)
        with (tmp_path / "t").open("a", encoding="utf-8") as file:
            file.write('{"search": "s", "reci')
        again = TrialRecord(tmp_path / "t", "s")
        assert ("a" in again, "b" in again, "c" in again) == (True, True, False)
        assert (again.get("a"), again.get("b")) == (1.0, math.inf)
