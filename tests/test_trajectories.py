"""Recording and reading of trajectories. Run as a script, this file is one process of a training run (see `_train`)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import vp_sampler
from datasets import Dataset
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from data.recording import prepare, record, reproducible
from data.rollouts import RolloutDataModule
from data.shards import RECORD_BATCH, Recipe, shard_path, write_atomically
from data.trajectories import Pair, PairDataset, TrajectorySet
from data.trajectory_module import TrajectoryDataModule
from tc_lightning.errors import TokenCacheError, TrajectoryError
from tc_lightning.models.checkpoints import teacher_digest
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.plan.guidance import Guidance
from tc_lightning.rollout.noise import initial_noise
from tc_lightning.rollout.sampling import full_plan, labels_for, model_signature, noise_for, sample_steps

CPU = torch.device("cpu")
STEPS = 4
GUIDANCE = Guidance(1.5, 1)


def tiny_teacher(seed: int = 0) -> DiT:
    config = DiTConfig(8, 2, 2, 32, 2, 2, num_classes=5, learn_sigma=False)
    return randomise_(DiT(config), seed).eval().requires_grad_(False)


class Distiller(LightningModule):
    """The least that a TrajectoryDataModule asks of a module; keeps what it saw of each batch."""

    def __init__(self, seed: int = 0, steps: int = STEPS) -> None:
        super().__init__()
        self.teacher = tiny_teacher(seed)
        self.teacher_digest = teacher_digest(self.teacher)
        self.sampler, self.guidance = vp_sampler("ddim", steps), GUIDANCE
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
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


def recipe_for(teacher: DiT, seed: int = 0, sampler: str = "ddim", steps: int = STEPS) -> Recipe:
    return Recipe(teacher_digest(teacher), vp_sampler(sampler, steps), GUIDANCE, seed, (2, 8, 8), teacher.conditions)


def record_set(root: Path, num: int = 40) -> tuple[DiT, Recipe]:
    teacher = tiny_teacher()
    recipe = recipe_for(teacher)
    prepare(root, recipe, num)
    record(root, recipe, teacher, num, CPU)
    return teacher, recipe


def contents(root: Path) -> dict[str, str]:
    """sha256 of every file, hidden ones included."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.iterdir())}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    record_set(root)
    return root


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def test_rows_are_ordered_and_keyed(recorded: Path) -> None:
    table = TrajectorySet(recorded, recipe_for(tiny_teacher()), 40).table
    assert table.column_names == ["seed", "index", "step", "label", "latent", "eps"]
    assert list(table["index"]) == [i for i in range(40) for _ in range(STEPS + 1)]
    assert list(table["step"]) == list(range(STEPS + 1)) * 40
    shard = Dataset.from_file(str(shard_path(recorded, 1))).with_format("numpy")
    assert shard[0]["index"] == RECORD_BATCH
    assert (shard[0]["latent"] == initial_noise(0, [RECORD_BATCH], (2, 8, 8))[0]).all()
    assert not shard[STEPS]["eps"].any()


def test_content_is_what_the_sampler_does(recorded: Path) -> None:
    teacher = tiny_teacher()
    recipe = recipe_for(teacher)
    trajectories = TrajectorySet(recorded, recipe, 40)
    indices = range(RECORD_BATCH)
    plan = full_plan(model_signature(teacher), recipe.sampler, GUIDANCE)
    labels = labels_for(0, indices, 5)
    with reproducible(CPU):
        states = list(sample_steps(teacher, plan, noise_for(0, indices, teacher), labels))
    pairs = PairDataset(trajectories, range(2, 9))
    assert len(pairs) == 7 * (STEPS - 1)
    for item in range(len(pairs)):
        pair = pairs[item]
        index, step = 2 + item // (STEPS - 1), 1 + item % (STEPS - 1)
        assert (pair["index"], pair["step"], pair["label"]) == (index, step, labels[index])
        assert torch.equal(pair["x_prev"], states[step - 1].x[index])
        assert torch.equal(pair["x"], states[step].x[index])
        assert torch.equal(pair["eps"], states[step].eps[index])
    ends = trajectories.endpoints(range(3, 16))
    assert torch.equal(ends.noise, states[0].x[3:16])
    assert torch.equal(ends.latents, states[-1].x_next[3:16])
    assert torch.equal(ends.given["label"], labels[3:16])
    with pytest.raises(IndexError):
        trajectories.latent(40, 0)


def test_labels_are_balanced_and_independent_of_the_batch() -> None:
    labels = labels_for(3, range(100), 10)
    assert labels.bincount().tolist() == [10] * 10
    assert torch.equal(labels_for(3, range(37, 60), 10), labels[37:60])
    assert not torch.equal(labels_for(4, range(100), 10), labels)


