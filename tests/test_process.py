"""A sampler and the process that it lives in: threads, copies, forks."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from export.runtime import cuda_provider, sessions
from export.runtime.cuda_provider import Lane, RuntimeUnavailableError
from export.runtime.layout import CONDITION
from export.runtime.sampler import CachedSampler


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
    sampler._loaded._sessions = Yielding()

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
    open_session = sampler._loaded._open
    monkeypatch.setattr(sampler, "_exclusively", lane.run)
    monkeypatch.setattr(sampler._loaded, "_open", lambda name: (opened.append(threading.get_ident()), open_session(name))[1])
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
    with sampler._loaded._changing:
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
    with sampler._loaded._changing:  # a lock that was held at the time of the fork
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
