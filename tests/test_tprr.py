from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import VP, vp_sampler

from tc_lightning.errors import PlanError
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import block_macs, full_step_macs, macs_speedup, plan_macs, step_macs
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, partial, reuse, skip
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.choice import PlanChoice
from tc_lightning.policies.pruned_steps import KINDS, PrunedStep, best_edges, best_window, top_tokens
from tc_lightning.policies.tprr import Rounds, TPRRPolicy, tprr_plan
from tc_lightning.rollout.evaluation import RolloutEvaluator
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample

CONFIG = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=4, num_heads=2, num_classes=5, learn_sigma=False)
L, N, T = 4, 16, 10
GUIDANCE = Guidance(1.5, 1)
SAMPLER = vp_sampler("ddim", T)
MODEL = randomise_(DiT(CONFIG), seed=0, std=0.1).eval()
SIGNATURE = model_signature(MODEL)


def make_scores(seed: int = 0, sensitivity_L2: np.ndarray | None = None) -> Scores:
    rng = np.random.default_rng(seed)
    importance, sensitivity = rng.random((T, L, N)), rng.random((T, L, 2)) if sensitivity_L2 is None else [sensitivity_L2] * T
    importance[0], sensitivity = 1.0, np.array(sensitivity)
    sensitivity[0] = 0.0
    return Scores(importance, sensitivity, SIGNATURE.teacher, sampler_digest(SAMPLER))


@pytest.fixture(scope="module")
def evaluator() -> RolloutEvaluator:
    x_T, labels = noise_for(0, range(6), MODEL), torch.arange(6) % 5
    return RolloutEvaluator(MODEL, x_T, labels, sample(MODEL, full_plan(SIGNATURE, SAMPLER, GUIDANCE), x_T, labels))


@pytest.fixture(scope="module")
def context(evaluator: RolloutEvaluator) -> PlanningContext:
    return PlanningContext(SIGNATURE, VP, SAMPLER, GUIDANCE, make_scores(), SAMPLER, evaluator)


def policy(target: float = 2.0, **arguments: object) -> TPRRPolicy:
    return TPRRPolicy(target, **{"screen_images": 2, "max_candidates": 24, "finalists": 4, "progress": False, **arguments})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def choice(context: PlanningContext) -> PlanChoice:
    return policy().plan(context)


@pytest.mark.parametrize(
    ("rounds", "full"),
    [
        (Rounds(4, 4, 2), [0, 4, 6, 8]),
        (Rounds(6, 3, 2), [0, 3, 6, 8]),
        (Rounds(5, 4, 2), [0, 4, 5, 7, 9]),  # a phase starts with an I-step, even where a round is cut short
        (Rounds(0, 5, 3), [0, 3, 6, 9]),
        (Rounds(10, 5, 3), [0, 5]),
        (Rounds(8, 4, 1), [0, 4, 8, 9]),  # an interval of 1 computes everything
        (Rounds(6, 3, 2, warmup=3), [0, 1, 2, 5, 6, 8]),
        (Rounds(1, 3, 2, warmup=3), [0, 1, 2, 4, 6, 8]),
    ],
)
def test_where_the_full_steps_stand(rounds: Rounds, full: list[int]):
    assert rounds.full_steps(T) == full


def test_p_steps_of_a_phase():
    assert Rounds(4, 4, 2).phase(1, T) == [1, 2, 3]
    assert Rounds(4, 4, 2).phase(9, T) == [5, 7, 9]


def test_plan_of_whole_step_skipping():
    plan = tprr_plan(SIGNATURE, SAMPLER, GUIDANCE, SAMPLER, boundary=4, k1=4, k2=2, pruned_step=lambda i: (skip(0, L, 1),))
    assert plan.full_steps == [0, 4, 6, 8]
    assert [plan.steps[i] for i in (1, 2, 3, 5, 7, 9)] == [(skip(0, L, 1),)] * 6
    skipped = step_macs(SIGNATURE, (skip(0, L),))
    assert macs_speedup(plan) == T * full_step_macs(SIGNATURE) / (4 * full_step_macs(SIGNATURE) + 6 * skipped)
    assert plan.provenance["policy"] == "tprr"


