from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import fit, make_data, make_distiller, make_teacher, make_trainer, roll_out
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader

from tc_lightning.cache.semantics import Step, run_blocks
from tc_lightning.cache.soft_network import enter, guided_eps, mixed_eps, record_caches, reused_eps
from tc_lightning.errors import PlanError, RunError
from tc_lightning.learn.distiller import TokenCacheDistiller
from tc_lightning.learn.objectives.rollout import RouterRollout
from tc_lightning.learn.objectives.superposition import RouterSuperposition
from tc_lightning.learn.planning import trajectory_sensitivity
from tc_lightning.measure.cache_cases import CacheCases
from tc_lightning.measure.calibration import Calibration
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.checkpoints import TeacherSpec
from tc_lightning.models.predictor import INITIAL_IMPORTANCE
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.segments import compute, partial
from tc_lightning.policies.dp_placement import DPPlacementPolicy
from tc_lightning.policies.harmonica import HarmoniCaPolicy
from tc_lightning.policies.tprr import TPRRPolicy
from tc_lightning.rollout.sampling import full_plan, kept_tokens
from tc_lightning.runs.folder import read_run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return make_teacher(tmp_path_factory.mktemp("teacher"), seed=0)


def test_soft_form_with_weights_0_and_1_is_the_partial_step(teacher: TeacherSpec) -> None:
    module = make_distiller(teacher)
    model, guidance = module.teacher, module.guidance
    x_prev, x = torch.randn(2, 2, 1, 8, 8)
    t_prev, t, y = torch.tensor([600.0, 600.0]), torch.tensor([500.0, 500.0]), torch.tensor([0, 2])
    w_BLN = torch.rand(1, 3, 16).round().expand(2, -1, -1)
    soft = mixed_eps(model, guidance, record_caches(model, guidance, x_prev, t_prev, y), x, t, y, w_BLN)

    blocks = list(model.blocks)
    segments = tuple(partial(b, b + 1, tuple(w_BLN[0, b].nonzero()[:, 0].tolist())) for b in range(3))
    entries = [Entry(kind, b, b + 1) for b in range(3) for kind in ("k", "v", "span")]
    z, mods, _ = enter(model, guidance, x_prev, t_prev, y)
    _, cached = run_blocks(Step((compute(0, 3),), (None,), {}, entries), z, blocks, mods)
    z, mods, final = enter(model, guidance, x, t, y)
    z, _ = run_blocks(Step(segments, tuple(kept_tokens(s) for s in segments), cached, []), z, blocks, mods)
    assert torch.allclose(soft, guided_eps(model, guidance, z, final), atol=2e-5)


def test_soft_form_at_its_two_ends(teacher: TeacherSpec) -> None:
    module = make_distiller(teacher)
    model, guidance = module.teacher, module.guidance
    x_prev, x = torch.randn(2, 2, 1, 8, 8)
    t, y = torch.tensor([500.0, 90.0]), torch.tensor([0, 2])
    caches = record_caches(model, guidance, x_prev, t + 50, y)
    z, mods, final = enter(model, guidance, x, t, y)
    for block, mod in zip(model.blocks, mods, strict=True):
        z = block(z, mod)
    computed = mixed_eps(model, guidance, caches, x, t, y, torch.ones(2, 3, 16))
    assert torch.allclose(computed, guided_eps(model, guidance, z, final), atol=2e-5)
    reused = mixed_eps(model, guidance, caches, x, t, y, torch.zeros(2, 3, 16))
    assert torch.allclose(reused, reused_eps(model, guidance, caches, x, t, y), atol=2e-5)


