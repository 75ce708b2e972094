"""Recording and reading of trajectories: the same bytes whoever records them, and damage that is found."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trajectory_sets import CPU, GUIDANCE, STEPS, contents, full_disk, recipe_for, record_set, tiny_teacher

from data.recording import prepare, record, reproducible
from data.shards import RECORD_BATCH, shard_path, write_atomically
from data.trajectories import PairDataset, TrajectorySet
from tc_lightning.errors import TrajectoryError
from tc_lightning.models.checkpoints import teacher_digest
from tc_lightning.rollout.noise import initial_noise
from tc_lightning.rollout.sampling import full_plan, labels_for, model_signature, noise_for, sample_steps


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
    pairs = PairDataset(trajectories, range(2, 9), reach=9)
    assert len(pairs) == 7 * (STEPS - 1)
    for item in range(len(pairs)):
        pair = pairs[item]
        index, step = 2 + item // (STEPS - 1), 1 + item % (STEPS - 1)
        assert (pair["index"], pair["step"], pair["label"]) == (index, step, labels[index])
        before = [states[max(step - back, 0)].x[index] for back in range(1, STEPS)]  # no step has more before it
        assert torch.equal(pair["x_prev"], torch.stack(before))
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
        patched.setattr(os, "fsync", full_disk)
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
