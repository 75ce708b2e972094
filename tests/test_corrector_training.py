"""Training a corrector: what its loss says, the plans that it is drawn on, that it learns, and what the run then holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import Recorder, make_distiller, make_teacher, make_trainer
from torch import Tensor

from data.whole_trajectories import WholeTrajectoryDataModule
from tc_lightning.cache.soft_network import full_eps
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import RunError, TokenCacheError
from tc_lightning.learn.distiller import TokenCacheDistiller
from tc_lightning.learn.objectives.base import Batch
from tc_lightning.learn.objectives.corrector import ForecastCorrection
from tc_lightning.learn.objectives.drawn_plans import Grid, drawn_plan
from tc_lightning.models.checkpoints import TeacherSpec
from tc_lightning.models.companions import NO_COMPANIONS, Companions
from tc_lightning.models.corrector import Corrector
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.forecasts import lagrange_weights
from tc_lightning.planner.corrected import CorrectedPolicy
from tc_lightning.rollout.sampling import full_plan, noise_for, sample_steps
from tc_lightning.runs.folder import read_run
from tc_lightning.runs.loaded import load_run

STEPS = 10


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return make_teacher(tmp_path_factory.mktemp("teacher"), seed=0)


def make_module(teacher: TeacherSpec, **changes: Any) -> tuple[TokenCacheDistiller, ForecastCorrection]:
    objective = ForecastCorrection(**{"orders": (1, 2), "longest": 3, **changes})
    return make_distiller(teacher, train_tokens=False, corrector=objective, num_steps=STEPS), objective


def make_batch(module: TokenCacheDistiller, images: int = 2) -> Batch:
    """Trajectories at full compute."""
    x, labels = noise_for(0, range(images), module.teacher), torch.arange(images) % 3
    plan = full_plan(module.signature, module.sampler, module.guidance)
    latents = torch.stack([state.x for state in sample_steps(module.teacher, plan, x, labels)], 1)
    return Batch(module.task, {"latents": latents, "label": labels, "index": torch.arange(images)})


def open_up(objective: ForecastCorrection) -> None:
    with torch.no_grad():
        objective.module.leave.weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))


# The plans it is drawn on


def test_drawn_plans_are_of_the_gaps_and_orders_asked_for(teacher: TeacherSpec) -> None:
    module, _ = make_module(teacher)
    plans = [drawn_plan(module.task, module.sampler, (1, 2), 3, seed) for seed in range(40)]
    assert len({plan.digest for plan in plans}) > 20
    assert drawn_plan(module.task, module.sampler, (1, 2), 3, 7) == plans[7]
    orders = set()
    for plan in plans:
        full = plan.full_steps
        assert full[:2] == [0, 1]
        assert max(b - a for a, b in zip(full, [*full[1:], STEPS], strict=True)) <= 3
        others = [segments[0] for i, segments in enumerate(plan.steps) if i not in full]
        assert others
        assert all(segment.corrected for segment in others)
        orders |= {segment.order for segment in others}
    assert orders == {1, 2}


# The loss


@pytest.mark.parametrize("guidance", [1.5, 1.0])
def test_errors_by_hand(teacher: TeacherSpec, guidance: float) -> None:
    """Before training all of the forecast's error is left; what that is, of tokens and of the guided output."""
    objective = ForecastCorrection(steps=100)
    module = make_distiller(teacher, train_tokens=False, corrector=objective, num_steps=STEPS, guidance_scale=guidance)
    batch = make_batch(module)
    plan = drawn_plan(module.task, module.sampler, (1,), 3, 0)
    left = objective.left(plan, batch, 0)
    assert torch.equal(left.residual_S, left.forecast_S)
    assert torch.equal(left.output_S, left.output_forecast_S)
    assert [float(share) for share in left.shares] == [1.0, 1.0]
    residuals = objective.residuals(module.sampler, batch.content["latents"], batch.given)
    halves = 2 if guidance != 1.0 else 1
    assert residuals.shape == (STEPS, halves, 2, 16, 24)
    chosen = [i for i in range(STEPS) if i not in plan.full_steps]
    assert len(chosen) == len(left.forecast_S)
    for place, i in enumerate(chosen):
        sources = [s for s in reversed(plan.full_steps) if s < i][:2]
        weights = lagrange_weights(sources, i)
        forecast = sum(w * residuals[s] for w, s in zip(weights, sources, strict=True))
        torch.testing.assert_close(left.forecast_S[place], (forecast - residuals[i]).square().mean())
        t_B = torch.full((2,), module.sampler.steps[i].t)
        eps, caches = full_eps(module.teacher, module.guidance, batch.content["latents"][:, i], t_B, batch.given)
        total = sum(cache.residual for cache in caches.blocks)
        torch.testing.assert_close(total.unflatten(0, (halves, 2)), residuals[i], rtol=1e-4, atol=1e-4)
        assert (eps - batch.content["latents"][:, i]).isfinite().all()


