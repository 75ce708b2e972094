"""Many images: what a shard holds, and how it follows from the index of an image alone."""

from __future__ import annotations

import dataclasses
import io
import json
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
from generating import contents, full_disk, job_for, make, rows_in
from PIL import Image

from export.generation.engine import require_workers
from export.generation.job import Job, name_of
from export.generation.labels import given_for, require_labels
from export.generation.npz import require_npz, write_npz
from export.generation.shard import as_parquet, table_of
from export.generation.worker import ShardMaker
from export.grid import png_of, to_pixels
from export.runtime.manifest import sha256_of
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import Condition

LABEL = Condition("label", "int64", (), 5, 5)
TEXT = Condition("text", "fp32", (2,), 0.0)


@pytest.fixture(scope="module")
def alone(artefact: Path) -> CachedSampler:
    return CachedSampler(artefact, threads=1)


# Rows


def test_an_image_is_the_one_that_it_would_get_alone(artefact, alone, tmp_path):
    make(job_for(artefact, tmp_path / "out", guidance=2.0))
    rows = rows_in(tmp_path / "out")
    assert [row["index"] for row in rows] == list(range(7))
    for row in rows:
        made = alone.sample([row["label"]], seed=row["seed"], first_index=row["index"], guidance=row["guidance"]).latents[0]
        assert np.array_equal(np.array(row["latent"], np.float32), made)


def test_shards_and_batches_of_another_size_hold_the_same_images(artefact, tmp_path):
    make(job_for(artefact, tmp_path / "a"))
    make(job_for(artefact, tmp_path / "b", shard=4, batch=4))
    assert rows_in(tmp_path / "a") == rows_in(tmp_path / "b")


def test_full_compute_is_the_reference(artefact, alone, tmp_path):
    make(job_for(artefact, tmp_path / "out", images=1, full=True))
    row = rows_in(tmp_path / "out")[0]
    assert row["full"] is True
    assert np.array_equal(np.array(row["latent"], np.float32), alone.sample([0], seed=5, full=True).latents[0])


def test_a_row_says_what_it_is_of(unguided, tmp_path):
    job = job_for(unguided, tmp_path / "out", keep=("image", "latent"))
    make(job)
    row = rows_in(tmp_path / "out")[6]
    picture = np.asarray(Image.open(io.BytesIO(row.pop("image")["bytes"])))
    latent = np.array(row.pop("latent"), np.float32)
    assert np.array_equal(picture, to_pixels(latent[None])[0])
    assert row == {
        "index": 6,
        "seed": 5,
        "guidance": 1.0,
        "full": False,
        "plan_digest": json.loads((unguided / "manifest.json").read_text(encoding="utf-8"))["plan_digest"],
        "label": 1,
        "failed": None,
    }


def test_datasets_reads_pictures_and_latents(unguided, tmp_path):
    make(job_for(unguided, tmp_path / "out", keep=("image", "latent")))
    found = datasets.load_dataset("parquet", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), split="train")
    assert found["index"][:] == list(range(7))
    assert found[3]["image"].size == (8, 8)
    assert found.with_format("numpy")[3]["latent"].shape == (3, 8, 8)


def test_an_image_that_fails_leaves_the_others(artefact, tmp_path):
    """Of a guidance scale of 1e38 nothing finite comes."""
    make(job_for(artefact, tmp_path / "out", guidance=1e38))
    assert {("NaN or infinite" in row["failed"]) for row in rows_in(tmp_path / "out")} == {True}


# Conditions


def test_labels_follow_from_the_index():
    def labels(indices, *choice, seed=0):
        return given_for((LABEL,), indices, seed, choice, {})["label"].tolist()

    assert labels(range(7), "balanced") == [0, 1, 2, 3, 4, 0, 1]
    assert labels(range(3, 6), "balanced") == [3, 4, 0]
    assert labels(range(5), 4, 1) == [4, 1, 4, 1, 4]
    many = labels(range(2000), "drawn")
    assert many[700:705] == labels(range(700, 705), "drawn")
    assert many != labels(range(2000), "drawn", seed=1)
    assert all(abs(many.count(c) - 400) < 5 * 18 for c in range(5))  # five standard deviations


def test_rows_of_a_file_are_taken_in_turn():
    table = {"text": np.arange(6, dtype=np.float32).reshape(3, 2)}
    found = given_for((TEXT, LABEL), range(2, 5), 0, ("balanced",), table)
    assert found["text"].tolist() == [[4, 5], [0, 1], [2, 3]]
    assert found["label"].tolist() == [2, 3, 4]
    with pytest.raises(TokenCacheError, match=r"takes text, which cannot be chosen .* `--conditions FILE`"):
        given_for((TEXT,), range(1), 0, ("balanced",), {})


def test_rows_say_which_row_of_a_file_they_are_of(artefact, tmp_path):
    np.savez(tmp_path / "rows.npz", label=np.array([3, 1]))
    make(job_for(artefact, tmp_path / "out", conditions=str(tmp_path / "rows.npz")))
    rows = rows_in(tmp_path / "out")
    assert [row["label"] for row in rows] == [3, 1, 3, 1, 3, 1, 3]
    assert [row["conditions_row"] for row in rows] == [0, 1, 0, 1, 0, 1, 0]
    assert {row["conditions_sha256"] for row in rows} == {sha256_of(tmp_path / "rows.npz")}


