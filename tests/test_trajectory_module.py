"""Trajectories as training reads them. Run as a script, this file is one process of a training run (see `_train`)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import vp_sampler
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from trajectory_sets import GUIDANCE, STEPS, contents, full_disk, tiny_teacher

from data.rollouts import RolloutDataModule
from data.trajectories import Pair
from data.trajectory_module import TrajectoryDataModule
from tc_lightning.errors import TokenCacheError, TrajectoryError
from tc_lightning.models.checkpoints import teacher_digest
from tc_lightning.rollout.noise import initial_noise
from tc_lightning.rollout.sampling import labels_for


class Distiller(LightningModule):
    """The least that a TrajectoryDataModule asks of a module; keeps what it saw of each batch."""

    reach = 2

    def __init__(self, seed: int = 0, steps: int = STEPS) -> None:
        super().__init__()
        self.teacher = tiny_teacher(seed)
        self.teacher_digest = teacher_digest(self.teacher)
        self.sampler, self.guidance = vp_sampler("ddim", steps), GUIDANCE
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        assert "x_prev" not in batch or batch["x_prev"].shape[1] == self.reach
        self.seen.append(torch.stack([torch.as_tensor(batch["index"]), torch.as_tensor(batch["step"])], 1).tolist())
        return (self.weight * batch.get("x", batch.get("noise"))).square().mean()

    def validation_step(self, batch: Pair, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], 0.1)


def run(data: TrajectoryDataModule, module: LightningModule | None = None, devices: int = 1, epochs: int = 2) -> LightningModule:
    module = module or Distiller()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=epochs,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module


def test_the_set_does_not_depend_on_the_batch_size(recorded: Path, tmp_path: Path) -> None:
    for size in (3, 8):
        data = TrajectoryDataModule(str(tmp_path / str(size)), 30, 10, batch_size=size)
        module = run(data)
        assert contents(data.root) == contents(recorded)
        assert all(len(batch) == size for batch in module.seen)
    first, second = module.seen[:11], module.seen[11:]
    assert first != second
    assert len({tuple(key) for batch in first for key in batch}) == 88
    assert len(data.pairs) == 90
    assert data.heldout().latents.shape == (10, 2, 8, 8)
    assert torch.equal(data.heldout().given["label"], labels_for(0, range(30, 40), 5))
    assert torch.equal(data.train_endpoints().noise[0], torch.from_numpy(initial_noise(0, [0], (2, 8, 8))[0]))
    held_out = torch.cat([batch["index"] for batch in data.val_dataloader()])
    assert set(held_out.tolist()) == set(range(30, 40))
    assert len(set(next(iter(data.val_dataloader()))["index"].tolist())) > 3  # shuffled: a few batches are of many samples


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    class Bare(Distiller):
        def __init__(self) -> None:
            super().__init__()
            del self.teacher, self.sampler

    with pytest.raises(TokenCacheError, match="Bare has no teacher, sampler"):
        run(TrajectoryDataModule(str(tmp_path)), Bare())
    with pytest.raises(TokenCacheError, match="larger than the 6 pairs"):
        run(TrajectoryDataModule(str(tmp_path), 30, 2))
    with pytest.raises(TokenCacheError, match="must be positive"):
        TrajectoryDataModule(str(tmp_path), num_val=0)
    with pytest.raises(TokenCacheError, match="before `setup`"):
        _ = TrajectoryDataModule(str(tmp_path)).pairs
    assert not list(tmp_path.iterdir())


def test_two_processes_record_and_see_what_one_does(recorded: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    shared = os.environ | {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    processes = []
    for rank in range(2):  # another number of threads in each
        environment = shared | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(rank + 1)}
        command = [sys.executable, __file__, str(tmp_path)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        for process in processes:
            output, _ = process.communicate(timeout=180)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    assert contents(tmp_path / "set") == contents(recorded)
    one = run(TrajectoryDataModule(str(recorded), 30, 10, batch_size=8)).seen
    ranks = [json.loads((tmp_path / f"seen-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in one]


def test_rollouts_go_through_their_steps_together(recorded: Path) -> None:
    """The processes' batches together are those of one process, and noise is a function of (seed, index)."""
    data = RolloutDataModule(str(recorded), 8, 4, batch_size=4, groups=2)
    seen = run(data, epochs=1).seen
    assert [[step for _, step in batch] for batch in seen] == [[step] * 4 for _ in range(2) for step in range(1, STEPS)]
    assert [[index for index, _ in batch] for batch in seen[:: STEPS - 1]] == [[12, 13, 14, 15], [16, 17, 18, 19]]
    item = data.rollouts[4 * (STEPS - 1) + 1]
    assert torch.equal(item["noise"], torch.from_numpy(initial_noise(0, [17], (2, 8, 8))[0]))
    assert item["label"] == int(labels_for(0, range(17, 18), 5)[0])
    with pytest.raises(IndexError):
        data.rollouts[len(data.rollouts)]
    with pytest.raises(TokenCacheError, match="groups"):
        RolloutDataModule(str(recorded), groups=0)


def _train(folder: Path) -> None:
    """One of two processes of a training run."""
    data, module = TrajectoryDataModule(str(folder / "set"), 30, 10, batch_size=8), Distiller()
    run(data, module, devices=2)
    rank = module.trainer.global_rank
    (folder / f"seen-{rank}.json").write_text(json.dumps(module.seen), encoding="utf-8")

    data = TrajectoryDataModule(str(folder / "odd"), 30, 10, batch_size=7)
    data.trainer = module.trainer
    with pytest.raises(TokenCacheError, match="multiple of 2"):
        data.setup("fit")

    # Process 1 cannot write; process 0 must fail too instead of waiting for it.
    data = TrajectoryDataModule(str(folder / "failing"), 30, 10, batch_size=8)
    data.trainer = module.trainer
    if rank == 1:
        os.fsync = full_disk
    with pytest.raises(TrajectoryError, match="No space left" if rank == 1 else "another process"):
        data.setup("fit")
    torch.distributed.destroy_process_group()  # Lightning leaves gloo's threads to the end of the process, which they can abort


if __name__ == "__main__":
    _train(Path(sys.argv[1]))
