"""The planner: interpolation and fit by identities, recipes and search by hand, the whole on a tiny teacher."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_teacher

from export.plan import _parse, fabric_of, policy_of
from export.plan import main as plan_command
from tc_lightning.cli import _user_error
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import PlanError, RunError, TokenCacheError
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import skip
from tc_lightning.planner import bench as bench_module
from tc_lightning.planner.bench import Bench
from tc_lightning.planner.fit import fit_sampler
from tc_lightning.planner.front import write_front
from tc_lightning.planner.pilot import images
from tc_lightning.planner.policy import PlannerPolicy
from tc_lightning.planner.price import ClockPrice, SharedPrice, macs_price
from tc_lightning.planner.recipe import Kitchen, Recipe, spread
from tc_lightning.planner.record import TrialRecord
from tc_lightning.planner.search import Search
from tc_lightning.planner.shapes import Shape, at_count, fewer_steps, fill, grid, halves, neighbours, variations
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.choice import FrontPoint
from tc_lightning.policies.pruned_steps import PrunedStep
from tc_lightning.rollout.ranks import ALONE, Ranks
from tc_lightning.rollout.sampling import full_plan, model_signature, sample

GUIDANCE = Guidance(1.5, 3)
STEPS = 12


@pytest.fixture(scope="module")
def model() -> DiT:
    return make_teacher(depth=2)


@pytest.fixture(scope="module")
def target(model: DiT) -> TargetRun:
    return run_target(model, make_sampler("ddim", STEPS), GUIDANCE, *images(model, list(range(8))), batch=4)


def make_scores(model: DiT, steps: int = STEPS) -> Scores:
    L, N = model.config.depth, model.config.num_tokens
    importance = np.linspace(0, 1, steps * L * N).reshape(steps, L, N)
    sensitivity = np.ones((steps, L, 2))
    importance[0], sensitivity[0] = 1, 0
    return Scores(importance, sensitivity, model_signature(model).teacher, sampler_digest(make_sampler("ddim", steps)))


@pytest.fixture(scope="module")
def kitchen(model: DiT) -> Kitchen:
    table = make_sampler("ddim", STEPS)
    return Kitchen(model_signature(model), GUIDANCE, make_scores(model), table, table)


@pytest.fixture
def bench(model: DiT, kitchen: Kitchen, target: TargetRun) -> Bench:
    return Bench(model, kitchen, macs_price, target, 4, ALONE)


class TestTarget:
    def test_it_is_the_full_run_whatever_the_batch(self, model: DiT, target: TargetRun) -> None:
        plan = full_plan(model_signature(model), make_sampler("ddim", STEPS), GUIDANCE)
        again = sample(model, plan, target.x_T, target.labels_B)
        assert (again - target.x_0).norm() < 1e-5 * target.x_0.norm()  # processors round differently

    def test_at_its_own_times_it_is_what_it_passed_through(self, target: TargetRun) -> None:
        for j, t in enumerate(target.times):
            assert torch.equal(target.at(float(t)), target.path_SBCHW[j])
        assert torch.equal(target.at(None), target.x_0)

    def test_between_them_a_cubic_in_log_sigma_over_alpha_is_met(self) -> None:
        from tc_lightning.diffusion.schedule import NoiseSchedule

        schedule = NoiseSchedule()
        times = schedule.timesteps("logsnr", 9)

        def path(t: float) -> torch.Tensor:
            u = np.interp(t, np.arange(1000), schedule.log_ratio)
            return torch.full((1, 1, 1, 1), float(schedule.alpha_sigma(t)[0] * (1 - 0.3 * u + 0.2 * u**2 - 0.05 * u**3)))

        run = TargetRun(times, torch.stack([path(t) for t in times]), torch.zeros(1), path(0.0))
        for t in (950.0, 333.3, 17.5, 1.0):
            assert float(run.at(t)) == pytest.approx(float(path(t)), abs=1e-5)

    def test_outside_its_times_nothing_runs_away(self) -> None:
        from tc_lightning.diffusion.schedule import NoiseSchedule

        schedule, image, eps = NoiseSchedule(), 0.3, -1.2
        times = schedule.timesteps("trailing", 6) - 5.0
        alpha_S, sigma_S = schedule.alpha_sigma(times)
        states = torch.tensor(alpha_S * image + sigma_S * eps, dtype=torch.float32).view(-1, 1, 1, 1, 1)
        run = TargetRun(times, states, torch.zeros(1), torch.full((1, 1, 1, 1), image))
        assert torch.equal(run.at(999.0), run.x_T)
        for t in (100.0, 10.0, 0.0):  # after the last one
            alpha, sigma = schedule.alpha_sigma(t)
            assert float(run.at(t)) == pytest.approx(float(alpha * image + sigma * eps), abs=1e-5)


class TestFit:
    def test_a_run_fitted_to_itself_keeps_its_coefficients(self, model: DiT, target: TargetRun) -> None:
        plan = full_plan(model_signature(model), make_sampler("ddim", STEPS), GUIDANCE)
        fitted = fit_sampler(model, plan, target, 4)
        assert fitted.mse_B.max() < 1e-9 * target.x_0.square().mean()
        for ours, theirs in zip(fitted.plan.sampler.steps, plan.sampler.steps, strict=True):
            assert (ours.next_x, ours.next_m) == pytest.approx((theirs.next_x, theirs.next_m), abs=1e-3)

    def test_the_plan_that_comes_back_is_the_run_that_was_made(self, model: DiT, target: TargetRun) -> None:
        plan = full_plan(model_signature(model), make_sampler("dpmpp_2m", 5, "logsnr"), GUIDANCE)
        fitted = fit_sampler(model, plan, target, 4)
        again = (sample(model, fitted.plan, target.x_T, target.labels_B) - target.x_0).square().flatten(1).mean(1)
        assert torch.allclose(again, fitted.mse_B, rtol=1e-3)
        assert fitted.plan.sampler.name == "dpmpp_2m-fitted"

    def test_it_brings_images_that_it_did_not_see_nearer(self, model: DiT, target: TargetRun) -> None:
        plan = full_plan(model_signature(model), make_sampler("ddim", 5), GUIDANCE)
        before = (sample(model, plan, target.x_T, target.labels_B) - target.x_0).square().flatten(1).mean(1)
        assert fit_sampler(model, plan, target, 4).mse_B[4:].mean() < 0.5 * before[4:].mean()

    def test_images_beyond_the_fit_do_not_matter_to_it(self, model: DiT, target: TargetRun) -> None:
        plan = full_plan(model_signature(model), make_sampler("ddim", 5), GUIDANCE)
        other = dataclasses.replace(target, x_0=torch.cat([target.x_0[:4], -target.x_0[4:]]))
        assert fit_sampler(model, plan, target, 4).plan == fit_sampler(model, plan, other, 4).plan

    def test_all_processes_stop_if_one_has_to(self, model: DiT, target: TargetRun) -> None:
        """The other process's latents are not finite, ours are: without a word from it, we would wait for its sums."""

        def total(values: torch.Tensor) -> torch.Tensor:
            return values + 1 if values.ndim == 0 else 2 * values

        plan = full_plan(model_signature(model), make_sampler("ddim", 5), GUIDANCE)
        with pytest.raises(TokenCacheError, match="at step 0 of a fit"):
            fit_sampler(model, plan, target, 4, ranks=Ranks(0, 2, total))

    def test_a_sampler_that_adds_noise_is_refused(self, model: DiT, target: TargetRun) -> None:
        plan = full_plan(model_signature(model), make_sampler("ddpm", 5), GUIDANCE)
        with pytest.raises(PlanError, match="cannot be fitted"):
            fit_sampler(model, plan, target, 4)


