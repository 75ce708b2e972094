"""`python export/generate.py`: any number of workers makes the same shards, stopped in the middle or not. Ray is started four times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from generating import contents, job_for, make

import export
from export.generation.ledger import LEDGER, LOCK

pytest.importorskip("ray", reason="the extra [ray] is not installed")
SCRIPT = Path(export.__file__).parent / "generate.py"
IMAGES, SHARD = 160, 4
ASKED = ("--images", IMAGES, "--shard", SHARD, "--batch", 2, "--seed", 5, "--keep", "image", "latent")


def start(artefact: Path, out: Path, *arguments: object, without_torch: Path | None = None) -> subprocess.Popen[str]:
    """The command, in a session of its own; `without_torch`: a folder that makes a machine of this one which has no torch."""
    path = os.pathsep.join(filter(None, [str(without_torch or ""), str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(SCRIPT), str(artefact), "--out", str(out), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=os.environ | {"PYTHONPATH": path})


def finish(started: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit status, and what it said."""
    try:
        out, err = started.communicate(timeout=400)
    finally:
        for process in descendants(started.pid):
            os.kill(process, signal.SIGKILL)
    return started.returncode, out, err


def wait_for_shards(started: subprocess.Popen[str], out: Path, shards: int) -> None:
    """Until so many are recorded."""
    for _ in range(40_000):
        recorded = (out / LEDGER).read_text(encoding="utf-8").count('"sha256"') if (out / LEDGER).exists() else 0
        if recorded >= shards:
            return
        assert started.poll() is None, started.communicate()
        time.sleep(0.01)
    pytest.fail("no shards were made")


def descendants(process: int) -> list[int]:
    """A process and all that it has started, and those have."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with_name = _read(path).rpartition(")")
        if with_name[2]:
            parents[int(path.parent.name)] = int(with_name[2].split()[1])
    found = [process] if process in parents else []
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # it has just ended
        return ""


def listening(processes: list[int]) -> Iterator[str]:
    """Addresses, in hexadecimal, on which processes wait for connections."""
    own = set()
    for process in processes:
        for file in Path(f"/proc/{process}/fd").glob("*"):
            try:
                own.add(os.readlink(file))
            except OSError:
                continue
    for table in ("tcp", "tcp6"):
        for line in _read(Path("/proc/net") / table).splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in own:
                yield local.partition(":")[0]


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.fixture(scope="module")
def expected(unguided: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards as one process makes them without Ray."""
    out = tmp_path_factory.mktemp("expected") / "out"
    make(job_for(unguided, out, images=IMAGES, shard=SHARD, keep=("image", "latent")))
    return contents(out)


def test_one_worker_interrupted_and_started_again(unguided, expected, tmp_path):
    """On a machine without torch."""
    blocked, out = tmp_path / "blocked", tmp_path / "out"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('there is no torch here')\n", encoding="utf-8")
    first = start(unguided, out, *ASKED, "--workers", 1, without_torch=blocked)
    wait_for_shards(first, out, len(expected) // 3)
    first.send_signal(signal.SIGINT)
    status, _, err = finish(first)
    assert (status, "interrupted: nothing half-written" in err) == (130, True), err
    assert "Traceback" not in err
    assert {path.suffix for path in out.iterdir() if path.name not in (LEDGER, LOCK)} == {".parquet"}
    kept = contents(out)
    assert len(kept) < len(expected)
    status, told, err = finish(start(unguided, out, *ASKED, "--workers", 1, without_torch=blocked))
    assert status == 0, err
    assert "images are there already" in told
    assert contents(out) == expected


def test_two_workers_killed_and_started_again(unguided, expected, tmp_path):
    out, npz = tmp_path / "out", tmp_path / "all.npz"
    killed = start(unguided, out, *ASKED, "--workers", 2)
    wait_for_shards(killed, out, len(expected) // 3)
    everything = descendants(killed.pid)
    addresses = list(listening(everything))
    assert len(everything) > 3
    assert addresses
    assert set(addresses) <= LOOPBACK
    for process in everything:
        os.kill(process, signal.SIGKILL)
    finish(killed)
    assert len(contents(out)) < len(expected)
    status, _, err = finish(start(unguided, out, *ASKED, "--workers", 2, "--npz", npz))
    assert status == 0, err
    assert contents(out) == expected
    found = datasets.load_dataset("parquet", data_dir=str(out), cache_dir=str(tmp_path / "cache"), split="train")
    assert found["index"][:] == list(range(IMAGES))
    with np.load(npz) as file:
        assert np.array_equal(file["arr_0"][7], np.asarray(found[7]["image"]))
    again = start(unguided, out, *ASKED)  # there is nothing to do, and Ray is not started for it
    told = finish(again)
    assert (told[0], f"{IMAGES} images in {len(expected)} shards" in told[1]) == (0, True), told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--images", 0), "0 is not at least 1"),
        (("--images", 4, "--seed", -1), "-1 is not from 0 to 2**63 - 1"),
        (("--images", 4, "--workers", 100_000), "100000 workers were asked for"),
        (("--images", 4, "--labels", 99), "label 99 is not a class"),
        (("--images", 4, "--conditions", "none.npz"), "none.npz"),
        (("--images", 4, "--npz", "no/such/folder/a.npz"), "does not exist"),
    ],
)
def test_what_cannot_be_is_one_paragraph(unguided, tmp_path, arguments, words):
    status, _, err = finish(start(unguided, tmp_path / "out", *arguments))
    assert (status, words in err) == (2, True), err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