def test_the_loss_is_of_both_shares_and_reaches_the_corrector_alone(teacher: TeacherSpec) -> None:
    for output_share in (0.0, 0.25, 1.0):
        module, objective = make_module(teacher, output_share=output_share)
        open_up(objective)
        loss = objective.loss(make_batch(module), 0)
        on_tokens, on_output = loss.logs["corrector_left"], loss.logs["corrector_output_left"]
        torch.testing.assert_close(loss.total.detach(), (1 - output_share) * on_tokens + output_share * on_output)
        loss.total.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in objective.parameters())
        assert not any(p.requires_grad for p in module.teacher.parameters())


def test_residuals_that_are_kept_are_those_that_are_computed(teacher: TeacherSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    module, objective = make_module(teacher)
    batch, seen = make_batch(module), list[Tensor]()
    own, latents = objective.residuals, batch.content["latents"]
    monkeypatch.setattr(objective, "residuals", lambda *args: seen.append(args[1]) or own(*args))
    first, again = objective._full_runs(module.sampler, batch), objective._full_runs(module.sampler, batch)
    assert torch.equal(first.residual_TGBND, again.residual_TGBND)
    assert torch.equal(first.latents_BTCHW, latents)
    assert [len(computed) for computed in seen] == [2]  # each image once, all of a batch together
    objective._kept.popitem()
    third = objective._full_runs(module.sampler, batch)
    assert [len(computed) for computed in seen] == [2, 1]  # what is not known any more, alone
    torch.testing.assert_close(third.residual_TGBND, first.residual_TGBND, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.residual_TGBND, own(module.sampler, latents, batch.given), rtol=1e-4, atol=1e-4)
    grid = make_sampler(module.teacher.schedule, "dpmpp_2m", 5, "logsnr")
    other = objective._full_runs(grid, batch)  # from the same noise
    states = sample_steps(module.teacher, full_plan(module.signature, grid, module.guidance), latents[:, 0], batch.given)
    torch.testing.assert_close(other.latents_BTCHW, torch.stack([state.x for state in states], 1), rtol=1e-4, atol=1e-4)


# The student's own rollouts


def test_rollouts_are_the_students_own(teacher: TeacherSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = [Grid("dpmpp_2m", "logsnr", 6)]
    module, objective = make_module(teacher, rollouts_from=1, grids=grids)
    open_up(objective)
    batch = make_batch(module)
    noise = batch.content["latents"][:, 0]
    plan = objective.drawn(3)
    rolled = objective.rolled_out(plan, noise, batch.given)
    assert rolled.shape == (2, 6, 1, 8, 8)
    assert torch.equal(rolled[:, 0], noise)
    corrector = Corrector.of(objective.module)
    named = CachePlan.from_json(plan.to_json() | {"corrector": corrector.digest})
    states = sample_steps(module.teacher, named, noise, batch.given, companions=Companions(corrector=corrector))
    torch.testing.assert_close(rolled, torch.stack([state.x for state in states], 1))

    seen = list[int]()
    own = objective.rolled_out
    monkeypatch.setattr(objective, "rolled_out", lambda *args: seen.append(len(args[0].sampler)) or own(*args))
    objective.loss(batch, 0)
    assert not seen  # along full compute first, then along its own
    objective.before_step()
    assert objective.loss(batch, 1).total.requires_grad
    assert seen == [6]


# A run


def test_fit_learns_and_the_run_holds_the_corrector(teacher: TeacherSpec, tmp_path: Path) -> None:
    recorder, (module, _) = Recorder(), make_module(teacher)
    module.policy = CorrectedPolicy(1.4, orders=(1,), spacings=("logsnr",), fit_images=3, judge_images=2, refinements=0, progress=False)
    module.lr = 4e-3
    data = WholeTrajectoryDataModule(str(tmp_path / "set"), num_train=12, num_val=4, batch_size=4)
    make_trainer(tmp_path, 110, callbacks=[recorder]).fit(module, data)
    module.trainer.validate(module, data, verbose=False)
    found = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    assert found["val/corrector_left"] < 0.8  # on trajectories that it was not trained on
    assert found["val/corrector_output_left"] < 0.8
    assert recorder.rows[0]["train/corrector_left"] == pytest.approx(1.0)

    run = read_run(tmp_path / "run")
    assert run.corrector == tmp_path / "run" / "corrector.safetensors"
    loaded = load_run(run)
    plan = loaded.plan
    assert plan.corrector == loaded.companions.corrector.digest
    assert plan.provenance["policy"] == "corrected"
    assert [segments[0].corrected for segments in plan.steps].count(True) >= 1
    assert macs_speedup(plan) >= 1.4
    assert len(plan.fewer_steps) == 7  # full steps alone that the budget pays for


def test_only_the_corrector_is_trained_and_kept(teacher: TeacherSpec, tmp_path: Path) -> None:
    module, _ = make_module(teacher)
    data = WholeTrajectoryDataModule(str(tmp_path / "set"), num_train=4, num_val=4, batch_size=4)
    make_trainer(tmp_path, 2, limit_val_batches=0).fit(module, data)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert {".".join(name.split(".")[:2]) for name in checkpoint["state_dict"]} == {"corrector.module", "corrector.taken"}
    resumed, objective = make_module(teacher)
    make_trainer(tmp_path / "again", 3, limit_val_batches=0).fit(resumed, data, ckpt_path=str(tmp_path / "a.ckpt"))
    assert int(objective.taken) == 3


# What is refused


def test_arguments_out_of_range(teacher: TeacherSpec) -> None:
    for wrong in ({"orders": ()}, {"orders": (0,)}, {"longest": 1}, {"steps": 0}, {"output_share": 1.5}, {"rollouts_from": -1}):
        with pytest.raises(RunError, match="corrector: "):
            ForecastCorrection(**wrong)
    with pytest.raises(RunError, match="a grid of fewer than 3 steps"):
        ForecastCorrection(grids=[Grid("ddim", "uniform", 2)])
    with pytest.raises(RunError, match="of 2 steps none can be corrected"):
        make_distiller(teacher, train_tokens=False, corrector=ForecastCorrection(), num_steps=2)


def test_what_does_not_belong_together_is_refused(teacher: TeacherSpec, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ForecastCorrection trains on trajectories, tokens on pairs: set train_tokens to false"):
        make_distiller(teacher, corrector=ForecastCorrection())
    module, objective = make_module(teacher)
    with pytest.raises(RunError, match=r"use data\.whole_trajectories\.WholeTrajectoryDataModule"):
        objective.loss(Batch(module.task, {"x": torch.zeros(2, 1, 8, 8)}), 0)
    large = WholeTrajectoryDataModule(str(tmp_path / "set"), num_train=4, num_val=2, batch_size=3)
    with pytest.raises(TokenCacheError, match="batch_size 3 counts trajectories and is larger than the 2 samples"):
        make_trainer(tmp_path, 1).fit(module, large)
    assert objective.companions().selector is None
    assert NO_COMPANIONS.corrector is None
