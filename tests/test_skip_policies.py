"""Policies on a network with long skips: what places segments cuts none, or says that it would; others plan as they do for a DiT."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import SIGNATURE as DIT
from conftest import vp_sampler
from mdt_models import CONFIG

from export.bench.plans import benchmark_plans
from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.errors import PlanError
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.mdt import MDT, MDTConfig
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import Segment, compute
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.planner.memory import forward_bytes
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.pruned_steps import KINDS, PrunedStep, best_edges, best_window
from tc_lightning.policies.registry import standard_policies
from tc_lightning.policies.tprr import TPRRPolicy
from tc_lightning.rollout.sampling import full_plan

GUIDANCE, STEPS = Guidance(1.5, 3), 12
TABLE = vp_sampler("ddim", STEPS)
CUTTING = {"tokencache_v1", "tokencache_v2", "toca", "delta_dit"}


def signature_of(config: MDTConfig) -> ModelSignature:
    """Signature of an MDT of a shape, whatever its weights."""
    with torch.device("meta"):
        return MDT(config).signature("0" * 64)


XL = signature_of(MDTConfig())
SMALL = signature_of(CONFIG)


def scores_for(signature: ModelSignature, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    importance, sensitivity = rng.random((STEPS, signature.depth, signature.tokens)), rng.random((STEPS, signature.depth, 2))
    importance[0], sensitivity[0] = 1, 0
    return Scores(importance, sensitivity, signature.teacher, sampler_digest(TABLE))


def context_for(signature: ModelSignature) -> PlanningContext:
    return PlanningContext(signature, LinearBetas(), TABLE, GUIDANCE, scores_for(signature), TABLE, lambda plan, images: 0.5)


def planned(signature: ModelSignature, pruned: tuple[Segment, ...]) -> CachePlan:
    """A plan with such a step, which its constructor has accepted."""
    steps = ((compute(0, signature.depth),), pruned)
    table = vp_sampler("ddim", 2)
    return CachePlan(signature, table, GUIDANCE, steps, table)


@pytest.mark.parametrize("signature", [XL, SMALL], ids=["xl", "small"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.5, 0.75, 1.0])
def test_pruned_steps_cut_no_skip(signature: ModelSignature, kind: str, share: float) -> None:
    for seed in range(5):
        segments = PrunedStep(kind, 1, share, 0.25).segments(signature, scores_for(signature, seed), [3, 4], 3)
        planned(signature, segments)
        if kind != "skip":
            kept = sum(segment.stop - segment.start for segment in segments if segment.mode != "skip")
            assert kept >= max(1, round(share * signature.depth))


def test_as_few_blocks_more_are_computed_as_it_takes() -> None:
    flat = np.ones(28)
    assert best_edges(flat, 3, XL.skips) == (0, 3)  # the encoder is skipped whole, with one block of the decoder
    assert best_edges(flat, 7, XL.skips) == (2, 6)  # of 7 blocks there is no way: 8 leave the span [2, 22)
    front = np.ones(28)
    front[:11] = 9
    assert best_edges(front, 26, XL.skips) == (11, 15)  # the span that remains is that of blocks 11 and 12
    assert best_window(flat, 2, XL.skips) == (26, 28)
    assert best_window(flat, 5, XL.skips) == (0, 24)  # nothing before or after it may be cut either


def test_without_skips_edges_and_windows_are_what_they_were() -> None:
    rng = np.random.default_rng(0)
    for L, equal in itertools.product((1, 4, 9), (False, True)):
        sensitivity = np.ones(L) if equal else rng.random(L)
        total = np.concatenate([[0.0], np.cumsum(sensitivity)])
        for count in range(1, L + 1):
            a = max(range(count + 1), key=lambda a: (total[a] + total[L] - total[L - count + a], -a))
            assert best_edges(sensitivity, count) == (a, count - a)
            s = max(range(L - count + 1), key=lambda s: (total[s + count] - total[s], s))
            assert best_window(sensitivity, count) == (s, s + count)


def test_the_defaults_of_two_phase_round_robin_plan_for_it() -> None:
    choice = TPRRPolicy(2.0, progress=False).plan(context_for(SMALL))
    kinds = {row["kind"] for row in choice.candidates}
    assert kinds == {*KINDS}
    assert min(row["macs_speedup"] for row in choice.candidates) >= 2.0


@pytest.mark.parametrize("name", sorted(CUTTING))
def test_methods_that_cut_skips_say_so_before_planning(name: str) -> None:
    words = rf"{name} caches some blocks .* cuts the long skip from block 11 to block 12 in two: choose a policy"
    context, policy = context_for(XL), standard_policies(2.0)[name]
    with pytest.raises(PlanError, match=words):
        policy.check(XL, TABLE)
    with pytest.raises(PlanError, match=words):
        policy.plan(context)
    assert "cuts the long skip" in (policy.unavailable(context) or "")
    assert "long skip" not in (policy.unavailable(dataclasses.replace(context, signature=DIT)) or "")


@pytest.mark.parametrize("name", ["fora", "taylorseer", "fewer_steps_ddim", "feb_cache"])
def test_others_plan_for_it(name: str) -> None:
    plan = standard_policies(1.5)[name].plan(context_for(SMALL)).plan
    assert plan.model == SMALL


def test_no_other_method_was_forgotten() -> None:
    """Of all methods, those that are not said to cut make no segment that is neither whole, nor computed for all tokens."""
    assert {name for name, policy in standard_policies(2.0).items() if getattr(policy, "cuts", False)} == CUTTING


@pytest.mark.parametrize("signature", [XL, SMALL], ids=["xl", "small"])
def test_plans_of_benchmarks_cut_none(signature: ModelSignature) -> None:
    plans = benchmark_plans(signature, vp_sampler("ddim", 10), 6)
    assert all(plan.model == signature for plan in plans.values())


def test_streams_that_wait_are_counted_in_memory() -> None:
    plain = dataclasses.replace(SMALL, skips=DIT.skips)
    with_skips, without = (forward_bytes(full_plan(model, TABLE, GUIDANCE)) for model in (SMALL, plain))
    assert with_skips - without == 4 * 2 * 16 * 32 * 3  # of blocks 0 and 1, and of the embedding