@pytest.mark.parametrize("wrong", [{"k1": 0}, {"k2": 0}, {"boundary": -1}, {"warmup": 0}])
def test_rounds_out_of_range(wrong: dict[str, int]):
    with pytest.raises(PlanError, match="must be at least"):
        tprr_plan(SIGNATURE, SAMPLER, GUIDANCE, SAMPLER, **{"boundary": 4, "k1": 4, "k2": 2} | wrong, pruned_step=lambda i: ())  # type: ignore[arg-type]


def test_choice_of_blocks_and_tokens():
    assert best_edges(np.array([5.0, 1.0, 0.0, 2.0]), 2) == (1, 1)
    assert best_edges(np.array([5.0, 4.0, 0.0, 2.0]), 2) == (2, 0)
    assert best_edges(np.ones(4), 2) == (0, 2)
    assert best_edges(np.ones(4), 4) == (0, 4)
    assert best_window(np.array([1.0, 3.0, 3.0, 1.0]), 2) == (1, 3)
    assert best_window(np.ones(4), 2) == (2, 4)
    assert top_tokens(np.array([0.1, 0.9, 0.5, 0.9]), 2) == (1, 3)
    assert top_tokens(np.array([0.5, 0.5, 0.5]), 2) == (0, 1)


def test_segments_of_each_kind_follow_the_scores():
    sensitivity_L2 = np.array([[1.0, 3.0], [0.0, 0.1], [0.2, 0.2], [0.5, 2.0]])
    scores = make_scores(sensitivity_L2=sensitivity_L2)
    tokens = tuple(sorted(np.argsort(-scores.importance_TLN[3, 2:].mean(0))[:4].tolist()))

    def segments(*description: object) -> tuple[object, ...]:
        return PrunedStep(*description).segments(SIGNATURE, scores, [1, 2, 3], 3)  # type: ignore[arg-type]

    assert segments("skip", 2) == (skip(0, 4, 2),)
    assert segments("edges", 1, 0.5) == (compute(0, 1), skip(1, 3, 1), compute(3, 4))
    assert segments("branch", 1, 0.5) == (reuse(0, 1, ("attn",), 1), skip(1, 3, 1), reuse(3, 4, ("attn",), 1))
    late = make_scores(sensitivity_L2=sensitivity_L2[[1, 2, 0, 3]])
    window = PrunedStep("partial", 1, 0.5, 0.25).segments(SIGNATURE, late, [1, 2, 3], 3)
    assert window == (skip(0, 2, 1), partial(2, 4, tokens, 1, kv_order=2))


def test_blocks_are_those_that_matter_in_the_phase():
    sensitivity = np.zeros((T, L, 2))
    sensitivity[1:5, 0], sensitivity[5:, 3] = 1.0, 1.0
    scores = Scores(make_scores().importance_TLN, sensitivity, SIGNATURE.teacher, sampler_digest(SAMPLER))
    edges = PrunedStep("edges", 0, 0.25)
    assert edges.segments(SIGNATURE, scores, [1, 2, 3], 1) == (compute(0, 1), skip(1, 4))
    assert edges.segments(SIGNATURE, scores, [6, 8, 9], 6) == (skip(0, 3), compute(3, 4))