@pytest.mark.parametrize(
    ("labels", "table", "message"),
    [
        (("many",), {}, "labels many are neither"),
        (("balanced", 1), {}, "labels balanced 1 are neither"),
        ((5,), {}, r"label 5 is not a class: the artefact has classes 0 to 4"),
        ((-1,), {}, "label -1 is not a class"),
        ((1,), {"label": np.zeros(2)}, "every condition of the artefact comes from elsewhere"),
    ],
)
def test_labels_that_cannot_be(labels, table, message):
    with pytest.raises(TokenCacheError, match=message):
        require_labels((LABEL,), labels, table)


# What is refused before anything runs


def test_what_an_artefact_cannot_give_is_refused(artefact, unguided, tmp_path):
    with pytest.raises(TokenCacheError, match="has no decoder, so there are no images to store: ask for `--keep latent`"):
        job_for(artefact, tmp_path / "out", keep=("image",))
    with pytest.raises(TokenCacheError, match="planned at scale 1 and holds no unconditional half"):
        job_for(unguided, tmp_path / "out", guidance=2.0)
    with pytest.raises(TokenCacheError, match="does not exist"):
        job_for(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(TokenCacheError, match="these are not kept: ask for `--keep image`"):
        require_npz(job_for(artefact, tmp_path / "out"), tmp_path / "a.npz")
    with pytest.raises(TokenCacheError, match="guidance nan is not a number that can be used"):
        job_for(artefact, tmp_path / "out", guidance=float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_evaluators_stays_out_of_the_shards_folder(unguided, tmp_path):
    """`datasets` reads all that is there."""
    (tmp_path / "out").mkdir()
    with pytest.raises(TokenCacheError, match="all files beside the shards are read as shards"):
        require_npz(job_for(unguided, tmp_path / "out", keep=("image",)), tmp_path / "out" / "images.npz")


def test_more_workers_than_cores_are_refused():
    require_workers(1, "cpu", None)
    with pytest.raises(TokenCacheError, match=r"100000 workers were asked for, .* at most, or leave `--workers` out"):
        require_workers(100_000, "cpu", None)


# Faults of a worker come back in words


def test_a_full_disk_leaves_no_half_of_a_shard(artefact, tmp_path):
    (tmp_path / "out").mkdir()
    job, maker = job_for(artefact, tmp_path / "out"), ShardMaker()
    with full_disk(1000):
        told = json.loads(maker({"job": [job.to_json()], "shard": [1]})["line"][0])
    assert told["shard"] == 1
    assert "images-00001.parquet could not be made" in told["error"]
    assert "Free space or choose another folder" in told["error"]
    assert list((tmp_path / "out").iterdir()) == []
    assert "error" not in json.loads(maker({"job": [job.to_json()], "shard": [1]})["line"][0])


def test_another_artefact_at_the_same_place_is_noticed(artefact, tmp_path):
    job = dataclasses.replace(job_for(artefact, tmp_path / "out"), artefact_digest="0" * 64)
    told = json.loads(ShardMaker()({"job": [job.to_json()], "shard": [0]})["line"][0])
    assert "is not the one that this run began with" in told["error"]


# For evaluators


def test_npz_holds_the_pictures_in_order(unguided, tmp_path):
    job, seen = job_for(unguided, tmp_path / "out"), []
    make(job)
    write_npz(job, tmp_path / "all.npz", seen.append)
    with np.load(tmp_path / "all.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        found = file["arr_0"]
    pictures = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows_in(tmp_path / "out")]
    assert (found.dtype, found.shape) == (np.uint8, (7, 8, 8, 3))
    assert np.array_equal(found, np.stack(pictures))
    assert sum(seen) == 7


def fake_shard(job: Job, pictures: list[bytes | None]) -> None:
    """A shard of pictures that no model made."""
    given, latents = {"label": np.zeros(len(pictures), np.int64)}, np.zeros((len(pictures), 3, 1, 1), np.float32)
    content = as_parquet(table_of(job, (LABEL,), range(len(pictures)), given, 0, pictures, latents, {}))
    Path(job.out).mkdir()
    (Path(job.out) / name_of(0)).write_bytes(content)


def test_npz_is_never_in_memory_whole(unguided, tmp_path):
    noise = np.random.default_rng(0).uniform(-1, 1, (3, 64, 64)).astype(np.float32)
    job = job_for(unguided, tmp_path / "out", images=640, shard=640)
    fake_shard(job, [png_of(noise)] * 640)
    tracemalloc.start()
    try:
        write_npz(job, tmp_path / "all.npz", lambda _: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "all.npz").stat().st_size > 640 * 64 * 64 * 3
    assert peak < 640 * 64 * 64 * 3 / 2


def test_npz_lacks_no_image(unguided, tmp_path):
    job = job_for(unguided, tmp_path / "out", images=2, shard=2)
    fake_shard(job, [png_of(np.zeros((1, 4, 4), np.float32)), None])
    with pytest.raises(TokenCacheError, match=r"there is no image 1 \(images-00000\.parquet says .* why\)"):
        write_npz(job, tmp_path / "all.npz", lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list(contents(tmp_path / "out")) == [name_of(0)]