class TestRecipe:
    @pytest.mark.parametrize(
        ("arguments", "places"),
        [
            ((10, 4, 1, 1.0), (0, 3, 6, 9)),
            ((10, 10, 3, 0.5), tuple(range(10))),
            ((12, 5, 3, 1.0), (0, 1, 2, 6, 11)),
            ((9, 1, 3, 1.0), (0,)),
        ],
    )
    def test_spread_by_hand(self, arguments: tuple[int, int, int, float], places: tuple[int, ...]) -> None:
        assert spread(*arguments) == places

    def test_spread_is_always_distinct_steps_from_the_first_on(self) -> None:
        for count in range(1, 21):
            for bend in (0.3, 0.6, 1.0, 1.7):
                places = spread(20, count, 3, bend)
                assert len(set(places)) == count
                assert places == tuple(sorted(places))
                assert places[0] == 0
                assert places[-1] < 20

    def test_a_bend_below_one_is_denser_at_the_end(self) -> None:
        gaps = np.diff(spread(50, 12, 1, 0.5))
        assert gaps[0] > gaps[-1]

    def test_build(self, kitchen: Kitchen) -> None:
        plan = kitchen.build(Recipe("dpmpp_2m", "mix:0.5", 7, (0, 1, 2, 4, 6), PrunedStep("skip", 1), alone=(4,)))
        assert plan.full_steps == [0, 1, 2, 6]
        assert plan.steps[3] == (skip(0, 2, 1),)
        assert [plan.guidance_mode(i).single for i in range(7)] == [i == 4 for i in range(7)]
        assert macs_speedup(plan) == pytest.approx(STEPS / macs_price(plan))

    def test_scores_are_taken_from_the_nearest_time(self, kitchen: Kitchen) -> None:
        plan = kitchen.build(Recipe("ddim", "uniform", STEPS, (0, 1, 2), PrunedStep("partial", 1, 1.0, 0.25)))
        for i in range(3, STEPS):
            best = np.argsort(-kitchen.scores.importance_TLN[i].mean(0), kind="stable")[:4]
            assert set(plan.steps[i][0].tokens) == set(best.tolist())


