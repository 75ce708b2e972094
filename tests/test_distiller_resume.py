"""Checkpoints of a distillation: runs that go on, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import fit, make_data, make_distiller, make_teacher, make_trainer
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from data.trajectory_module import TrajectoryDataModule
from tc_lightning.errors import RunError, TeacherError
from tc_lightning.learn.checkpointing import AtomicCheckpointIO
from tc_lightning.models.checkpoints import TeacherSpec
from tc_lightning.plan.cache_plan import CachePlan


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return make_teacher(tmp_path_factory.mktemp("teacher"), seed=0)


class InOrder(TrajectoryDataModule):
    """The same batches in every epoch, so that a resumed run sees those of an uninterrupted one."""

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.pairs, shuffle=False)


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
    with pytest.raises(RunError, match=r"trained for a cache that forecasts at order 0, 1 or 2 .* and the configured one .* order 1 "):
        make_distiller(teacher, orders=(1,)).on_load_checkpoint(checkpoint)
    del checkpoint["cases"]  # as before there were several
    with pytest.raises(RunError, match="trained for a cache that forecasts at order 0 from full steps 1 apart"):
        module.on_load_checkpoint(checkpoint)
    make_distiller(teacher, orders=(0,), gaps=(1,), kv_order=0).on_load_checkpoint(checkpoint)


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