def test_processes_resume_and_larger_sets_give_the_same_bytes(recorded: Path, tmp_path: Path) -> None:
    root, teacher = tmp_path / "set", tiny_teacher()
    recipe = recipe_for(teacher)
    prepare(root, recipe, 10)
    record(root, recipe, teacher, 10, CPU)  # a smaller set first
    for rank in (1, 0):
        prepare(root, recipe, 40)
        record(root, recipe, teacher, 40, CPU, rank, world_size=2)
    assert contents(root) == contents(recorded)


@pytest.mark.parametrize("damage", ["deleted", "truncated", "no index", "half an index"])
def test_incomplete_shards_are_recorded_again(recorded: Path, copy: Path, damage: str) -> None:
    path = shard_path(copy, 1)
    kept = shard_path(copy, 0).stat().st_mtime_ns
    match damage:
        case "deleted":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:1000])
        case "no index":
            path.with_suffix(".json").unlink()
        case _:
            path.with_suffix(".json").write_text('{"set": ', encoding="utf-8")
    with pytest.raises(TrajectoryError, match="shard-00001"):
        TrajectorySet(copy, recipe_for(tiny_teacher()), 40)
    record_set(copy)
    assert contents(copy) == contents(recorded)
    assert shard_path(copy, 0).stat().st_mtime_ns == kept


def test_threads_and_precision_settings_do_not_matter(recorded: Path, tmp_path: Path) -> None:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(2)
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            record_set(tmp_path)
        assert torch.get_num_threads() == 2
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    assert contents(tmp_path) == contents(recorded)


def test_another_recipe_is_refused_with_both_values(recorded: Path) -> None:
    ours, other = tiny_teacher(), tiny_teacher(1)
    with pytest.raises(TrajectoryError, match="delete this one") as error:
        prepare(recorded, recipe_for(other), 40)
    assert teacher_digest(ours) in str(error.value)
    assert teacher_digest(other) in str(error.value)
    for recipe, field in ((recipe_for(ours, sampler="dpmpp_2m"), "sampler"), (recipe_for(ours, seed=1), "seed")):
        with pytest.raises(TrajectoryError, match=rf"differ in {field} \(recorded \w+, now \w+\)\."):
            TrajectorySet(recorded, recipe, 40)
    with pytest.raises(TrajectoryError, match="ddpm adds noise"):
        recipe_for(ours, sampler="ddpm")


def test_a_flipped_bit_is_found(copy: Path) -> None:
    path = shard_path(copy, 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrajectoryError, match=r"shard-00002.arrow is damaged .* delete"):
        TrajectorySet(copy, recipe_for(tiny_teacher()), 40)


def test_a_lost_set_file_is_reported(copy: Path) -> None:
    (copy / "set.json").write_text("{", encoding="utf-8")
    with pytest.raises(TrajectoryError, match=r"set.json is missing or damaged: delete the folder"):
        prepare(copy, recipe_for(tiny_teacher()), 40)


def test_a_full_disk_leaves_nothing_under_a_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher()
    recipe = recipe_for(teacher)
    prepare(tmp_path, recipe, 16)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", _full)
        with pytest.raises(TrajectoryError, match=r"No space left") as error:
            record(tmp_path, recipe, teacher, 16, CPU)
    assert str(tmp_path) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set.json"]
    record(tmp_path, recipe, teacher, 16, CPU)
    TrajectorySet(tmp_path, recipe, 16)


def test_space_is_checked_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_for(tiny_teacher())
    prepare(tmp_path, recipe, 160)
    assert capsys.readouterr().out == f"recording 160 trajectories x {STEPS} steps: 0.96 MB in {tmp_path}\n"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
    with pytest.raises(TrajectoryError, match=r"0.96 MB and .* 0.01 MB free"):
        prepare(tmp_path, recipe, 160)


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrajectoryError, match="cannot create the trajectory folder"):
        prepare(tmp_path / "file", recipe_for(tiny_teacher()), 1)
    with pytest.raises(TrajectoryError, match="cannot write trajectories"):
        write_atomically(tmp_path / "missing" / "set.json", b"")


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
        os.fsync = _full
    with pytest.raises(TrajectoryError, match="No space left" if rank == 1 else "another process"):
        data.setup("fit")
    torch.distributed.destroy_process_group()  # Lightning leaves gloo's threads to the end of the process, which they can abort


def _full(fd: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    _train(Path(sys.argv[1]))