class TestSearch:
    def test_fill_takes_as_many_full_steps_as_are_paid_for(self) -> None:
        shape = Shape("ddim", "uniform", 2.0)
        recipe = fill(shape, 9.0, lambda r: len(r.full) + 0.1 * (r.num_steps - len(r.full)))
        assert recipe is not None
        assert (len(recipe.full), recipe.num_steps) == (8, 16)  # 8 + 0.8; nine would cost 9.9
        assert fill(shape, 0.5, lambda r: float(len(r.full))) is None

    def test_fill_finds_two_steps_where_one_is_no_recipe(self) -> None:
        recipe = fill(Shape("ddim", "uniform", 1.0), 2.0, lambda r: float(len(r.full)))
        assert recipe is not None
        assert recipe.full == (0, 1)

    def test_where_all_steps_are_full_what_the_others_do_is_one(self) -> None:
        assert len({at_count(Shape("ddim", "uniform", 1.0, PrunedStep("skip", order)), 5) for order in (0, 1, 2)}) == 1

    def test_nothing_to_climb(self, bench: Bench) -> None:
        search = Search(bench, 0.1)
        search.try_shapes(grid(("ddim", "uniform", STEPS)))
        search.climb(3)
        assert not search.trials

    def test_a_run_of_an_unknown_sampler_is_no_recipe(self, bench: Bench) -> None:
        assert bench.cost(Recipe("euler", "uniform", 6, (0, 3), PrunedStep("skip", 1))) == math.inf

    def test_a_fixed_number_of_steps_holds_no_more_full_ones(self) -> None:
        assert at_count(Shape("ddim", "uniform", num_steps=9), 10) is None
        recipe = at_count(Shape("ddim", "uniform", num_steps=9), 4)
        assert recipe is not None
        assert (recipe.num_steps, len(recipe.full)) == (9, 4)

    def test_a_budget_is_not_lost_to_rounding(self, bench: Bench) -> None:
        """28 / 1.12 is 24.999999999999996, and pays for 25 full steps."""
        bench.price = lambda plan: float(len(plan.full_steps))
        search = Search(bench, 28 / 1.12)
        search.try_shapes([Shape("dpmpp_2m", "logsnr")])
        assert [len(recipe.full) for recipe in search.trials] == [25]

    def test_the_kinds_of_recipe(self) -> None:
        for shape, kind in [(next(fewer_steps()), "full"), (next(halves(next(fewer_steps()))), "halves")]:
            recipe = at_count(shape, 9)
            assert recipe is not None
            assert (recipe.kind, len(recipe.full)) == (kind, recipe.num_steps)
        recipe = at_count(next(grid(("ddim", "uniform", STEPS))), 6)
        assert recipe is not None
        assert recipe.kind == "cache"

    def test_every_budget_is_tried_without_skips(self, bench: Bench) -> None:
        search = Search(bench, 7.5)
        search.try_without_skips(forecast_guidance=True)
        assert {trial.recipe.kind for trial in search.trials.values()} == {"full", "halves"}
        assert {r.spacing for r in search.trials if r.kind == "full"} == {shape.spacing for shape in fewer_steps()}
        assert {r.num_steps for r in search.trials if r.kind == "full"} == {7}
        assert all(r.num_steps > 7 for r in search.trials if r.kind == "halves")
        alone = Search(bench, 7.5)
        alone.try_without_skips(forecast_guidance=False)
        assert {trial.recipe.kind for trial in alone.trials.values()} == {"full"}

    def test_neighbours_move_one_step_and_never_the_first(self) -> None:
        recipe = Recipe("ddim", "uniform", 6, (0, 2, 3), PrunedStep("skip", 1), alone=(3,))
        assert {n.full for n in neighbours(recipe)} == {(0, 1, 3), (0, 2, 4)}
        assert {n.alone for n in neighbours(recipe)} == {(3,), (4,)}

    def test_every_trial_is_within_the_budget_and_the_best_is_the_least(self, bench: Bench) -> None:
        search = Search(bench, 5.0)
        search.try_shapes(grid(("ddim", "uniform", STEPS)))
        found = len(search.trials)
        search.try_shapes(list(variations(search.ranking("cache")[0][0], guided=True)))
        search.climb(4)
        assert found < len(search.trials)
        assert all(trial.cost <= 5.0 for trial in search.trials.values())
        assert search.best.error == min(trial.error for trial in search.trials.values()) < math.inf

    def test_climbing_ends_at_a_hill_top(self, bench: Bench) -> None:
        search = Search(bench, 4.0)
        search.try_shapes([Shape("dpmpp_2m", "mix:0.5", 2.0)])
        search.climb(1000)
        top = search.best
        assert all(bench.attempt(move).error >= top.error for move in neighbours(top.recipe) if bench.cost(move) <= 4.0)

    def test_the_clock_as_price(self, bench: Bench) -> None:
        bench.price = ClockPrice(lambda plan: (3.0 * len(plan.full_steps) + 0.6 * (plan.num_steps - len(plan.full_steps)), 3.0))
        assert bench.cost(Recipe("ddim", "uniform", 6, (0, 3), PrunedStep("skip", 1))) == pytest.approx(2.8)

    def test_all_processes_pay_what_the_first_one_measures(self, kitchen: Kitchen) -> None:
        cpu, plan = torch.device("cpu"), kitchen.build(Recipe("ddim", "uniform", 6, (0, 3), PrunedStep("skip", 1)))

        def second(first: float) -> SharedPrice:  # our clock says 7
            return SharedPrice(lambda plan: 7.0, Ranks(1, 2, lambda values: values + first), cpu)

        assert SharedPrice(lambda plan: 7.0, ALONE, cpu)(plan) == 7.0
        assert second(5.0)(plan) == 5.0
        with pytest.raises(RunError, match="first process"):
            second(math.nan)(plan)


