"""A sampler and the process that it lives in: threads, forks, copies, versions, devices, and how its files are laid out."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil
import sys
import threading
import time
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from artefacts import rewrite_manifest

from export import sample, verify
from export.compiler.symbolic import ONNXRUNTIME
from export.runtime import cuda_provider, sessions
from export.runtime.cuda_provider import Lane, RuntimeUnavailableError
from export.runtime.layout import CONDITION
from export.runtime.manifest import ArtefactError, read_manifest
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError

LABELS = [0, 3, 1]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sampler(artefact: Path) -> CachedSampler:
    return CachedSampler(artefact)


# Threads


class Yielding(dict):
    """Sessions whose look-ups let other threads run: between a look-up and the next one everything may happen."""

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        time.sleep(1e-4)
        return found

    def __getitem__(self, name: str) -> ort.InferenceSession:
        time.sleep(1e-4)
        return super().__getitem__(name)


def test_sessions_may_be_released_while_others_look_them_up(artefact):
    sampler, faults, done = CachedSampler(artefact, preload=False), [], threading.Event()
    sampler._sessions = Yielding()

    def look_up() -> None:
        try:
            for _ in range(60):
                sampler.session(CONDITION)
        except Exception as error:
            faults.append(error)

    def release() -> None:
        while not done.is_set():
            sampler.release()

    releasing, threads = threading.Thread(target=release), [threading.Thread(target=look_up) for _ in range(2)]
    for thread in (releasing, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    releasing.join()
    assert faults == []


def test_bindings_run_in_the_session_that_they_were_made_for(artefact, monkeypatch):
    """ONNX Runtime keeps a bare pointer from one to the other."""
    sampler, strangers = CachedSampler(artefact), []
    made: dict[int, ort.InferenceSession] = {}
    bind, run = ort.InferenceSession.io_binding, ort.InferenceSession.run_with_iobinding

    def io_binding(session: ort.InferenceSession) -> ort.IOBinding:
        binding = bind(session)
        made[id(binding)] = session
        return binding

    def run_with_iobinding(session: ort.InferenceSession, binding: ort.IOBinding, options: ort.RunOptions | None = None) -> None:
        strangers.append(made[id(binding)] is not session)
        run(session, binding, options)

    monkeypatch.setattr(ort.InferenceSession, "io_binding", io_binding)
    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", run_with_iobinding)
    found = sampler.sample([0], full=True, on_step=lambda *_: sampler.release())
    assert np.array_equal(found.latents, CachedSampler(artefact).sample([0], full=True).latents)
    assert len(strangers) > 8
    assert not any(strangers)


def test_sessions_are_opened_in_the_thread_of_the_gpu_alone(artefact, monkeypatch):
    """Even if others release them at the very end of a request: on CUDA no other thread may allocate memory."""
    sampler, lane, opened = CachedSampler(artefact, preload=False), Lane(), []
    open_session = sampler._open
    monkeypatch.setattr(sampler, "_exclusively", lane.run)
    monkeypatch.setattr(sampler, "_open", lambda name: (opened.append(threading.get_ident()), open_session(name))[1])
    run = sampler._run

    def release_afterwards(*given):
        result = run(*given)
        sampler.release()
        return result

    monkeypatch.setattr(sampler, "_run", release_afterwards)
    sampler.sample([0])
    assert set(opened) == {lane.run(lambda _: threading.get_ident())}


def test_profiles_are_asked_for_while_sessions_load(artefact, tmp_path):
    sampler = CachedSampler(artefact, preload=False, profile=tmp_path / "profile")
    sampler.session(CONDITION)
    with sampler._loading:
        asking = threading.Thread(target=sampler.end_profiling)
        asking.start()
        asking.join(0.2)
        assert asking.is_alive()  # waits for whoever changes the sessions
    asking.join()


def test_what_exists_once_in_a_process_is_made_by_one_thread(monkeypatch):
    """A lane and an arena, asked for by eight threads at once."""
    made = []

    class Slow(Lane):
        def __init__(self) -> None:
            time.sleep(0.01)
            made.append(self)
            super().__init__()

    monkeypatch.setattr(cuda_provider, "Lane", Slow)
    monkeypatch.setattr(sessions, "_arena", [])
    monkeypatch.setattr(ort, "create_and_register_allocator", lambda *_: time.sleep(0.01))
    cuda_provider._lane.cache_clear()
    calls = [cuda_provider.lane, lambda: sessions.prepare("cpu", None)]
    threads = [threading.Thread(target=call) for call in calls for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cuda_provider._lane.cache_clear()
    assert len(made) == 1
    assert sessions._arena == [True]


# Copies and forks


@pytest.mark.parametrize("call", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_sampler_is_not_copied(sampler, artefact, call):
    with pytest.raises(RuntimeUnavailableError, match=r"cannot be copied or pickled.*make a sampler where it is needed") as caught:
        call(sampler)
    assert str(artefact) in str(caught.value)


def in_child(call) -> str:
    """What a call says in a forked child: `fine`, or its error."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def told() -> None:
        try:
            call()
            sender.send("fine")
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {error}")

    child = multiprocessing.get_context("fork").Process(target=told)
    child.start()
    found = receiver.recv() if receiver.poll(60) else "hangs"
    child.kill()
    child.join()
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="there are no forks")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_sampler_is_not_used_after_a_fork(sampler):
    uses = (lambda: sampler.sample([0]), lambda: sampler.session(CONDITION), sampler.release, sampler.end_profiling)
    with sampler._loading:  # a lock that was held at the time of the fork
        for use in uses:
            told = in_child(use)
            assert told.startswith("RuntimeUnavailableError: this CachedSampler was made in process")
            assert f"in process {os.getpid()} and" in told
            assert "Make the sampler in the process that uses it" in told
    assert sampler.sample([0]).latents.shape == (1, 4, 8, 8)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no forks")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_the_thread_of_the_gpu_does_not_survive_a_fork():
    cuda_provider.lane()
    assert "RuntimeUnavailableError: the process that this one was forked from has used CUDA" in in_child(
        lambda: cuda_provider.lane().run(lambda _: None)
    )