def test_fit_learns_holds_the_budget_and_writes_everything(teacher: TeacherSpec, tmp_path: Path) -> None:
    module, rows = fit(teacher, tmp_path, 200, target_share=0.4, lr=0.03)
    assert abs(rows[-1]["train/mean_w"] - 0.4) < 0.02
    at_target = [row["train/distil_relative"] for row in rows if abs(row["train/mean_w"] - 0.4) < 0.05]
    assert sum(at_target[-20:]) / 20 < 0.95 * sum(at_target[:5]) / 5  # at equal cost, the error went down
    assert rows[-1]["train/macs_share"] == pytest.approx(0.4, abs=0.15)
    assert {"train/loss", "train/distil_mse", "train/lr", "val/distil_mse", "val/reuse_mse"} <= set(rows[-1])

    folder = tmp_path / "run"
    scores, plan = Scores.load(folder / "scores.safetensors"), CachePlan.load(folder / "plan.json")
    run = read_run(folder)
    assert (plan.model.teacher, plan.num_steps) == (module.teacher_digest, 6)
    assert (scores.teacher, scores.sampler) == (module.teacher_digest, sampler_digest(module.sampler))
    assert scores.cases == module.task.cases == CacheCases((0, 1, 2), (2, 3, 4), 2)
    assert abs(scores.importance_TLN[1:].mean() - 0.4) < 0.02
    assert (scores.importance_TLN[0] == 1).all()
    assert (scores.sensitivity_TL2[1:] > 0).all()
    assert (run.teacher, run.teacher_digest, run.name) == (teacher, module.teacher_digest, "run")
    assert (run.plan, run.scores) == (folder / "plan.json", folder / "scores.safetensors")
    lines = (folder / "candidates.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "plan,mse"
    full, every_other = (float(line.split(",")[1]) for line in lines[1:3])
    assert full < 1e-8 * every_other  # the plan that computes everything differs by rounding alone
    assert {p.name for p in (folder / "figures").iterdir()} == {"importance.png", "sensitivity.png"}


def test_teacher_is_frozen_and_in_neither_optimiser_nor_checkpoint(teacher: TeacherSpec, tmp_path: Path) -> None:
    module, _ = fit(teacher, tmp_path, 2)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert all(name.startswith("predictor.") or name == "multiplier" for name in checkpoint["state_dict"])
    assert checkpoint["teacher_digest"] == module.teacher_digest
    assert "hyper_parameters" not in checkpoint
    optimised = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in module.tokens.predictor.parameters()} == {id(p) for p in module.parameters()}
    reloaded = make_distiller(teacher).teacher.state_dict()
    assert all(torch.equal(value, reloaded[name]) for name, value in module.teacher.state_dict().items())


@pytest.mark.parametrize("guidance", [{"guidance_scale": 1.0}, {"guidance_scale": 2.0, "guidance_channels": 1}])
def test_bf16_mixed_precision(teacher: TeacherSpec, tmp_path: Path, guidance: dict[str, Any]) -> None:
    spec = make_teacher(tmp_path, seed=3)
    module, rows = fit(spec, tmp_path, 3, trainer={"precision": "bf16-mixed"}, **guidance)
    assert all(torch.isfinite(torch.tensor(row["train/loss"])) for row in rows)
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_fast_dev_run_does_not_plan(teacher: TeacherSpec, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1, fast_dev_run=True, default_root_dir=str(tmp_path))
    trainer.fit(make_distiller(teacher), make_data(teacher))
    assert not list(tmp_path.rglob("plan.json"))


def test_without_a_logger_the_root_folder_is_used_and_test_runs(teacher: TeacherSpec, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1, logger=False, enable_checkpointing=False, default_root_dir=str(tmp_path))
    module, data = make_distiller(teacher), make_data(teacher)
    trainer.fit(module, data)
    assert CachePlan.load(tmp_path / "plan.json").num_steps == 6
    (metrics,) = trainer.test(module, data, verbose=False)
    assert 0 < metrics["test/distil_mse"] < metrics["test/reuse_mse"]


def test_a_policy_that_asks_for_calibration_gets_it_and_it_is_kept(teacher: TeacherSpec, tmp_path: Path) -> None:
    module, _ = fit(teacher, tmp_path, 1, policy=DPPlacementPolicy(1.8))
    calibration = Calibration.load(tmp_path / "run" / "calibration.safetensors")
    assert (calibration.teacher, calibration.sampler) == (module.teacher_digest, sampler_digest(module.sampler))
    plan = CachePlan.load(tmp_path / "run" / "plan.json")
    assert plan.provenance["arguments"]["calibration"] == calibration.digest
    assert macs_speedup(plan) >= 1.8


def test_arguments_and_data_are_checked(teacher: TeacherSpec, tmp_path: Path) -> None:
    for wrong in ({"num_steps": 1}, {"target_share": 1.0}, {"sensitivity_samples": 0}):
        with pytest.raises(RunError):
            make_distiller(teacher, **wrong)
    data = make_data(teacher)
    make_trainer(tmp_path, 1, fast_dev_run=True).fit(make_distiller(teacher), data)
    with pytest.raises(RunError, match="planning needs trajectories"):
        make_trainer(tmp_path, 1).fit(make_distiller(teacher), DataLoader(data.pairs, 2))


