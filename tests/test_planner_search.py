"""Recipes and the search among them, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import vp_sampler
from planning import STEPS

from tc_lightning.errors import RunError, TokenCacheError
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.segments import skip
from tc_lightning.planner.price import ClockPrice, SharedPrice, macs_price
from tc_lightning.planner.recipe import Recipe, build_plan, spread
from tc_lightning.planner.search import Search
from tc_lightning.planner.shapes import Shape, at_count, fewer_steps, fill, grid, halves, neighbours, variations
from tc_lightning.planner.trials import TrialRunner
from tc_lightning.policies.pruned_steps import PrunedStep
from tc_lightning.policies.subject import Subject
from tc_lightning.rollout.ranks import ALONE, Ranks


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

    def test_build(self, subject: Subject) -> None:
        plan = build_plan(subject, Recipe("dpmpp_2m", "mix:0.5", 7, (0, 1, 2, 4, 6), PrunedStep("skip", 1), alone=(4,)))
        assert plan.full_steps == [0, 1, 2, 6]
        assert plan.steps[3] == (skip(0, 2, 1),)
        assert [plan.guidance_mode(i).single for i in range(7)] == [i == 4 for i in range(7)]
        assert macs_speedup(plan) == pytest.approx(STEPS / macs_price(plan))

    def test_scores_are_taken_from_the_nearest_time(self, subject: Subject) -> None:
        plan = build_plan(subject, Recipe("ddim", "uniform", STEPS, (0, 1, 2), PrunedStep("partial", 1, 1.0, 0.25)))
        for i in range(3, STEPS):
            best = np.argsort(-subject.scores.importance_TLN[i].mean(0), kind="stable")[:4]
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

    def test_nothing_to_climb(self, bench: TrialRunner) -> None:
        search = Search(bench, 0.1)
        search.try_shapes(grid(("ddim", "uniform", STEPS)))
        search.climb(3)
        assert not search.trials

    def test_a_run_of_an_unknown_sampler_is_no_recipe(self, bench: TrialRunner) -> None:
        assert bench.cost(Recipe("euler", "uniform", 6, (0, 3), PrunedStep("skip", 1))) == math.inf

    def test_a_fixed_number_of_steps_holds_no_more_full_ones(self) -> None:
        assert at_count(Shape("ddim", "uniform", num_steps=9), 10) is None
        recipe = at_count(Shape("ddim", "uniform", num_steps=9), 4)
        assert recipe is not None
        assert (recipe.num_steps, len(recipe.full)) == (9, 4)

    def test_a_budget_is_not_lost_to_rounding(self, bench: TrialRunner) -> None:
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

    def test_every_budget_is_tried_without_skips(self, bench: TrialRunner) -> None:
        search = Search(bench, 7.5)
        search.try_without_skips(forecast_guidance=True)
        assert {trial.recipe.kind for trial in search.trials.values()} == {"full", "halves"}
        assert {r.spacing for r in search.trials if r.kind == "full"} == {shape.spacing for shape in fewer_steps()}
        assert {r.num_steps for r in search.trials if r.kind == "full"} == {7}
        assert all(r.num_steps > 7 for r in search.trials if r.kind == "halves")
        assert len({r.spacing for r in search.trials if r.kind == "halves"}) == 3
        alone = Search(bench, 7.5)
        alone.try_without_skips(forecast_guidance=False)
        assert {trial.recipe.kind for trial in alone.trials.values()} == {"full"}

    def test_neighbours_move_one_step_and_never_the_first(self) -> None:
        recipe = Recipe("ddim", "uniform", 6, (0, 2, 3), PrunedStep("skip", 1), alone=(3,))
        assert {n.full for n in neighbours(recipe)} == {(0, 1, 3), (0, 2, 4)}
        assert {n.alone for n in neighbours(recipe)} == {(3,), (4,)}

    def test_every_trial_is_within_the_budget_and_the_best_is_the_least(self, bench: TrialRunner) -> None:
        search = Search(bench, 5.0)
        search.try_shapes(grid(("ddim", "uniform", STEPS)))
        found = len(search.trials)
        search.try_shapes(list(variations(search.ranking("cache")[0][0], guided=True)))
        search.climb(4)
        assert found < len(search.trials)
        assert all(trial.cost <= 5.0 for trial in search.trials.values())
        assert search.best.error == min(trial.error for trial in search.trials.values()) < math.inf

    def test_climbing_ends_at_a_hill_top(self, bench: TrialRunner) -> None:
        search = Search(bench, 4.0)
        search.try_shapes([Shape("dpmpp_2m", "mix:0.5", 2.0)])
        search.climb(1000)
        top = search.best
        assert all(bench.attempt(move).error >= top.error for move in neighbours(top.recipe) if bench.cost(move) <= 4.0)

    def test_the_clock_as_price(self, bench: TrialRunner) -> None:
        bench.price = ClockPrice(lambda plan: (3.0 * len(plan.full_steps) + 0.6 * (plan.num_steps - len(plan.full_steps)), 3.0))
        assert bench.cost(Recipe("ddim", "uniform", 6, (0, 3), PrunedStep("skip", 1))) == pytest.approx(2.8)

    def test_all_processes_pay_what_the_first_one_measures(self, subject: Subject) -> None:
        cpu, plan = torch.device("cpu"), build_plan(subject, Recipe("ddim", "uniform", 6, (0, 3), PrunedStep("skip", 1)))

        def second(first: float) -> SharedPrice:  # our clock says 7
            return SharedPrice(lambda plan: 7.0, Ranks(1, 2, lambda values: values + first), cpu)

        assert SharedPrice(lambda plan: 7.0, ALONE, cpu)(plan) == 7.0
        assert second(5.0)(plan) == 5.0
        with pytest.raises(RunError, match="first process"):
            second(math.nan)(plan)


def test_spacings_in_between() -> None:
    low, middle, high = (np.array([row.t for row in vp_sampler("ddim", 9, s).steps]) for s in ("logsnr", "mix:0.25", "quadratic"))
    assert np.allclose(middle, 0.75 * low + 0.25 * high)
    with pytest.raises(TokenCacheError, match="mix:W"):
        vp_sampler("ddim", 9, "mix:2")
