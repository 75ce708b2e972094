"""What the tests of distillation share: tiny teachers, distillers, data and trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from data.rollouts import RolloutDataModule
from data.trajectory_module import TrajectoryDataModule
from tc_lightning.learn.distiller import TokenCacheDistiller
from tc_lightning.learn.objectives.rollout import RouterRollout
from tc_lightning.models.checkpoints import TeacherSpec, save_teacher
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.segments import compute, skip
from tc_lightning.policies.base import PlanningContext, Policy
from tc_lightning.policies.choice import PlanChoice
from tc_lightning.policies.harmonica import HarmoniCaPolicy
from tc_lightning.rollout.sampling import full_plan

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


def roll_out(teacher: TeacherSpec, folder: Path, trainer: dict[str, Any] | None = None) -> None:
    """Two groups of rollouts of which the second is cut short."""
    data = RolloutDataModule(str(Path(teacher.weights).with_suffix(".trajectories")), 12, 4, batch_size=4, groups=2)
    module = make_distiller(teacher, train_tokens=False, router=RouterRollout(), lr=0.1, policy=HarmoniCaPolicy(1.5))
    make_trainer(folder, 8, **trainer or {}).fit(module, data)