def test_a_router_changes_nothing_for_the_tokens(teacher: TeacherSpec, tmp_path: Path) -> None:
    fit(teacher, tmp_path / "alone", 4)
    both, rows = fit(teacher, tmp_path / "both", 4, router=RouterSuperposition(every=2))
    scores = [Scores.load(tmp_path / name / "run" / "scores.safetensors") for name in ("alone", "both")]
    assert torch.equal(*(torch.tensor(s.importance_TLN) for s in scores))
    assert scores[0].router_TL2 is None
    assert scores[1].router_TL2 is not None
    assert abs(scores[1].router_TL2[1:] - INITIAL_IMPORTANCE).max() > 0.01
    assert {"train/router_error", "train/mean_w", "train/router_mean_w"} <= set(rows[0])

    checkpoint = {"state_dict": both.state_dict()}
    both.on_save_checkpoint(checkpoint)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"predictor", "multiplier", "router"}
    make_distiller(teacher, router=RouterSuperposition(every=2)).on_load_checkpoint(checkpoint)
    with pytest.raises(RunError, match="or others: restore predictor_hidden_size, train_tokens and router"):
        make_distiller(teacher).on_load_checkpoint(checkpoint)


def test_gradients_are_clipped_objective_by_objective(teacher: TeacherSpec) -> None:
    module = make_distiller(teacher, router=RouterSuperposition())
    for kind, size in (("norm", 5.0), ("value", 5.0), (None, 5.0)):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, size)
        module.configure_gradient_clipping(torch.optim.SGD(module.parameters(), 1.0), 2.0 if kind else None, kind)
        for objective in module.objectives:
            gradients = [p.grad for p in objective.parameters() if p.grad is not None]
            norm, largest = torch.cat([g.flatten() for g in gradients]).norm(), max(float(g.max()) for g in gradients)
            assert (norm if kind == "norm" else largest) == pytest.approx(2.0 if kind else 5.0, rel=1e-4)


def test_what_is_not_trained_is_refused_before_training(teacher: TeacherSpec, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing is trained"):
        make_distiller(teacher, train_tokens=False)
    with pytest.raises(RunError, match="RouterRollout trains on rollouts, tokens on pairs: set train_tokens to false"):
        make_distiller(teacher, router=RouterRollout())
    with pytest.raises(RunError, match="HarmoniCaPolicy needs router_TL2, which nothing trains"):
        fit(teacher, tmp_path, 1, policy=HarmoniCaPolicy())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_rollouts_train_a_router_and_plan_with_it(teacher: TeacherSpec, tmp_path: Path) -> None:
    roll_out(teacher, tmp_path)
    scores, plan = Scores.load(tmp_path / "run" / "scores.safetensors"), CachePlan.load(tmp_path / "run" / "plan.json")
    assert scores.router_TL2 is not None
    assert abs(scores.router_TL2[1:] - INITIAL_IMPORTANCE).max() > 0
    assert (scores.importance_TLN == 1).all()
    assert plan.provenance["policy"] == "harmonica"
    assert macs_speedup(plan) >= 1.5


def test_the_signature_is_the_schema_of_a_config(teacher: TeacherSpec) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TokenCacheDistiller, "model")
    policy = {"class_path": "tc_lightning.policies.tprr.TPRRPolicy"}
    config = parser.parse_object({"model": {"teacher": {"weights": teacher.weights}, "num_steps": 4, "policy": policy}})
    module = parser.instantiate_classes(config).model
    assert len(module.sampler) == 4
    assert type(module.policy) is type(make_distiller(teacher, policy=None).policy) is TPRRPolicy


def test_sensitivity_of_a_trajectory_starts_with_a_zero_row(teacher: TeacherSpec) -> None:
    module = make_distiller(teacher, num_steps=12)
    plan = full_plan(module.signature, module.sampler, module.guidance)
    x_1CHW, label_1 = torch.randn(1, 1, 8, 8), torch.tensor([2])
    rows = trajectory_sensitivity(module.teacher, plan, x_1CHW, label_1, 0, 2)
    assert rows.shape == (12, 3, 2)
    assert rows.dtype == torch.float64
    assert not rows[0].any()
    assert (rows[1:] > 0).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_channels": 0}, "guidance_channels is 0; the teacher has 1: choose 1 to 1"),
        ({"guidance_channels": 2}, "guidance_channels is 2"),
        ({"lr": 0.0}, "lr is 0"),
        ({"num_steps": 1}, "num_steps is 1"),
        ({"target_share": 1.0}, "target_share is 1"),
        ({"orders": (3,)}, r"orders are \[3\]: name at least one, each 0 to 2"),
        ({"gaps": ()}, "gaps are"),
    ],
)
def test_settings_out_of_range(teacher: TeacherSpec, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        make_distiller(teacher, **wrong)


def test_a_target_out_of_reach_is_refused_before_training(teacher: TeacherSpec, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not reachable with 6 steps"):
        fit(teacher, tmp_path, 2, policy=TPRRPolicy(target_speedup=30.0))
    assert not list(tmp_path.rglob("*.ckpt"))
