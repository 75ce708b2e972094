from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from data.rollouts import RolloutDataModule
from data.trajectory_module import TrajectoryDataModule
from tc_lightning.cache.semantics import Step, run_blocks
from tc_lightning.cache.soft_network import enter, guided_eps, mixed_eps, record_caches, reused_eps
from tc_lightning.errors import PlanError, RunError, TeacherError
from tc_lightning.learn.checkpointing import AtomicCheckpointIO
from tc_lightning.learn.distiller import TokenCacheDistiller
from tc_lightning.learn.objectives.rollout import RouterRollout
from tc_lightning.learn.objectives.superposition import RouterSuperposition
from tc_lightning.learn.planning import trajectory_sensitivity
from tc_lightning.measure.calibration import Calibration
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.checkpoints import TeacherSpec, save_teacher
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.models.predictor import INITIAL_IMPORTANCE
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.segments import compute, partial, skip
from tc_lightning.policies.base import PlanningContext, Policy
from tc_lightning.policies.choice import PlanChoice
from tc_lightning.policies.dp_placement import DPPlacementPolicy
from tc_lightning.policies.harmonica import HarmoniCaPolicy
from tc_lightning.policies.tprr import TPRRPolicy
from tc_lightning.rollout.sampling import full_plan, kept_tokens
from tc_lightning.runs.folder import read_run

CONFIG = DiTConfig(input_size=8, in_channels=1, hidden_size=24, depth=3, num_heads=2, num_classes=3, learn_sigma=False)


class EveryOtherStep(Policy):
    """Skips all blocks in odd steps."""

    def plan(self, context: PlanningContext) -> PlanChoice:
        L = context.signature.depth
        steps = tuple((skip(0, L),) if i % 2 else (compute(0, L),) for i in range(len(context.sampler)))
        plan = CachePlan(context.signature, context.sampler, context.guidance, steps, context.reference, {"policy": "every-other"})
        full = full_plan(context.signature, context.sampler, context.guidance)
        rows = [
            {"plan": "full", "mse": context.evaluate(full, 2)},
            {"plan": "every-other", "mse": context.evaluate(plan, None)},
        ]
        return PlanChoice(plan, rows)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return make_teacher(tmp_path_factory.mktemp("teacher"), seed=0)


def make_teacher(folder: Path, seed: int) -> TeacherSpec:
    path = folder / f"teacher{seed}.safetensors"
    save_teacher(randomise_(DiT(CONFIG), seed, 0.15), path)
    return TeacherSpec(str(path))


def make_distiller(teacher: TeacherSpec, **overrides: Any) -> TokenCacheDistiller:
    seed_everything(0, verbose=False)
    defaults: dict[str, Any] = {"num_steps": 6, "policy": EveryOtherStep(), "sensitivity_samples": 3, "sensitivity_probes": 2}
    return TokenCacheDistiller(teacher, **defaults | overrides)


def make_data(teacher: TeacherSpec, kind: type[TrajectoryDataModule] = TrajectoryDataModule) -> TrajectoryDataModule:
    root = Path(teacher.weights).with_suffix(".trajectories")
    return kind(str(root), num_train=12, num_val=4, batch_size=10)


class InOrder(TrajectoryDataModule):
    """The same batches in every epoch, so that a resumed run sees those of an uninterrupted one."""

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.pairs, shuffle=False)


def make_trainer(folder: Path, steps: int, **overrides: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "logger": CSVLogger(str(folder), name="", version="run"),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
        "gradient_clip_val": 1.0,
        "use_distributed_sampler": False,
    }
    return Trainer(**defaults | overrides)


class Recorder(Callback):
    """Keeps what was logged at each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(
    teacher: TeacherSpec, folder: Path, steps: int, trainer: dict[str, Any] | None = None, **overrides: Any
) -> tuple[TokenCacheDistiller, list[dict[str, float]]]:
    recorder, module = Recorder(), make_distiller(teacher, **overrides)
    make_trainer(folder, steps, callbacks=[recorder], **trainer or {}).fit(module, make_data(teacher))
    return module, recorder.rows


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


def test_resume_goes_on_as_if_nothing_had_happened(teacher: TeacherSpec, tmp_path: Path) -> None:
    half, options = tmp_path / "half.ckpt", {"limit_train_batches": 3, "enable_checkpointing": False}
    in_order = make_data(teacher, InOrder)
    straight = make_distiller(teacher)
    make_trainer(tmp_path / "straight", 6, **options, callbacks=[SaveFirstEpoch(half)]).fit(straight, in_order)
    resumed = make_distiller(teacher)
    make_trainer(tmp_path / "resumed", 6, **options).fit(resumed, in_order, ckpt_path=str(half))
    assert resumed.trainer.global_step == 6
    for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


class SaveFirstEpoch(Callback):
    """Saves a checkpoint at the end of the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_resume_of_a_finished_run_makes_the_plan_again(teacher: TeacherSpec, tmp_path: Path) -> None:
    module, _ = fit(teacher, tmp_path, 2)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = CachePlan.load(tmp_path / "run" / "plan.json")
    for name in ("plan.json", "run.json"):
        (tmp_path / "run" / name).unlink()
    make_trainer(tmp_path, 2).fit(make_distiller(teacher), make_data(teacher), ckpt_path=str(tmp_path / "last.ckpt"))
    assert CachePlan.load(tmp_path / "run" / "plan.json").digest == before.digest
    assert (tmp_path / "run" / "run.json").exists()


