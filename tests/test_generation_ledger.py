"""The folder of shards: what is whole is kept, the rest is made again, and nothing foreign is touched."""

from __future__ import annotations

import json
import shutil

import pytest
from generating import contents, job_for, make

from export.generation.job import name_of
from export.generation.ledger import LEDGER, Ledger
from tc_lightning.errors import TokenCacheError


@pytest.fixture
def whole(artefact, tmp_path):
    """A finished run of three shards, and its job."""
    job = job_for(artefact, tmp_path / "out")
    assert make(job) == [0, 1, 2]
    return job


def test_what_is_whole_is_kept(whole, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert make(whole) == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")} == before


@pytest.mark.parametrize("place", [0, 0.3, 0.7, -1])
def test_a_shard_of_which_a_bit_is_wrong_is_made_again(whole, tmp_path, place):
    before = contents(tmp_path / "out")
    content = bytearray(before[name_of(1)])
    content[int(place * len(content)) if place >= 0 else -1] ^= 16
    (tmp_path / "out" / name_of(1)).write_bytes(content)
    assert make(whole) == [1]
    assert contents(tmp_path / "out") == before


def test_shards_that_are_gone_cut_short_or_not_recorded_are_made_again(whole, tmp_path):
    out, before = tmp_path / "out", contents(tmp_path / "out")
    (out / name_of(0)).unlink()
    (out / name_of(1)).write_bytes(before[name_of(1)][:100])
    (out / f".{name_of(2)}.123.tmp").write_bytes(b"half")
    text = (out / LEDGER).read_text(encoding="utf-8")
    (out / LEDGER).write_text(text[: text.index('"shard": 2') + 20], encoding="utf-8")  # a line that was being written
    assert make(whole) == [0, 1, 2]
    assert contents(out) == before
    assert make(whole) == []
    assert {path.name for path in out.iterdir()} == {*before, LEDGER, ".lock"}


def test_a_run_that_was_stopped_before_its_first_shard_leaves_the_folder_to_another(artefact, tmp_path):
    with Ledger(job_for(artefact, tmp_path / "out", seed=1)):
        pass
    assert make(job_for(artefact, tmp_path / "out", seed=2)) == [0, 1, 2]


def test_what_was_half_written_goes_when_a_run_is_interrupted(artefact, tmp_path):
    def interrupted() -> None:
        with Ledger(job_for(artefact, tmp_path / "out")) as ledger:
            (ledger.folder / f".{name_of(0)}.9.tmp").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {LEDGER, ".lock"}


def test_more_images_keep_the_first_ones(whole, artefact, tmp_path):
    before = contents(tmp_path / "out")
    assert make(job_for(artefact, tmp_path / "out", images=10)) == [2, 3]  # shard 2 had one image, and now has three
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in (name_of(0), name_of(1))} == {name: before[name] for name in (name_of(0), name_of(1))}
    with pytest.raises(TokenCacheError, match=r"holds images-00003\.parquet, which is none of the 3 shards of 7 images"):
        Ledger(whole)


@pytest.mark.parametrize("changes", [{"seed": 6}, {"guidance": 3.0}, {"full": True}, {"labels": ("drawn",)}, {"shard": 4}])
def test_another_run_is_named(whole, artefact, tmp_path, changes):
    name = next(iter(changes))
    with pytest.raises(TokenCacheError, match=rf"holds images of another run; different are {name} \(.* before, .* now\)"):
        Ledger(job_for(artefact, tmp_path / "out", **changes))


def test_another_plan_is_named(whole, unguided, tmp_path):
    with pytest.raises(TokenCacheError, match=r"different are the artefact's files, guidance .*, the plan"):
        Ledger(job_for(unguided, tmp_path / "out", keep=("latent",)))


def test_how_many_at_a_time_and_where_is_no_other_run(whole, artefact, tmp_path):
    shutil.copytree(artefact, tmp_path / "copy")
    shutil.copytree(tmp_path / "out", tmp_path / "moved")
    assert make(job_for(tmp_path / "copy", tmp_path / "moved", batch=1)) == []


def test_foreign_folders_are_left_alone(artefact, tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(TokenCacheError, match=r"is not empty, and notes\.txt in it was not made by this command"):
        Ledger(job_for(artefact, tmp_path))
    with pytest.raises(TokenCacheError, match="does not exist"):
        Ledger(job_for(artefact, tmp_path / "no" / "such"))
    with pytest.raises(TokenCacheError, match="it is no folder"):
        Ledger(job_for(artefact, tmp_path / "notes.txt"))
    with pytest.raises(TokenCacheError, match="nothing may be added to an artefact"):
        Ledger(job_for(artefact, artefact / "images"))


def test_a_damaged_ledger_is_not_guessed_at(whole, tmp_path):
    for text in ("", "{", "[]\n", "{}\n"):
        (tmp_path / "out" / LEDGER).write_text(text, encoding="utf-8")
        with pytest.raises(TokenCacheError, match="is damaged: it does not say which run"):
            Ledger(whole)


def test_one_run_at_a_time(whole):
    with Ledger(whole), pytest.raises(TokenCacheError, match="another process is making images in"):
        Ledger(whole)
    assert Ledger(whole).missing == []


def test_a_shard_that_did_not_arrive_is_no_shard(whole, tmp_path):
    """On a cluster without a shared folder the worker wrote it elsewhere."""
    with Ledger(whole) as ledger:
        with pytest.raises(TokenCacheError, match="`--out` must be a folder that all machines share"):
            ledger.record(json.loads(json.dumps(ledger.whole[1])) | {"bytes": 1})
        with pytest.raises(TokenCacheError, match="no room"):
            ledger.record({"shard": 1, "error": "no room"})