@pytest.mark.parametrize(
    ("pruned", "macs"),
    [
        (PrunedStep("skip", 0), 0),
        (PrunedStep("edges", 0, 0.5), 2 * block_macs(SIGNATURE, N)),
        (PrunedStep("partial", 0, 0.5, 0.25), 2 * block_macs(SIGNATURE, N // 4)),
    ],
)
def test_cost_of_a_p_step(pruned: PrunedStep, macs: int):
    fixed = step_macs(SIGNATURE, (skip(0, L),))
    assert pruned.cost(SIGNATURE, make_scores()) == pytest.approx((fixed + macs) / full_step_macs(SIGNATURE))


@pytest.mark.parametrize("description", [("jump", 0), ("edges", 0), ("partial", 0, 0.5), ("edges", 0, 1.5)])
def test_impossible_p_steps(description: tuple[object, ...]):
    with pytest.raises(PlanError, match="P-step"):
        PrunedStep(*description)  # type: ignore[arg-type]


def test_candidates_reach_the_target_and_use_the_budget(choice: PlanChoice):
    speedups = [row["macs_speedup"] for row in choice.candidates]
    assert min(speedups) >= 2.0
    assert max(speedups) <= min(speedups) / 0.85
    assert {row["kind"] for row in choice.candidates} == set(KINDS)
    assert all(row["k1"] >= row["k2"] for row in choice.candidates)
    assert len(choice.candidates) <= 24


def test_the_chosen_plan_is_the_best_of_the_table(choice: PlanChoice, context: PlanningContext):
    measured = [row for row in choice.candidates if row["mse"] is not None]
    (chosen,) = [row for row in choice.candidates if row["chosen"]]
    assert len(measured) == 4
    assert chosen["mse"] == min(row["mse"] for row in measured) == context.evaluate(choice.plan, None)
    assert max(row["mse_screen"] for row in measured) <= min(r["mse_screen"] for r in choice.candidates if r["mse"] is None)
    assert chosen["macs_speedup"] == macs_speedup(choice.plan)
    assert chosen["full_steps"] == len(choice.plan.full_steps)
    arguments = choice.plan.provenance["arguments"]
    assert all(chosen[name] == value for name, value in arguments.items())
    assert choice.plan.provenance["scores"] == context.scores.digest
    assert CachePlan.from_json(choice.plan.to_json()) == choice.plan


def test_search_is_deterministic(choice: PlanChoice, context: PlanningContext):
    again = policy().plan(context)
    assert again.plan.digest == choice.plan.digest
    assert again.candidates == choice.candidates


def test_learned_scores_decide_which_tokens_are_recomputed(evaluator: RolloutEvaluator):
    def tokens(seed: int) -> list[tuple[int, ...]]:
        context = PlanningContext(SIGNATURE, VP, SAMPLER, GUIDANCE, make_scores(seed), SAMPLER, evaluator)
        plan = policy(kinds=("partial",), block_shares=(1.0,), token_shares=(0.25,), orders=(1,), max_candidates=1).plan(context).plan
        return [segment.tokens for segments in plan.steps for segment in segments if segment.mode == "partial"]

    assert tokens(1) == tokens(1) != tokens(2)


def test_a_small_budget_still_finds_plans(context: PlanningContext):
    plan = policy(4.0, kinds=("skip",)).plan(context).plan
    assert plan_macs(plan) <= T * full_step_macs(SIGNATURE) / 4.0


def test_impossible_targets(context: PlanningContext):
    with pytest.raises(PlanError, match="above 1"):
        policy(1.0)
    with pytest.raises(PlanError, match=r"not reachable with 10 steps, max_interval 3 .* up to 2\.\d\d"):
        policy(50.0, max_interval=3).plan(context)
    with pytest.raises(PlanError, match=r"not reachable with 10 steps, max_interval 3 .* up to 2\.\d\d"):
        policy(50.0, max_interval=3).check(SIGNATURE, SAMPLER)  # before any training


@pytest.mark.parametrize("kind", ["skip", "edges", "branch", "partial"])
def test_check_refuses_no_target_that_planning_can_reach(context: PlanningContext, kind: str):
    for target in (1.3, 1.6, 2.0, 2.4, 2.8):
        one = policy(target, kinds=(kind,), max_interval=3)
        try:
            one.plan(context)
        except PlanError:
            continue
        one.check(SIGNATURE, SAMPLER)


@pytest.mark.parametrize("wrong", [{"orders": (3,)}, {"orders": ()}, {"screen_images": 0}, {"kinds": ("jump",)}, {"max_interval": 1}])
def test_arguments_out_of_range(wrong: dict[str, object]):
    with pytest.raises(PlanError):
        policy(2.0, **wrong)


def test_when_everything_diverges_no_plan_is_returned():
    context = PlanningContext(SIGNATURE, VP, SAMPLER, GUIDANCE, make_scores(), SAMPLER, lambda plan, images: float("inf"))
    with pytest.raises(PlanError, match="NaN or infinite"):
        policy().plan(context)