class TestRecord:
    def test_trials_are_not_made_twice(self, tmp_path: Path, model: DiT, kitchen: Kitchen, target: TargetRun) -> None:
        recipe = Recipe("ddim", "uniform", 5, (0, 2, 4), PrunedStep("skip", 1))
        first = Bench(model, kitchen, macs_price, target, 4, ALONE, tmp_path / "trials.jsonl").attempt(recipe)
        lines = (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()
        again = Bench(model, kitchen, macs_price, target, 4, ALONE, tmp_path / "trials.jsonl").attempt(recipe)
        assert again == first
        assert (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines() == lines
        assert len(lines) == 1

    def test_another_search_does_not_take_them(self, tmp_path: Path, model: DiT, kitchen: Kitchen, target: TargetRun) -> None:
        recipe = Recipe("ddim", "uniform", 5, (0, 2, 4), PrunedStep("skip", 1))
        for fitted in (4, 5):
            Bench(model, kitchen, macs_price, target, fitted, ALONE, tmp_path / "trials.jsonl").attempt(recipe)
        assert len((tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()) == 2

    def test_processes_of_unequal_shares_remember_under_one_name(self, model: DiT, kitchen: Kitchen, target: TargetRun) -> None:
        """Three images of the fit on two processes: one has one of them, the other two, and both sum to the same."""
        whole = torch.tensor([3.0, 8.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
        benches = [
            Bench(model, kitchen, macs_price, target.part(part), fitted, Ranks(rank, 2, lambda values: whole))
            for rank, (part, fitted) in enumerate([(slice(0, 4), 1), (slice(4, 8), 2)])
        ]
        assert benches[0]._name() == benches[1]._name()

    def test_what_the_first_process_knows_is_known_to_all(self, model: DiT, kitchen: Kitchen, target: TargetRun) -> None:
        answers = iter([1.0, 0.25])  # it knows the recipe; its error

        def total(values: torch.Tensor) -> torch.Tensor:
            return values if values.ndim else torch.tensor(next(answers))

        bench = Bench(model, kitchen, macs_price, target, 4, Ranks(1, 2, total))
        assert bench.attempt(Recipe("ddim", "uniform", 5, (0, 2, 4), PrunedStep("skip", 1))).error == 0.25

    def test_targets_of_equal_times_are_not_confused(self, model: DiT, kitchen: Kitchen, target: TargetRun) -> None:
        other = dataclasses.replace(target, sampler="other")
        assert len({Bench(model, kitchen, macs_price, run, 4, ALONE)._name() for run in (target, other)}) == 2

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
        self, tmp_path: Path, model: DiT, kitchen: Kitchen, target: TargetRun
    ) -> None:
        recipe = Recipe("dpmpp_2m", "mix:0.5", 5, tuple(range(5)), PrunedStep("skip", 1))
        passes: list[int] = []
        benches = [Bench(model, kitchen, macs_price, target, 8, ALONE, tmp_path / "trials.jsonl") for _ in range(3)]
        first = benches[0].refined(recipe, 1, lambda: passes.append(1))
        again = Bench(model, kitchen, macs_price, target, 8, ALONE, tmp_path / "trials.jsonl").refined(
            recipe, 1, lambda: passes.append(1)
        )
        assert again == first
        assert len(passes) == 1
        benches[1].refined(recipe, 2, lambda: passes.append(1))  # more iterations are another thing
        assert len(passes) > 1
        text = (tmp_path / "trials.jsonl").read_text(encoding="utf-8")
        (tmp_path / "trials.jsonl").write_text(text.replace("[[", "[[NaN, "), encoding="utf-8")
        spoilt = Bench(model, kitchen, macs_price, target, 8, ALONE, tmp_path / "trials.jsonl")
        assert spoilt.refined(recipe, 1, lambda: passes.append(1)) == first

    def test_what_was_not_refined_is_not_remembered_as_refined(
        self, tmp_path: Path, model: DiT, kitchen: Kitchen, target: TargetRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For want of memory the sampler stays as it was fitted; with more of it, the same command refines it."""
        recipe = Recipe("dpmpp_2m", "mix:0.5", 5, tuple(range(5)), PrunedStep("skip", 1))
        short = Bench(model, kitchen, macs_price, target, 8, ALONE, tmp_path / "trials.jsonl")
        monkeypatch.setattr(bench_module, "refine_sampler", lambda model, plan, *_: plan)
        fitted = short.refined(recipe, 1, lambda: None)
        monkeypatch.undo()
        again = Bench(model, kitchen, macs_price, target, 8, ALONE, tmp_path / "trials.jsonl").refined(recipe, 1, lambda: None)
        assert again.sampler != fitted.sampler

    def test_refined_coefficients_reach_processes_that_do_not_see_the_file(self) -> None:
        rows, cpu = [[1.0, 2.0], [3.0, 4.0]], torch.device("cpu")
        second = Ranks(1, 2, lambda values: values + torch.tensor(rows, dtype=torch.float64))
        assert second.rows_of_first([[9.0, 9.0], [9.0, 9.0]], (2, 2), cpu) == rows
        assert second.rows_of_first(None, (2, 2), cpu) == rows
        assert ALONE.rows_of_first(rows, (2, 2), cpu) == rows

    def test_a_line_that_was_cut_off_is_passed_over(self, tmp_path: Path) -> None:
        record = TrialRecord(tmp_path / "t", "s")
        record.add("a", 1.0, write=True)
        record.add("b", math.inf, write=True)
        with (tmp_path / "t").open("a", encoding="utf-8") as file:
            file.write('{"search": "s", "reci')
        again = TrialRecord(tmp_path / "t", "s")
        assert (again.get("a"), again.get("b")) == (1.0, math.inf)


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
        table = make_sampler("ddim", STEPS)
        return PlanningContext(
            model_signature(model), table, GUIDANCE, make_scores(model), lambda plan, n: math.nan, table, model=model, folder=folder
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
        run = run_target(model, make_sampler("ddim", STEPS), GUIDANCE, *images(model, [6, 7, 8]), batch=4)
        mse = (sample(model, point.plan, run.x_T, run.labels_B) - run.x_0).square().mean()
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
            PlannerPolicy(8.0).check(model_signature(model), make_sampler("ddim", STEPS))

    def test_a_run_that_adds_noise_is_no_target(self, model: DiT) -> None:
        with pytest.raises(PlanError, match="adds noise"):
            PlannerPolicy(2.0).check(model_signature(model), make_sampler("ddpm", STEPS))
        PlannerPolicy(2.0, "ode", (2.0,)).check(model_signature(model), make_sampler("ddpm", STEPS))

    def test_without_a_model_nothing_can_be_run(self, model: DiT) -> None:
        with pytest.raises(PlanError, match="needs the model"):
            self.SMALL.plan(dataclasses.replace(self.context(model), model=None))


def test_spacings_in_between() -> None:
    low, middle, high = (np.array([row.t for row in make_sampler("ddim", 9, s).steps]) for s in ("logsnr", "mix:0.25", "quadratic"))
    assert np.allclose(middle, 0.75 * low + 0.25 * high)
    with pytest.raises(TokenCacheError, match="mix:W"):
        make_sampler("ddim", 9, "mix:2")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--target-ms", "nan", "--clock", "cpu"], "above 0"),
        (["--target-ms", "3"], "needs --clock"),
        (["--batch", "0"], "--batch is 0"),
        (["--run", "nowhere"], "no run.json"),
    ],
)
def test_bad_arguments_of_the_command(arguments: list[str], what: str) -> None:
    with pytest.raises(RunError, match=what):
        plan_command(["--run", "nowhere", *arguments])


@pytest.mark.parametrize("devices", ["0", "-2", "several"])
def test_devices_that_are_none(devices: str) -> None:
    with pytest.raises(RunError, match=f"--devices {devices} cannot"):
        fabric_of(devices)


def test_a_file_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "front").touch()
    with pytest.raises(FileExistsError) as caught:
        (tmp_path / "front").mkdir(exist_ok=True)
    assert "move away what is there" in str(_user_error(caught.value))


def test_one_process_that_fails_stops_all() -> None:
    cpu = torch.device("cpu")

    def fails() -> int:
        raise TokenCacheError("NaN in our share")

    with pytest.raises(TokenCacheError, match="NaN in our share"):
        ALONE.together(fails, cpu)
    with pytest.raises(TokenCacheError, match="another process failed"):
        Ranks(0, 2, lambda values: values + 1).together(lambda: 3, cpu)
    assert Ranks(0, 2, lambda values: values).together(lambda: 3, cpu) == 3


def test_the_commands_defaults_are_the_planners() -> None:
    args = _parse([])
    assert policy_of(args, args.target_speedup).settings == PlannerPolicy().settings