# Versions


def test_an_older_onnxruntime_is_named_before_anything_is_loaded(artefact, tmp_path, monkeypatch):
    copied = Path(shutil.copytree(artefact, tmp_path / "copy"))
    (copied / "step_00.onnx").write_bytes(b"written by a newer onnx")
    needs = read_manifest(artefact, check_files=False)["needs"]
    monkeypatch.setattr(ort, "InferenceSession", None)
    for wanted, found in ((needs["onnxruntime"], "1.24.1"), ("99.1", ort.__version__), ("1.30", "1.29.5"), ("1.24.10", "1.24.9")):
        rewrite_manifest(copied, needs=needs | {"onnxruntime": wanted})
        monkeypatch.setattr(ort, "__version__", found)
        with pytest.raises(ArtefactError, match=rf"needs onnxruntime >= {wanted}, found {found}: update it here") as caught:
            CachedSampler(copied)
        assert "Export it again" not in str(caught.value)


@pytest.mark.parametrize("found", ["1.24.2", "1.24.2.dev20260101", "1.31.0", "2.0"])
def test_a_newer_onnxruntime_will_do(artefact, monkeypatch, found):
    monkeypatch.setattr(ort, "__version__", found)
    assert CachedSampler(artefact, preload=False).manifest["needs"]["onnxruntime"] == "1.24.2"


@pytest.mark.parametrize("needs", [None, [], {}, {"onnxruntime": 1.24}, {"onnxruntime": "new"}, {"onnxruntime": "1" * 5000 + ".0"}])
def test_needs_that_say_nothing(artefact, tmp_path, needs):
    copied = Path(shutil.copytree(artefact, tmp_path / "copy"))
    rewrite_manifest(copied, needs=needs)
    with pytest.raises(ArtefactError, match="does not say which onnxruntime it needs"):
        CachedSampler(copied)


def test_the_package_asks_for_the_onnxruntime_that_its_artefacts_need():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert f"onnxruntime-gpu>={ONNXRUNTIME}" in declared


