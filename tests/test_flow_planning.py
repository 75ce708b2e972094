"""Whatever plans, fits and scores works on a flow as on linear betas, whichever way its network counts time."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from conftest import CONFIG

from tc_lightning.diffusion.flow import Flow
from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import TokenCacheError
from tc_lightning.learn.objectives.base import Task
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.checkpoints import ROOT
from tc_lightning.models.dit import DiT, randomise_
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.guidance import Guidance
from tc_lightning.planner.fit import fit_sampler
from tc_lightning.planner.fitted_fewer_steps import fitted_fewer_steps
from tc_lightning.planner.image_choice import difficulty, images
from tc_lightning.planner.policy import PlannerPolicy
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.fewer_steps import FewerStepsPolicy
from tc_lightning.rollout.evaluation import RolloutEvaluator
from tc_lightning.rollout.sampling import full_plan, model_signature
from tc_lightning.rollout.targets import ODE_STEPS, converged_ode

STEPS, GUIDANCE = 10, Guidance(1.5, 4)


class ToData(DiT):
    """Time grows towards data, as SiT counts it."""

    schedule = Flow(0.0, 1.0)


class ToNoise(DiT):
    """Time grows towards noise, as SD3 counts it."""

    schedule = Flow(1000.0, 0.0)


class FewBetas(DiT):
    """Fewer training steps than usual, and v."""

    schedule = LinearBetas(num_train_steps=64, beta_end=0.3, predicts="v")


BOTH = pytest.mark.parametrize("flow", [ToData.schedule, ToNoise.schedule], ids=["to data", "to noise"])


@pytest.fixture(scope="module", params=[ToData, ToNoise, FewBetas])
def model(request: pytest.FixtureRequest) -> DiT:
    return randomise_(request.param(dataclasses.replace(CONFIG, depth=2)), 0, std=0.2).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def target(model: DiT) -> TargetRun:
    return run_target(model, make_sampler(model.schedule, "ddim", STEPS), GUIDANCE, *images(model, list(range(6))), batch=3)


def context(model: DiT) -> PlanningContext:
    signature, table = model_signature(model), make_sampler(model.schedule, "ddim", STEPS)
    importance, sensitivity = np.ones((STEPS, 2, 16)), np.ones((STEPS, 2, 2))
    sensitivity[0] = 0
    scores = Scores(importance, sensitivity, signature.teacher, sampler_digest(table))
    noise = images(model, [0, 1])
    end = run_target(model, table, GUIDANCE, *noise, batch=2).x_0
    evaluate = RolloutEvaluator(model, *noise, end)
    return PlanningContext(signature, model.schedule, table, GUIDANCE, scores, table, evaluate, model=model)


def cubic(flow: Schedule, t: float) -> torch.Tensor:
    s = float(flow.alpha_sigma(t)[1])
    return torch.full((1, 1, 1, 1), 0.4 - 1.1 * s + 0.3 * s**2 + 0.2 * s**3)


@BOTH
@pytest.mark.parametrize("spacing", ["uniform", "logsnr"])
def test_between_the_times_of_a_run_a_cubic_in_sigma_is_met(flow: Flow, spacing: str) -> None:
    """From the first time on, where alpha is 0, and up to the data, where sigma is."""
    times = flow.timesteps(spacing, 9)
    run = TargetRun(flow, times, torch.stack([cubic(flow, t) for t in times]), torch.zeros(1), cubic(flow, flow.data_at))
    for share in (0.001, 0.04, 0.3, 0.77):
        t = flow.noise_at + share * (flow.data_at - flow.noise_at)
        if flow.alpha_sigma(t)[1] >= flow.alpha_sigma(times)[1][-1]:
            assert float(run.at(t)) == pytest.approx(float(cubic(flow, t)), abs=1e-5)
    for j, t in enumerate(times):
        assert torch.equal(run.at(float(t)), run.path_SBCHW[j])
    assert torch.equal(run.at(flow.noise_at), run.x_T)
    assert torch.equal(run.at(None), run.x_0)


@BOTH
def test_after_the_last_time_of_a_run_the_way_is_straight(flow: Flow) -> None:
    times = flow.timesteps("uniform", 5)
    _, sigma_S = flow.alpha_sigma(times)
    states = torch.tensor((1 - sigma_S) * 0.3 - sigma_S * 1.2, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    run = TargetRun(flow, times, states, torch.zeros(1), torch.full((1, 1, 1, 1), 0.3))
    for sigma in (0.15, 0.01, 0.0):
        t = flow.data_at + sigma * (flow.noise_at - flow.data_at)
        assert float(run.at(t)) == pytest.approx((1 - sigma) * 0.3 - sigma * 1.2, abs=1e-5)


def test_a_run_fitted_to_itself_keeps_its_coefficients(model: DiT, target: TargetRun) -> None:
    plan = full_plan(model_signature(model), make_sampler(model.schedule, "ddim", STEPS), GUIDANCE)
    fitted = fit_sampler(model, plan, target, 4)
    assert fitted.mse_B.max() < 1e-8 * target.x_0.square().mean()


def test_fitting_other_times_brings_a_run_nearer(model: DiT, target: TargetRun) -> None:
    plain = full_plan(model_signature(model), make_sampler(model.schedule, "dpmpp_2m", 5, "mix:0.5"), GUIDANCE)
    ends = RolloutEvaluator(model, target.x_T, target.given, target.x_0).mse_per_image(plain)
    assert fit_sampler(model, plain, target, 6).mse_B.mean() < 0.7 * ends.mean()


def test_hard_images_are_found(model: DiT) -> None:
    found_P = difficulty(model, GUIDANCE, STEPS, *images(model, [0, 1, 2]), 3, None)
    assert found_P.isfinite().all()
    assert (found_P > 0).all()


def test_the_converged_ode_is_the_networks(model: DiT) -> None:
    table = converged_ode(model.schedule, 40)
    assert table.steps[0].t == pytest.approx(model.schedule.span[0])
    start = images(model, [0, 1])
    ends = [run_target(model, converged_ode(model.schedule, n), GUIDANCE, *start, batch=2).x_0 for n in (20, 40, 60)]
    assert (ends[2] - ends[1]).norm() < 0.5 * (ends[1] - ends[0]).norm()


def test_the_converged_ode_takes_as_many_steps_as_a_schedule_of_few_has() -> None:
    assert len(converged_ode(FewBetas.schedule)) == 64
    assert len(converged_ode(ToData.schedule)) == ODE_STEPS


def test_fewer_steps_are_fitted(model: DiT) -> None:
    reference = full_plan(model_signature(model), make_sampler(model.schedule, "ddim", STEPS), GUIDANCE)
    plan = fitted_fewer_steps(model, reference, 4)
    assert plan.num_steps == 4
    assert plan.sampler.steps[0].t == pytest.approx(model.schedule.span[0])


def test_the_planner_reaches_its_target(model: DiT) -> None:
    small = {"fit_images": 2, "judge_images": 2, "choice_images": 2, "final_images": 2, "pool_images": 0, "refinements": 1}
    policy = PlannerPolicy(2.0, evaluations=4, progress=False, **small)
    choice = policy.plan(context(model))
    assert macs_speedup(choice.plan) >= 2.0
    assert math.isfinite(choice.front[0].mse)


def test_fewer_steps_come_with_the_spacings_of_the_network(model: DiT) -> None:
    choice = FewerStepsPolicy("dpmpp_2m", 2.0).plan(context(model))
    assert {row["spacing"] for row in choice.candidates} == {*model.schedule.spacings, "mix:0.5"}
    foreign = "shift:3" if isinstance(model, FewBetas) else "leading"
    with pytest.raises(TokenCacheError, match=foreign):
        FewerStepsPolicy("dpmpp_2m", 2.0, spacings=(foreign,)).plan(context(model))


def test_predictors_of_importance_tell_the_steps_apart(model: DiT) -> None:
    """As they do with linear betas: their embedding of time is made for about 1,000 training steps."""
    task = Task(model, model_signature(model), make_sampler(model.schedule, "ddim", STEPS), GUIDANCE)
    assert task.times.tolist() == pytest.approx([step.t for step in task.sampler.steps])
    apart = (task.clock[:-1] - task.clock[1:]).tolist()
    assert min(apart) > 0.7 * 64 / STEPS
    assert max(task.clock.tolist()) <= 1000.0


def test_nothing_but_a_network_makes_a_schedule() -> None:
    """Whoever imports one outside of models/, and of diffusion/ where they are told apart, would make one of his own."""
    kinds = re.compile(r"diffusion\.(linear_betas|flow)\b")
    files = {
        path: path.relative_to(ROOT).as_posix() for name in ("tc_lightning", "data", "export") for path in (ROOT / name).rglob("*.py")
    }
    makers = {name for path, name in files.items() if kinds.search(path.read_text(encoding="utf-8"))}
    assert not {name for name in makers if not name.startswith(("tc_lightning/models/", "tc_lightning/diffusion/"))}
    assert {"tc_lightning/models/dit.py"} < makers