def test_resume_with_another_teacher_or_sampler_is_refused(teacher: TeacherSpec, tmp_path: Path) -> None:
    module, checkpoint = make_distiller(teacher), {}
    module.on_save_checkpoint(checkpoint)
    checkpoint["state_dict"] = module.state_dict()
    other = make_distiller(make_teacher(tmp_path, seed=1))
    with pytest.raises(TeacherError) as error:
        other.on_load_checkpoint(checkpoint)
    assert module.teacher_digest in str(error.value)
    assert other.teacher_digest in str(error.value)
    with pytest.raises(RunError, match="sampler"):
        make_distiller(teacher, num_steps=7).on_load_checkpoint(checkpoint)
    with pytest.raises(RunError, match="another size"):
        make_distiller(teacher, predictor_hidden_size=32).on_load_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)


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


def roll_out(teacher: TeacherSpec, folder: Path, trainer: dict[str, Any] | None = None) -> None:
    """Two groups of rollouts of which the second is cut short."""
    data = RolloutDataModule(str(Path(teacher.weights).with_suffix(".trajectories")), 12, 4, batch_size=4, groups=2)
    module = make_distiller(teacher, train_tokens=False, router=RouterRollout(), lr=0.1, policy=HarmoniCaPolicy(1.5))
    make_trainer(folder, 8, **trainer or {}).fit(module, data)


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


def run_two(script: Path) -> None:
    """Run both ranks, as a cluster would: started from outside, so that both import at the same time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    environments = [os.environ | shared | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(2)]
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, script], env=env, **options) for env in environments]
    try:
        errors = [rank.communicate(timeout=480)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(error[-2000:] for error in errors)


DDP_SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from test_distiller import RouterSuperposition, TeacherSpec, fit, roll_out

if __name__ == "__main__":
    both = dict(devices=2, strategy="ddp")
    module, _ = fit(TeacherSpec({weights!r}), Path({folder!r}), 4, trainer=both, router=RouterSuperposition(every=2))
    if module.global_rank == 0:
        torch.save(module.state_dict(), Path({folder!r}) / "state.pt")
    roll_out(TeacherSpec({weights!r}), Path({folder!r}) / "rollouts", trainer=both)
    torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(teacher: TeacherSpec, tmp_path: Path) -> None:
    alone, _ = fit(teacher, tmp_path / "one", 4, router=RouterSuperposition(every=2))
    roll_out(teacher, tmp_path / "one" / "rollouts")
    folder, tests = tmp_path / "two", Path(__file__).parent
    folder.mkdir()
    script = tmp_path / "run.py"
    names = {"tests": str(tests), "root": str(tests.parent), "weights": teacher.weights, "folder": str(folder)}
    script.write_text(DDP_SCRIPT.format(**names), encoding="utf-8")
    run_two(script)
    for name, value in torch.load(folder / "state.pt").items():
        assert torch.allclose(value, alone.state_dict()[name], atol=1e-4), name
    one, two = (Scores.load(path / "run" / "scores.safetensors") for path in (tmp_path / "one", folder))
    assert torch.allclose(torch.tensor(one.importance_TLN), torch.tensor(two.importance_TLN), atol=1e-4)
    assert torch.allclose(torch.tensor(one.sensitivity_TL2), torch.tensor(two.sensitivity_TL2), rtol=1e-4)
    for path in ("run", "rollouts/run"):
        routers = [Scores.load(root / path / "scores.safetensors").router_TL2 for root in (tmp_path / "one", folder)]
        assert np.allclose(*routers, atol=1e-4), path


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_channels": 0}, "guidance_channels is 0; the teacher has 1: choose 1 to 1"),
        ({"guidance_channels": 2}, "guidance_channels is 2"),
        ({"lr": 0.0}, "lr is 0"),
        ({"num_steps": 1}, "num_steps is 1"),
        ({"target_share": 1.0}, "target_share is 1"),
    ],
)
def test_settings_out_of_range(teacher: TeacherSpec, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        make_distiller(teacher, **wrong)


def test_a_target_out_of_reach_is_refused_before_training(teacher: TeacherSpec, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not reachable with 6 steps"):
        fit(teacher, tmp_path, 2, policy=TPRRPolicy(target_speedup=30.0))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_checkpoint_that_cannot_be_written_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {}}, path)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr("torch.save", full_disk)
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*last\.ckpt .*make room"):
        io.save_checkpoint({"state_dict": {}}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