def test_files_may_be_symbolic_links(artefact, tmp_path, sampler):
    """As model hubs lay them out: a folder of links into one of files that are named by their contents."""
    linked, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    linked.mkdir()
    blobs.mkdir()
    for name, entry in read_manifest(artefact)["files"].items():
        shutil.copy(artefact / name, blobs / entry["sha256"])
        (linked / name).symlink_to(Path("..", "blobs", entry["sha256"]))
    shutil.copy(artefact / "manifest.json", blobs / "manifest")
    (linked / "manifest.json").symlink_to(Path("..", "blobs", "manifest"))
    assert np.array_equal(CachedSampler(linked).sample(LABELS, seed=7).latents, sampler.sample(LABELS, seed=7).latents)


# Devices


@pytest.mark.parametrize(
    ("provider", "device", "message"),
    [
        ("cpu", -1, "device is -1: give the number of a GPU, 0 or more"),
        ("cuda", -1, "device is -1"),
        ("cuda", 1.0, "device is 1.0"),
        ("cuda", True, "device is True"),
        ("cuda", "0", "device is '0'"),
        ("cpu", 1, "device 1 was asked for, but provider cpu has no other than 0: ask for provider cuda"),
    ],
)
def test_devices_that_are_refused(artefact, provider, device, message):
    with pytest.raises(RuntimeUnavailableError, match=message):
        CachedSampler(artefact, provider=provider, device=device)


def test_a_device_that_is_not_there(artefact, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr("importlib.metadata.distributions", list)
    answers = {"cuDriverGetVersion": 99000, "cuDeviceGetCount": 2}
    monkeypatch.setattr(cuda_provider, "_ask_driver", answers.get)
    with pytest.raises(RuntimeUnavailableError, match="device 2 was asked for, but CUDA sees 2 here, numbered from 0: give 1 or less"):
        CachedSampler(artefact, provider="cuda", device=2)


def test_everything_is_put_on_the_device_that_was_asked_for(artefact, monkeypatch):
    """No GPU is needed to see what ONNX Runtime is asked for."""
    monkeypatch.setattr(cuda_provider, "_stream", {0: 10, 3: 13}.__getitem__)
    assert cuda_provider.provider_options(True, 3) | {"use_tf32": ""} == {
        "device_id": "3",
        "user_compute_stream": "13",
        "enable_cuda_graph": "1",
        "use_tf32": "",
        "arena_extend_strategy": "kSameAsRequested",
    }
    asked: list[tuple[str, int]] = []
    make = ort.OrtValue.ortvalue_from_shape_and_type

    def on_the_cpu_after_all(shape: list[int], kind: int, provider: str, device: int) -> ort.OrtValue:
        asked.append((provider, device))
        return make(shape, kind, "cpu", 0)

    def open_on_the_cpu(path: Path, provider: str, options: ort.SessionOptions, graphs: bool, device: int) -> ort.InferenceSession:
        asked.append((provider, device))
        plain = sessions.session_options("cpu", None, False, None)
        return ort.InferenceSession(str(path), plain, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", on_the_cpu_after_all)
    monkeypatch.setattr("export.runtime.sampler.open_session", open_on_the_cpu)
    monkeypatch.setattr("export.runtime.sampler.prepare", lambda *given: asked.append((given[0], given[2])))
    manifest = read_manifest(artefact)
    assert all(program["graph"] == name for name, program in manifest["programs"].items())  # as if exported for CUDA
    sampler = CachedSampler(artefact, provider="cuda", device=3, manifest=manifest)
    result = sampler.sample(LABELS, seed=7)
    assert result.receipt["device"] == 3
    assert len(asked) > len(manifest["weights"]) / 2
    assert set(asked) == {("cuda", 3)}


@pytest.mark.parametrize("command", [sample, verify])
def test_commands_hand_the_device_on(artefact, monkeypatch, command):
    arguments = ["--labels", "0"] if command is sample else []
    monkeypatch.setattr(sys, "argv", ["command", str(artefact), *arguments, "--device", "1"])
    with pytest.raises(TokenCacheError, match="device 1 was asked for, but provider cpu"):
        command.main()
