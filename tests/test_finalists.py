"""Who wins a budget: by hand on made-up errors, and through the planner on a tiny teacher."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FULL, VP, make_plan, make_teacher, vp_sampler

from tc_lightning.errors import PlanError
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.conditions import Given
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import skip
from tc_lightning.planner import trials as bench
from tc_lightning.planner.finalists import CacheUse, Finalist, best_without_cache, choose, finalist_recipes
from tc_lightning.planner.front import write_front
from tc_lightning.planner.image_choice import SEED
from tc_lightning.planner.policy import PlannerPolicy
from tc_lightning.planner.recipe import Recipe, build_plan
from tc_lightning.planner.run import Choice, PlannerRun
from tc_lightning.planner.search import Search
from tc_lightning.planner.target import TargetRun
from tc_lightning.planner.trials import Trial
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.pruned_steps import PrunedStep
from tc_lightning.rollout.sampling import labels_for, model_signature, reference_plan

GUIDANCE, SKIP = Guidance(1.5, 3), PrunedStep("skip", 1)
STEPS = 12
ALL: dict[str, Any] = {"solver": "dpmpp_2m", "spacing": "logsnr", "num_steps": 4, "full": (0, 1, 2, 3), "pruned": SKIP}
TEACHER = make_teacher(depth=2)
PLANS = {
    "full": make_plan(make_teacher(), (FULL,) * 4),
    "halves": make_plan(make_teacher(), (FULL,) * 4, modes="bbb2"),
    "skips": make_plan(make_teacher(), (FULL, FULL, (skip(0, 4, 1),), FULL)),
}


def finalist(name: str, *errors: float, weights: tuple[float, ...] = ()) -> Finalist:
    alone = (3,) if name == "halves" else ()
    recipe = Recipe("dpmpp_2m", name, 4, (0, 1, 2, 3), PrunedStep("skip", 1), alone)
    weights_B = torch.tensor(weights or (1.0,) * len(errors), dtype=torch.float64)
    return Finalist(recipe, PLANS[name], torch.tensor(errors, dtype=torch.float64), weights_B)


class TestChoose:
    def test_a_clear_difference_decides(self) -> None:
        full, halves = finalist("full", 3.0, 4.0, 5.0), finalist("halves", 2.0, 3.1, 4.0)
        assert choose([full, halves], "auto") is halves
        assert choose([halves, full], "auto") is halves

    def test_of_equals_the_simplest(self) -> None:
        """Differences 2, -1, 0: mean 1/3, standard error sqrt(7/9)."""
        full, skips = finalist("full", 5.0, 3.0, 4.0), finalist("skips", 3.0, 4.0, 4.0)
        assert full.error > skips.error
        assert choose([skips, full], "auto") is full

    def test_one_image_does_not_decide(self) -> None:
        full, skips = finalist("full", 1.0, 1.0, 1.0, 100.0), finalist("skips", 1.0, 1.0, 1.0, 1.0)
        assert choose([skips, full], "auto") is full

    def test_twice_the_error_on_most_images_decides_however_unlike_they_are(self) -> None:
        """Differences 1, 3, 30 and -20, with a standard error three times their mean: one image would hide the others."""
        full, halves = finalist("full", 2.0, 6.0, 60.0, 380.0), finalist("halves", 1.0, 3.0, 30.0, 400.0)
        assert choose([full, halves], "auto") is halves

    def test_a_plan_that_is_better_on_most_images_but_not_in_the_mean_is_not_taken(self) -> None:
        full, skips = finalist("full", 1.0, 1.0, 1.0, 1.0), finalist("skips", 0.5, 0.5, 0.5, 40.0)
        assert skips.error > full.error
        assert choose([full, skips], "auto") is full

    def test_a_difference_within_two_standard_errors_is_none(self) -> None:
        """Logarithms of the ratio log 2, log 2, 0, 0: their mean is sqrt(3) standard errors, though the error is larger in all."""
        full, halves = finalist("full", 2.0, 2.0, 1.0, 1.0), finalist("halves", 1.0, 1.0, 1.0, 1.0)
        assert full.error > halves.error
        assert not full.worse_than(halves)
        assert choose([full, halves], "auto") is full

    def test_images_count_by_their_weights(self) -> None:
        full_errors, skips_errors, weights = (3.0, 1.0, 1.0), (1.0, 3.0, 3.0), (1.0, 9.0, 9.0)
        full, skips = finalist("full", *full_errors, weights=weights), finalist("skips", *skips_errors, weights=weights)
        assert choose([skips, full], "auto") is full
        assert skips.worse_than(full)

    def test_fewer_programs_then_less_memory(self) -> None:
        halves, skips = finalist("halves", 1.0, 2.0), finalist("skips", 1.0, 2.0)
        assert finalist("full", 1.0).simplicity < halves.simplicity < skips.simplicity
        assert choose([skips, halves], "keep") is halves

    @pytest.mark.parametrize(("use", "name"), [("keep", "halves"), ("none", "full"), ("auto", "full")])
    def test_what_was_asked_for(self, use: CacheUse, name: str) -> None:
        ones = [finalist("full", 1.0, 1.0), finalist("halves", 2.0, 2.5), finalist("skips", 3.0, 3.5)]
        assert choose(ones, use).recipe.spacing == name

    def test_nothing_of_what_was_asked_for(self) -> None:
        with pytest.raises(PlanError, match="no plan with a cache was found"):
            choose([finalist("full", 1.0)], "keep")
        with pytest.raises(PlanError, match="no plan without a cache was found"):
            choose([finalist("skips", 1.0)], "none")

    def test_nan_loses(self) -> None:
        full, skips = finalist("full", 1.0, math.inf), finalist("skips", 9.0, 9.0)
        assert choose([full, skips], "auto") is skips

    def test_what_has_to_be_beaten(self) -> None:
        worse, better = finalist("full", 2.0), finalist("full", 1.0)
        assert best_without_cache([finalist("skips", 0.1), worse, better]) is better
        assert best_without_cache([finalist("skips", 0.1)]) is None


class TestFinalistRecipes:
    @pytest.mark.parametrize(
        ("errors", "use", "found"),
        [
            ({"full": 9.0, "halves": 1.0, "cache": 2.0}, "auto", ["full", "halves"]),
            ({"full": 9.0, "halves": 1.0, "cache": 0.5}, "keep", ["full", "halves", "cache"]),
            ({"full": 9.0, "halves": math.inf, "cache": 2.0}, "auto", ["full", "cache"]),
            ({"full": 9.0, "cache": 2.0}, "auto", ["full", "cache"]),
            ({"full": 9.0, "halves": 1.0, "cache": 0.5}, "none", ["full"]),
        ],
    )
    def test_skips_only_where_halves_did_no_better(self, errors: dict[str, float], use: CacheUse, found: list[str]) -> None:
        halves = ALL | {"alone": (3,)}
        recipes = {"full": Recipe(**ALL), "halves": Recipe(**halves), "cache": Recipe(**ALL | {"full": (0, 1, 3)})}
        search = Search(PlannerRun(policy("auto").settings, context()).bench, 4.0)
        search.trials = {recipes[kind]: Trial(recipes[kind], 4.0, error) for kind, error in errors.items()}
        assert [recipe.kind for recipe in finalist_recipes(search, use)] == found


def scores(model: DiT) -> Scores:
    L, N = model.config.depth, model.config.num_tokens
    importance, sensitivity = np.linspace(0, 1, STEPS * L * N).reshape(STEPS, L, N), np.ones((STEPS, L, 2))
    importance[0], sensitivity[0] = 1, 0
    return Scores(importance, sensitivity, model_signature(model).teacher, sampler_digest(vp_sampler("ddim", STEPS)))


def context(folder: Path | None = None) -> PlanningContext:
    table = vp_sampler("ddim", STEPS)
    what = (model_signature(TEACHER), VP, table, GUIDANCE, scores(TEACHER), table, lambda plan, n: math.nan)
    return PlanningContext(*what, model=TEACHER, folder=folder)


def policy(use: CacheUse, speedup: float = 2.0, front: tuple[float, ...] = (1.5,)) -> PlannerPolicy:
    return PlannerPolicy(speedup, "reference", front, 6, 2, use, 2, 2, 3, 3, 0, 1, progress=False)


class TestPlanner:
    def test_a_budget_that_shares_its_plan_with_a_later_one_keeps_it(self) -> None:
        """Budgets 2.5, 2 and 3, of which the first and the last end on one recipe: the plan of 2.5 is the run's own, not that of 2."""
        c = context()
        settings = policy("auto", 2.5, (2.0, 3.0)).settings
        run = PlannerRun(settings, c)
        subject = run.bench.subject
        shared, other = (
            Finalist(r, build_plan(subject, r), torch.ones(3), torch.ones(3))
            for r in (Recipe("dpmpp_2m", "logsnr", n, tuple(range(n)), PrunedStep("skip", 1)) for n in (4, 6))
        )
        points = run.points(
            {2.5: Choice(shared, None, [shared]), 2.0: Choice(other, None, [other]), 3.0: Choice(shared, None, [shared])}
        )
        assert [(point.plan, point.budgets, point.chosen) for point in points] == [
            (shared.plan, (2.5, 3.0), True),
            (other.plan, (2.0,), False),
        ]

    def test_one_run_with_two_rivals_is_one_plan_of_the_front(self) -> None:
        """A recipe that wins two budgets has a rival in each; and a plan without a cache is no rival of another budget beside that."""
        c = context()
        run = PlannerRun(policy("auto", 2.5, (2.0,)).settings, c)
        subject, ones = run.bench.subject, torch.ones(3)
        skips = Recipe("dpmpp_2m", "logsnr", 8, (0, 1, 2, 5), PrunedStep("skip", 1))
        winner = Finalist(skips, build_plan(subject, skips), ones, ones)
        few, more = (
            Finalist(r, build_plan(subject, r), ones, ones)
            for r in (Recipe("dpmpp_2m", "logsnr", n, tuple(range(n)), SKIP) for n in (4, 6))
        )
        points = run.points({2.5: Choice(winner, few, []), 2.0: Choice(winner, more, [])})
        assert [(p.role, p.budgets, p.chosen) for p in points] == [
            ("planned", (2.5, 2.0), True),
            ("fewer steps", (2.5,), False),
            ("fewer steps", (2.0,), False),
        ]
        assert points[0].plan.fewer_steps == few.plan.sampler
        points = run.points({2.5: Choice(winner, few, []), 2.0: Choice(few, few, [])})
        assert [(p.role, p.budgets) for p in points] == [("planned", (2.5,)), ("planned", (2.0,))]

    def test_finalists_are_refined_once_and_compared_in_every_budget_that_pays_for_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        passes: list[dict[str, Any]] = []
        real = bench.refine_sampler

        def refine(model: DiT, plan: CachePlan, target: TargetRun, iterations: int, *more: Any, **named: Any) -> CachePlan:
            passes.extend([plan.provenance["arguments"]] * (iterations > 0))
            return real(model, plan, target, iterations, *more, **named)

        monkeypatch.setattr(bench, "refine_sampler", refine)
        run = PlannerRun(policy("auto").settings, context())
        searches = run.searches()
        choices = run.finish(searches)
        recipes = {recipe for search in searches.values() for recipe in finalist_recipes(search, "auto")}
        assert all(passes.count(recipe.to_json()) == 1 for recipe in recipes)
        assert len(passes) == len(recipes)
        for speedup, choice in choices.items():
            assert {one.recipe for one in choice.finalists} == {r for r in recipes if run.bench.cost(r) <= searches[speedup].budget}
            assert all(torch.isfinite(one.errors_B).all() for one in choice.finalists)

    @pytest.mark.parametrize("use", ["auto", "keep", "none"])
    def test_plan_json_is_what_the_table_calls_chosen(self, use: CacheUse, tmp_path: Path) -> None:
        choice = policy(use).plan(context(tmp_path))
        chosen = [row for row in choice.candidates if row["chosen"] and row["speedup"] == 2.0]
        assert len(chosen) == 1
        arguments = choice.plan.provenance["arguments"]
        assert (chosen[0]["spacing"], chosen[0]["steps"]) == (arguments["spacing"], arguments["num_steps"])
        assert chosen[0]["compared_error"] is not None
        assert macs_speedup(choice.plan) >= 2.0
        assert [p.plan for p in choice.front if p.chosen] == [choice.plan]
        if use != "auto":
            assert all(p.plan.caches == (use == "keep") for p in choice.front if p.role == "planned")
        if use == "none":
            assert {row["alone"] for row in choice.candidates} == {0}
            assert all(row["steps"] == row["full_steps"] for row in choice.candidates)

    def test_a_plan_with_a_cache_names_what_it_has_to_beat(self, tmp_path: Path) -> None:
        choice = policy("keep").plan(context())
        for point in choice.front:
            if point.role == "planned":
                fewer = point.plan.fewer_steps
                assert fewer is not None
                assert fewer.name.endswith("-fitted")
                assert len(fewer) <= STEPS / min(point.budgets)
            else:
                assert not point.plan.caches
                assert point.plan.fewer_steps is None
        fewer_steps = [point.plan.sampler for point in choice.front if point.role == "fewer steps"]
        assert all(point.plan.fewer_steps in fewer_steps for point in choice.front if point.role == "planned")
        write_front(choice.front, tmp_path)
        rows = json.loads((tmp_path / "front" / "front.json").read_text(encoding="utf-8"))
        assert {row["role"] for row in rows} == {"planned", "fewer steps"}
        assert sum(row["chosen"] for row in rows) == 1

    def test_every_plan_of_a_front_replaces_the_users_own_run(self) -> None:
        """Native steps included, on which a fitted sampler once took the place of the run that it was to reproduce."""
        table = vp_sampler("ddim", STEPS)
        c = context()
        run = PlannerRun(policy("auto").settings, c)
        native = Recipe("ddim", "uniform", STEPS, (0, 1, 2, 4, 6, 8, 10, 11), PrunedStep("skip", 1))
        fitted = run.bench.fit(native).plan
        assert fitted.sampler != table
        for plan in (fitted, *(point.plan for point in policy("auto").plan(context()).front)):
            assert plan.reference == table
            assert reference_plan(plan).sampler == table
            assert macs_speedup(plan) == pytest.approx(STEPS / run.settings.price(plan))

    def test_finalists_are_compared_on_images_that_nothing_was_fitted_on(self) -> None:
        c = context()
        settings = dataclasses.replace(policy("auto").settings, pool_images=24, fit_images=3, judge_images=3, choice_images=6)
        run = PlannerRun(settings, c)
        noise = run.target.x_T.flatten(1)
        assert (run.fitted, run.judged, run.compared, len(noise)) == (3, 6, 12, 15)
        assert len({tuple(row.tolist()) for row in noise}) == len(noise)

    def test_what_the_coefficients_were_fitted_on_is_said(self) -> None:
        fit = policy("none").plan(context()).plan.provenance["fit"]
        assert fit == {"target": "reference", "guidance": 1.5, "images": 4, "labels": labels_for(SEED, range(4), 5).unique().tolist()}

    def test_an_unknown_use_is_refused(self) -> None:
        with pytest.raises(PlanError, match="auto, keep, none"):
            PlannerPolicy(cache="always")  # type: ignore[arg-type]


def test_a_search_of_other_code_is_another_search(monkeypatch: pytest.MonkeyPatch) -> None:
    from tc_lightning.planner import trials as bench

    c = context()
    run = PlannerRun(policy("none").settings, c)
    names = {run.bench._name()}
    monkeypatch.setattr(bench, "code_digest", lambda: "another version")
    names.add(run.bench._name())
    monkeypatch.setattr(
        run.bench,
        "target",
        dataclasses.replace(run.bench.target, given=Given({name: value.flip(0) for name, value in run.bench.target.given.items()})),
    )
    names.add(run.bench._name())
    assert len(names) == 3


def test_a_planned_file_reads_back(tmp_path: Path) -> None:
    plan = policy("keep").plan(context()).plan
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan
