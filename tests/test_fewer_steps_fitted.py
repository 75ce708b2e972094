"""Fewer steps with a fitted sampler: the row that caches have to beat, and how far its coefficients carry."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_teacher, vp_sampler

from export.benchmark_fit import GUIDANCE_SCALES, FitBench, table
from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.guidance import Guidance
from tc_lightning.planner import fitted_fewer_steps as module
from tc_lightning.planner.fitted_fewer_steps import FIT, JUDGE, fitted_fewer_steps
from tc_lightning.planner.image_choice import images
from tc_lightning.planner.shapes import Shape
from tc_lightning.rollout.evaluation import RolloutEvaluator
from tc_lightning.rollout.sampling import full_plan, model_signature, sample

MODEL = make_teacher(depth=2)
REFERENCE = full_plan(model_signature(MODEL), vp_sampler("ddim", 12), Guidance(1.5, 3))


@pytest.fixture(scope="module")
def fitted() -> CachePlan:
    return fitted_fewer_steps(MODEL, REFERENCE, 5)


def test_it_is_full_compute_in_place_of_the_reference_run(fitted: CachePlan) -> None:
    assert (fitted.caches, fitted.num_steps, fitted.reference) == (False, 5, REFERENCE.sampler)
    assert macs_speedup(fitted) == pytest.approx(12 / 5)
    assert fitted.in_words == "no cache: 5 full steps with a fitted sampler (dpmpp_2m-fitted)"
    assert fitted.provenance["fit"]["images"] == FIT + JUDGE


def test_it_comes_nearer_than_published_coefficients_on_images_it_did_not_see(fitted: CachePlan) -> None:
    noise = images(MODEL, list(range(100, 108)))
    evaluate = RolloutEvaluator(MODEL, *noise, sample(MODEL, REFERENCE, *noise))
    plain = [full_plan(REFERENCE.model, vp_sampler("dpmpp_2m", 5, s), REFERENCE.guidance) for s in ("logsnr", "quadratic")]
    assert evaluate(fitted) < min(evaluate(plan) for plan in plain)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(PlanError, match="at least 2"):
        fitted_fewer_steps(MODEL, REFERENCE, 1)
    noisy = dataclasses.replace(REFERENCE, reference=vp_sampler("ddpm", 12))
    with pytest.raises(PlanError, match="adds noise"):
        fitted_fewer_steps(MODEL, noisy, 5)


def test_a_spacing_that_diverges_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.fit_sampler

    def fit(model: Any, plan: CachePlan, *more: Any) -> Any:
        if plan.sampler.spacing != "quadratic":
            raise TokenCacheError("latents became NaN")
        return real(model, plan, *more)

    monkeypatch.setattr(module, "fit_sampler", fit)
    assert fitted_fewer_steps(MODEL, REFERENCE, 4).sampler.spacing == "quadratic"
    monkeypatch.setattr(module, "fewer_steps", lambda: iter([Shape("dpmpp_2m", "logsnr")]))
    with pytest.raises(TokenCacheError, match="at every spacing"):
        fitted_fewer_steps(MODEL, REFERENCE, 4)


@pytest.mark.parametrize(("speedup", "count"), [(1.0, 8), (12.0, 8), (2.4, 1)])
def test_what_leaves_nothing_to_fit(speedup: float, count: int) -> None:
    loaded: Any = SimpleNamespace(model=MODEL, plan=REFERENCE)
    with pytest.raises(TokenCacheError, match="at least 2 steps"):
        FitBench(loaded, speedup, count, 3)


def test_how_far_coefficients_carry() -> None:
    """A line for every guidance scale, two for the classes that were left out, two for other numbers of images."""
    loaded: Any = SimpleNamespace(model=MODEL, plan=REFERENCE)
    bench = FitBench(loaded, speedup=2.4, fit_images=4, test_images=3)
    rows = list(bench.rows())
    assert len(rows) == len(GUIDANCE_SCALES) + 4
    assert all(len(row.fitted_B) == len(row.plain_B) == 3 for row in rows)
    assert [row.where for row in rows if "fitted at it" in row.where] == ["guidance 1.5 (fitted at it)"]
    assert table(rows).count("\n") == len(rows) + 1
    assert torch.isfinite(torch.cat([row.plain_B for row in rows])).all()
    low = bench.target(0, 6, 1.5, lambda labels_B: labels_B < 2)
    assert low.given.images == 6
    assert low.given["label"].max() < 2
