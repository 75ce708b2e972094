"""All policies on a tiny teacher: targets, export, arguments, and what was not measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VP, make_teacher, vp_sampler
from jsonargparse import ArgumentParser
from recipes import some_scores

from export.compiler.compile import export_artefact
from tc_lightning.errors import PlanError
from tc_lightning.measure.cache_cases import CacheCases
from tc_lightning.measure.calibrate import calibrate
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.guidance import Guidance
from tc_lightning.policies.base import PlanningContext, Policy
from tc_lightning.policies.budcache import BudCachePolicy
from tc_lightning.policies.delta_dit import DeltaDiTPolicy
from tc_lightning.policies.dp_placement import DPPlacementPolicy
from tc_lightning.policies.dpcache import DPCachePolicy
from tc_lightning.policies.ecad import ECADPolicy
from tc_lightning.policies.ertacache import ERTACachePolicy
from tc_lightning.policies.feb_cache import EBCachePolicy, FEBCachePolicy
from tc_lightning.policies.fewer_steps import FewerStepsPolicy
from tc_lightning.policies.foca import FoCaPolicy
from tc_lightning.policies.fora import FORAPolicy
from tc_lightning.policies.hicache import HiCachePolicy
from tc_lightning.policies.l2p import L2PPolicy
from tc_lightning.policies.magcache import MagCachePolicy
from tc_lightning.policies.registry import standard_policies
from tc_lightning.policies.smoothcache import SmoothCachePolicy
from tc_lightning.policies.spectrum import SpectrumPolicy
from tc_lightning.policies.taylorseer import TaylorSeerPolicy
from tc_lightning.policies.toca import ToCaPolicy
from tc_lightning.policies.tokencache_v1 import TokenCacheV1Policy
from tc_lightning.policies.tprr import TPRRPolicy
from tc_lightning.rollout.evaluation import RolloutEvaluator
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample

T = 10
MODEL = make_teacher(0, input_size=8, in_channels=1, hidden_size=16, depth=2, learn_sigma=False)
SIGNATURE = model_signature(MODEL)


@pytest.fixture(scope="module")
def context() -> PlanningContext:
    sampler, guidance = vp_sampler("ddim", T), Guidance(1.5, 1)
    full = full_plan(SIGNATURE, sampler, guidance)
    x_T, labels = noise_for(0, range(2), MODEL), torch.tensor([0, 3])
    evaluate = RolloutEvaluator(MODEL, x_T, labels, sample(MODEL, full, x_T, labels))
    calibration = calibrate(MODEL, full, x_T, labels, progress=False)
    return PlanningContext(
        SIGNATURE, VP, sampler, guidance, some_scores(SIGNATURE, sampler), sampler, evaluate, calibrate=lambda: calibration
    )


NAMES = sorted(standard_policies(2.0))


def test_all_are_there():
    assert set(NAMES) >= {
        "tokencache_v1",
        "fora",
        "taylorseer",
        "hicache",
        "foca",
        "spectrum",
        "l2p",
        "delta_dit",
        "eb_cache",
        "feb_cache",
        "toca",
        "smoothcache",
        "dp_placement",
        "dpcache",
        "magcache",
        "ertacache",
        "budcache",
        "ecad",
        "learning_to_cache",
        "harmonica",
    }
    assert {f"fewer_steps_{name}" for name in ("ddim", "dpmpp_2m", "dpmpp_3m")} <= set(NAMES)
    assert not any("ddpm" in name for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_met_or_refused_before_planning(name: str, context: PlanningContext):
    for target in (1.3, 2.5, 50.0):
        policy = standard_policies(target)[name]
        if reason := policy.unavailable(context):
            assert "not reachable" in reason
            with pytest.raises(PlanError, match="not reachable"):
                policy.check(SIGNATURE, context.sampler)
            with pytest.raises(PlanError, match="not reachable"):
                policy.plan(context)
            continue
        choice = policy.plan(context)
        assert macs_speedup(choice.plan) >= target
        assert choice.plan.provenance["policy"] == name
        assert CachePlan.from_json(choice.plan.to_json()) == choice.plan
        (row,) = [row for row in choice.candidates if row["chosen"]]
        assert row["macs_speedup"] == macs_speedup(choice.plan)
        if row["mse_screen"] is not None:
            assert row["mse_screen"] == min(r["mse_screen"] for r in choice.candidates) == context.evaluate(choice.plan, 4)
    assert standard_policies(50.0)[name].unavailable(context)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("fewer")])
def test_another_sampler_may_replace_the_reference(name: str, context: PlanningContext):
    shorter = dataclasses.replace(context, sampler=vp_sampler("dpmpp_2m", 8, "logsnr"), reference=context.sampler)
    full = full_plan(SIGNATURE, shorter.sampler, context.guidance)
    calibration = calibrate(MODEL, full, noise_for(0, range(1), MODEL), torch.tensor([0]), progress=False)
    shorter = dataclasses.replace(shorter, calibrate=lambda: calibration, scores=some_scores(SIGNATURE, shorter.sampler))
    plan = standard_policies(2.0)[name].plan(shorter).plan if not standard_policies(2.0)[name].unavailable(shorter) else None
    assert plan is None or (macs_speedup(plan) >= 2.0 and len(plan.reference) == T and plan.num_steps == 8)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("fewer")])
def test_plans_export_and_agree_with_torch(name: str, context: PlanningContext, tmp_path: Any):
    policy = standard_policies(1.3 if name in ("eb_cache", "learning_to_cache") else 2.0)[name]
    manifest = export_artefact(MODEL, policy.plan(context).plan, tmp_path / "artefact", "fp32", "cpu", images=2, report=lambda _: None)
    assert manifest["parity"]["trajectory_rel_l2"] < 1e-5


def test_arguments_are_the_schema_of_a_config():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=Policy)
    for policy in standard_policies(2.0).values():
        path = f"{type(policy).__module__}.{type(policy).__name__}"
        config = parser.parse_object({"policy": {"class_path": path, "init_args": {"target_speedup": 3.0}}})
        assert parser.instantiate_classes(config).policy.target_speedup == 3.0


@pytest.mark.parametrize(("name", "orders"), [("tokencache_v1", (0,)), ("toca", (0,)), ("tokencache_v2", (0, 1, 2)), ("tprr", (1, 2))])
def test_a_plan_says_that_its_scores_are_of_another_cache(name: str, orders: tuple[int, ...], context: PlanningContext):
    """Those at hand are of order 0; a plan that forecasts at another order, where scores chose, says so in words."""
    tprr = TPRRPolicy(1.5, orders=orders, kinds=("partial",), max_candidates=2, finalists=1, progress=False)
    policy = tprr if name == "tprr" else standard_policies(1.3)[name]
    for cases in (CacheCases(), CacheCases((0, 1, 2), (2, 3))):
        plan = policy.plan(dataclasses.replace(context, scores=dataclasses.replace(context.scores, cases=cases))).plan
        told = {**plan.provenance["arguments"], **plan.provenance}
        used = {s.order for segments in plan.steps for s in segments if s.mode != "compute"}
        assert used <= {*orders}
        assert ("scores_of_another_cache" in told) == (not used <= {*cases.orders})


def test_skipping_everything_takes_no_scores(context: PlanningContext):
    tprr = TPRRPolicy(1.5, orders=(1,), kinds=("skip",), max_candidates=2, finalists=1, progress=False)
    assert "scores_of_another_cache" not in tprr.plan(context).plan.provenance


def test_what_was_not_measured_for_the_sampler_is_not_used(context: PlanningContext):
    other = dataclasses.replace(context, sampler=vp_sampler("dpmpp_2m", T))
    blind = dataclasses.replace(context, calibrate=None)
    everything = np.ones_like(context.scores.importance_TLN)
    untrained = dataclasses.replace(context, scores=dataclasses.replace(context.scores, importance_TLN=everything))
    for name, where, reason in (
        ("toca", other, "scores of the sampler that is planned"),
        ("tokencache_v1", other, "scores of the sampler that is planned"),
        ("harmonica", other, "scores of the sampler that is planned"),
        ("toca", untrained, "no predictor of it was trained"),
        ("smoothcache", blind, "needs calibration data"),
        ("dp_placement", blind, "needs calibration data"),
        ("dpcache", blind, "needs calibration data"),
        ("magcache", blind, "needs calibration data"),
        ("ertacache", blind, "needs calibration data"),
        ("l2p", blind, "needs calibration data"),
    ):
        policy = standard_policies(1.5)[name]
        assert reason in str(policy.unavailable(where))
        with pytest.raises(PlanError, match=reason):
            policy.plan(where)
    with pytest.raises(PlanError, match="measured for another sampler"):
        standard_policies(1.5)["dp_placement"].plan(other)
    old = dataclasses.replace(context.calibration, residuals=None)
    for name in ("dpcache", "magcache", "ertacache", "l2p"):
        with pytest.raises(PlanError, match="of before residuals were measured"):
            standard_policies(1.5)[name].plan(dataclasses.replace(context, calibrate=lambda: old))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: FORAPolicy(interval=0.5),
        lambda: FORAPolicy(1.0),
        lambda: TaylorSeerPolicy(orders=(3,)),
        lambda: TaylorSeerPolicy(orders=()),
        lambda: TaylorSeerPolicy(images=0),
        lambda: DeltaDiTPolicy(interval=1),
        lambda: DeltaDiTPolicy(skipped_share=0.0),
        lambda: FEBCachePolicy(short=2, long=3),
        lambda: EBCachePolicy(boundary_share=1.5),
        lambda: EBCachePolicy(eps_scale=(0.98, 0.0)),
        lambda: ToCaPolicy(ratio=-0.1),
        lambda: SmoothCachePolicy(max_gap=0),
        lambda: SmoothCachePolicy(threshold=-1.0),
        lambda: DPPlacementPolicy(sums=("other",)),
        lambda: DPPlacementPolicy(full_steps=0),
        lambda: DPCachePolicy(orders=(0,)),
        lambda: DPCachePolicy(warmup=1),
        lambda: DPCachePolicy(longest=0.0),
        lambda: HiCachePolicy(sigma=1.0),
        lambda: HiCachePolicy(interval=0.5),
        lambda: FoCaPolicy(warmup=0),
        lambda: SpectrumPolicy(ridge=0.0),
        lambda: SpectrumPolicy(window=0.5),
        lambda: L2PPolicy(histories=(5,)),
        lambda: L2PPolicy(histories=()),
        lambda: MagCachePolicy(threshold=-0.1),
        lambda: MagCachePolicy(max_gap=0),
        lambda: MagCachePolicy(retained=1.0),
        lambda: ERTACachePolicy(threshold=-0.1),
        lambda: BudCachePolicy(evaluations=0),
        lambda: BudCachePolicy(full_steps=0),
        lambda: ECADPolicy(population=1),
        lambda: ECADPolicy(mutation=1.5),
        lambda: TokenCacheV1Policy(block_share=0.0),
        lambda: TokenCacheV1Policy(k1=0),
        lambda: FewerStepsPolicy("ddpm"),
        lambda: FewerStepsPolicy(spacings=()),
    ],
)
def test_arguments_out_of_range(wrong: Any):
    with pytest.raises(PlanError):
        wrong()
