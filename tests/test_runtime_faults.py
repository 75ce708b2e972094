"""What may happen to a sampler while it runs: files that change, a disk that is full, signals, other processes."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from artefacts import LABELS
from test_runtime_integrity import flip_a_bit

import export
from export.grid import replacing
from export.runtime.manifest import ArtefactError
from export.runtime.sampler import CachedSampler
from tc_lightning.plan.atomic import write_atomically

ROOT = Path(export.__file__).parents[1]
PROBE = """
import hashlib, sys
from export.runtime.sampler import CachedSampler
sampler = CachedSampler(sys.argv[1], threads=1)
print("loaded", flush=True)
sys.stdin.readline()
for _ in range(5):
    print(hashlib.sha256(sampler.sample([0, 3, 1], seed=7).latents.tobytes()).hexdigest(), flush=True)
"""


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# A damaged file while running


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short])
def test_weights_that_change_under_a_sampler_are_noticed(copied, damage: Callable[[Path], None]):
    """They are mapped: without a look, images would be others, or a signal would end the process."""
    sampler = CachedSampler(copied)
    sampler.sample(LABELS)
    damage(copied / "weights.data")
    with pytest.raises(ArtefactError, match=r"weights\.data was changed while a sampler was using it"):
        sampler.sample(LABELS)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink])
def test_a_graph_that_changed_before_its_first_use_is_not_run(copied, damage: Callable[[Path], None]):
    """Full compute is loaded when it is first asked for; the plan goes on as before."""
    sampler = CachedSampler(copied)
    before = sampler.sample(LABELS, seed=7).latents
    damage(copied / "step_full.onnx")
    with pytest.raises(ArtefactError, match=r"step_full\.onnx.* (is damaged|it is truncated|is missing)"):
        sampler.sample(LABELS, full=True)
    assert np.array_equal(sampler.sample(LABELS, seed=7).latents, before)


def test_a_graph_that_changed_is_not_loaded_again(copied):
    sampler = CachedSampler(copied)
    sampler.release()
    flip_a_bit(copied / "condition.onnx")
    with pytest.raises(ArtefactError, match=r"condition\.onnx is damaged"):
        sampler.sample(LABELS)


def test_a_folder_that_takes_the_place_of_another_disturbs_nobody(copied, tmp_path):
    """As an export does: the sampler keeps the files that it has mapped."""
    sampler = CachedSampler(copied)
    before = sampler.sample(LABELS, seed=7).latents
    copied.rename(tmp_path / "old")
    shutil.copytree(tmp_path / "old", copied)
    shutil.rmtree(tmp_path / "old")
    flip_a_bit(copied / "weights.data")
    assert np.array_equal(sampler.sample(LABELS, seed=7).latents, before)


# A full disk


def test_a_full_disk_leaves_the_old_receipt(unguided, tmp_path):
    grid, receipt = tmp_path / "grid.png", tmp_path / "receipt.json"

    def sample(room: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "export" / "sample.py", unguided, "--labels", "0", "--out", grid, "--receipt", receipt]
        limits = (room, room)
        return subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        )

    assert sample(2**30).returncode == 0
    before, pixels = receipt.read_bytes(), grid.stat().st_size
    assert pixels < len(before)
    done = sample((pixels + len(before)) // 2)  # room for the picture, and not for what is said of it
    assert done.returncode == 2
    assert f"error: {receipt}: " in done.stderr
    assert "Free space or choose another folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert receipt.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "receipt.json"}


def test_whatever_is_written_whole_or_not_at_all_names_itself_where_it_fails(tmp_path, monkeypatch):
    """A write that fails on an open file names none."""

    def write(path: Path) -> None:
        with replacing(path) as temporary, temporary.open("wb"):
            raise OSError(28, "No space left on device")

    def no_sync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_sync)
    for call in (write, lambda path: write_atomically(path, b"content")):
        with pytest.raises(OSError, match="No space left") as caught:
            call(tmp_path / "receipt.json")
        assert caught.value.filename == str(tmp_path / "receipt.json")
    assert list(tmp_path.iterdir()) == []


# Signals


@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_signal_in_the_middle_of_a_request_ends_it_alone(artefact, step):
    sampler = CachedSampler(artefact)
    expected = sampler.sample(LABELS, seed=7).latents

    def on_step(done: int, _: int) -> None:
        if done == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        sampler.sample([2, 2], seed=1, on_step=on_step)
    assert np.array_equal(sampler.sample(LABELS, seed=7).latents, expected)


def test_signals_at_any_moment_leave_a_sampler_usable(artefact):
    """Wherever they find it: filling buffers, in a program, between two, or reading what was made."""
    sampler = CachedSampler(artefact, threads=1)
    expected, ended = sampler.sample(LABELS, seed=7).latents, 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for turn in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-4 * (turn + 1))
                sampler.sample([2] * 4, seed=turn)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                ended += 1
            assert np.array_equal(sampler.sample(LABELS, seed=7).latents, expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended > 0


# Processes


def test_two_processes_share_an_artefact(copied):
    pipe = subprocess.PIPE
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", PROBE, str(copied)]
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | {"PYTHONPATH": path}) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n"
    for process in both:  # both hold it, and begin together
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    made = [process.communicate(timeout=300)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [len(lines) for lines in made] == [5, 5]
    assert len({line for lines in made for line in lines}) == 1
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
