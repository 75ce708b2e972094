"""Policies with a published recipe: what papers and code state, on the shape of DiT-XL/2."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import vp_sampler
from recipes import XL, published, some_scores, xl_context

from tc_lightning.errors import PlanError
from tc_lightning.measure.calibration import Calibration
from tc_lightning.measure.scores import Scores
from tc_lightning.plan.costs import macs_speedup, plan_macs
from tc_lightning.plan.segments import BRANCHES, compute, partial, reuse, skip
from tc_lightning.policies.delta_dit import DeltaDiTPolicy
from tc_lightning.policies.dp_placement import interval_costs, place_full_steps
from tc_lightning.policies.feb_cache import EBCachePolicy, FEBCachePolicy
from tc_lightning.policies.fora import FORAPolicy
from tc_lightning.policies.smoothcache import SmoothCachePolicy, smooth_schedule
from tc_lightning.policies.targeted import largest
from tc_lightning.policies.taylorseer import TaylorSeerPolicy
from tc_lightning.policies.toca import ToCaPolicy, toca_full_steps, toca_tokens
from tc_lightning.policies.tokencache_v1 import TokenCacheV1Policy
from tc_lightning.policies.whole_steps import affordable_interval, interval_steps

# Where full steps stand


@pytest.mark.parametrize(
    ("interval", "warmup", "full"),
    [
        (3, 1, [0, 3, 6, 9]),
        (4, 2, [0, 1, 5, 9]),
        (2.5, 1, [0, 2, 5, 7]),
        (1, 1, list(range(10))),
        (20, 3, [0, 1, 2]),
        (2, 20, list(range(10))),
    ],
)
def test_interval_steps(interval: float, warmup: int, full: list[int]):
    assert interval_steps(10, interval, warmup) == full


@pytest.mark.parametrize("warmup", [1, 2, 3])
def test_every_number_of_full_steps_has_its_interval(warmup: int):
    for count in range(warmup, 51):
        assert len(interval_steps(50, affordable_interval(50, count, warmup), warmup)) == count


def test_largest():
    assert largest(float, 0, 9, 4.5) == 4
    assert largest(float, 0, 9, 20.0) == 9
    assert largest(float, 3, 9, 2.0) is None


# What is published


def test_fora_reuses_two_thirds_at_interval_3():
    plan = published(FORAPolicy())
    assert plan.full_steps == list(range(0, 50, 3))
    assert {plan.steps[i] for i in (1, 2, 49)} == {(reuse(0, 28, BRANCHES),)}
    assert macs_speedup(plan) == pytest.approx(50 / 17, rel=5e-3)


@pytest.mark.parametrize(("interval", "stated"), [(3, 2.77), (5, 4.53)])
def test_taylorseer_costs_what_its_paper_states(interval: int, stated: float):
    plan = published(TaylorSeerPolicy(interval=interval, orders=(2,)))
    assert plan.full_steps == [0, *range(1, 50, interval)]
    assert plan.steps[2] == (skip(0, 28, 2),)
    assert macs_speedup(plan) == pytest.approx(stated, rel=5e-3)


def test_delta_dit_costs_what_its_paper_states():
    plan = published(DeltaDiTPolicy(), 20)
    assert plan.full_steps == list(range(0, 20, 2))
    assert {plan.steps[i] for i in range(1, 8, 2)} == {(compute(0, 7), skip(7, 28))}
    assert {plan.steps[i] for i in range(9, 20, 2)} == {(skip(0, 21), compute(21, 28))}
    assert macs_speedup(plan) == pytest.approx(1.6, rel=5e-3)


def test_eb_cache_costs_what_its_paper_states():
    plan = published(EBCachePolicy())
    assert {plan.steps[i] for i in range(25) if i % 3} == {(reuse(0, 28, ("mlp",)),)}
    assert {plan.steps[i] for i in range(25, 50) if i % 3} == {(reuse(0, 28, ("attn",)),)}
    assert macs_speedup(plan) == pytest.approx(1.49, rel=5e-3)


def test_feb_cache_has_two_tables():
    steps = published(FEBCachePolicy(short=2, long=6), 12).steps
    full, both, mlp, attn = (compute(0, 28),), *((reuse(0, 28, r),) for r in (BRANCHES, ("mlp",), ("attn",)))
    assert list(steps) == [full, both, mlp, both, mlp, both, full, both, attn, both, attn, both]


def test_exposure_bias_is_corrected_if_that_helps():
    context = xl_context(11)
    choice = EBCachePolicy().plan(context)
    assert [row["eps_scale"] for row in choice.candidates] == [None, [0.98, 0.96]]
    assert choice.plan.eps_scale == ()
    corrected = EBCachePolicy().plan(dataclasses.replace(context, evaluate=lambda plan, images: 1.0 - bool(plan.eps_scale))).plan
    assert corrected.eps_scale == pytest.approx(np.linspace(0.98, 0.96, 11))
    assert corrected.steps == choice.plan.steps


def test_toca_schedule_and_shares_are_those_of_its_code():
    # left = 49, 48, 42, 40, 35, 30, 28, 24, 20, 16, 15, 12, 9, 6, 3, 0 steps before the end
    assert toca_full_steps(50, 4) == [0, 1, 7, 9, 14, 19, 21, 25, 29, 33, 34, 37, 40, 43, 46, 49]
    assert toca_tokens(XL, 50, 0.07, step=49, block=0) == round(0.07 * 2.5 * 1.4 * 1.8 * 256)
    assert toca_tokens(XL, 50, 0.07, step=24, block=27) == round(0.07 * 2.5 * 1.0 * 0.2 * 256)
    counts = [toca_tokens(XL, 50, 0.07, i, b) for i in range(50) for b in range(28)]  # evenly weighed, the factors cancel
    assert np.mean(counts) / 256 == pytest.approx(0.07 * 2.5, rel=0.02)
    three, four = (macs_speedup(published(ToCaPolicy(interval=n))) for n in (3, 4))
    assert three < 2.32 < four  # published for 50 steps, with an interval that is not


def test_toca_takes_the_tokens_of_highest_importance():
    plan, scores = published(ToCaPolicy()), some_scores(XL, vp_sampler("ddim", 50))
    for block in (0, 13):
        segment = plan.steps[2][block]
        kept = toca_tokens(XL, 50, 0.07, 2, block)
        expected = tuple(sorted(np.argsort(-scores.importance_TLN[2, block], kind="stable")[:kept].tolist()))
        assert segment == partial(block, block + 1, expected, 0, ("mlp",))
    everything = published(ToCaPolicy(ratio=1.0))
    assert everything.steps[2][0] == reuse(0, 1, ("attn",))
    nothing = published(ToCaPolicy(ratio=0.0))
    assert set(nothing.steps[2]) == {reuse(b, b + 1, BRANCHES) for b in range(28)}


PUBLISHED_018 = [0, 4, 7, 10, *range(12, 49, 2), 49]  # SmoothCache's schedule for DiT-XL/2, 50 steps, threshold 0.18, at most 3


def test_smoothcache_makes_its_published_schedule_of_changes_that_lead_to_it():
    rate = np.array([0.06] * 4 + [0.08] * 7 + [0.1] * 39)
    drift_TG = rate[:, None] * np.arange(1, 4)
    assert smooth_schedule(drift_TG, 0.18, 3) == PUBLISHED_018
    plan = SmoothCachePolicy().plan(xl_context(drift_TG2=np.stack([drift_TG, 2 * drift_TG], -1))).plan
    mlp = smooth_schedule(2 * drift_TG, 0.18, 3)
    reused = {i: tuple(b for b, steps in zip(BRANCHES, (PUBLISHED_018, mlp), strict=True) if i not in steps) for i in range(50)}
    assert plan.steps == tuple((reuse(0, 28, r),) if r else (compute(0, 28),) for r in reused.values())


def test_smoothcache_looks_at_the_last_step_of_a_reuse_alone():
    drift_TG = np.ones((6, 2))
    drift_TG[2, 1] = 0.1  # step 2 is close to step 0, though step 1 is not
    assert smooth_schedule(drift_TG, 0.1, 2) == [0, 3, 4, 5]
    assert smooth_schedule(drift_TG, 0.1, 1) == [0, 1, 2, 3, 4, 5]


def test_smoothcache_takes_the_threshold_that_uses_the_budget():
    drift_TG2 = np.random.default_rng(0).random((12, 6, 2))
    context = xl_context(drift_TG2=drift_TG2)
    plan = SmoothCachePolicy(1.8).plan(context).plan
    all_plans = [SmoothCachePolicy(threshold=float(t)).plan(context).plan for t in np.unique(drift_TG2[:, :3])]
    assert plan_macs(plan) == max(plan_macs(p) for p in all_plans if macs_speedup(p) >= 1.8)
    assert SmoothCachePolicy(3.7).plan(context).candidates[0]["max_gap"] > 3


# Dynamic programming


@pytest.mark.parametrize(("order", "sums"), itertools.product((0, 1, 2), ("independent", "coherent")))
def test_dp_finds_what_trying_every_placement_finds(order: int, sums: str):
    T, G, count = 9, 3, 4
    rng = np.random.default_rng(order)
    error = rng.random((T, G, G, 3))
    error[:, :, :] = np.where(
        np.arange(T)[:, None, None, None] == np.arange(1, G + 1)[:, None, None], error[:, :, :1], error
    )  # one source
    calibration = Calibration(np.ones((T, G, 2, 2)), error, rng.random(T), "", "")

    def cost(full: tuple[int, ...]) -> float:
        total, spacing = 0.0, 1
        for a, b in itertools.pairwise((*full, T)):
            if b - a > G + 1:
                return float("inf")
            errors = [error[i, i - a - 1, min(spacing, G) - 1, order] * calibration.effect_T[i] for i in range(a + 1, b)]
            total += sum(errors) if sums == "independent" else sum(e**0.5 for e in errors) ** 2
            spacing = b - a
        return total

    best = min(((0, *rest) for rest in itertools.combinations(range(1, T), count - 1)), key=cost)
    assert cost(tuple(place_full_steps(interval_costs(calibration, order, sums), count))) == pytest.approx(cost(best))


def test_dp_is_dense_where_errors_matter_and_needs_enough_full_steps():
    effect = np.array([0.0] * 6 + [1.0] * 6)
    calibration = Calibration(np.ones((12, 5, 1, 2)), np.ones((12, 5, 5, 3)), effect, "", "")
    costs = interval_costs(calibration, 0, "independent")
    placed = place_full_steps(costs, 7)
    assert placed == [0, 6, 7, 8, 9, 10, 11]
    assert place_full_steps(costs, 12) == list(range(12))
    with pytest.raises(PlanError, match="1 full steps of 12 would be more than 6 apart"):
        place_full_steps(costs, 1)


# TokenCache v1


def test_tokencache_v1_follows_the_predictor():
    context = xl_context()
    importance = np.array(context.scores.importance_TLN)
    importance[:25, 20:27] *= 0.01  # the seven least important blocks of the first phase
    importance[25:, 0:7] *= 0.01
    scores = Scores(importance, context.scores.sensitivity_TL2, XL.teacher, context.scores.sampler)
    plan = TokenCacheV1Policy(token_share=0.25).plan(dataclasses.replace(context, scores=scores)).plan
    assert plan.full_steps == [*range(0, 25, 4), *range(25, 50, 3)]
    tokens = np.argsort(-scores.importance_TLN[2, :20].mean(0), kind="stable")[:64]
    assert plan.steps[2][0] == partial(0, 20, tuple(sorted(tokens.tolist())), kv_order=2)
    assert plan.steps[2][1:] == (skip(20, 27), plan.steps[2][2])
    assert [(s.mode, s.start, s.stop) for s in plan.steps[26]] == [("skip", 0, 7), ("partial", 7, 28)]
