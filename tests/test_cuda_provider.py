"""The thread of the GPU, and what CUDA needs."""

from __future__ import annotations

import signal
import threading
import time

import onnxruntime as ort
import pytest

from export.bench.timing import require_on_device
from export.runtime import cuda_provider
from export.runtime.cuda_provider import Lane, RuntimeUnavailableError, Stopped, in_short, why_no_graphs
from tc_lightning.errors import TokenCacheError

# The thread of the GPU


def test_a_lane_runs_one_call_at_a_time_in_its_thread():
    lane, seen, running = Lane(), [], threading.Lock()

    def call(_: object) -> int:
        assert running.acquire(blocking=False)
        time.sleep(0.01)
        running.release()
        seen.append(threading.get_ident())
        return len(seen)

    threads = [threading.Thread(target=lane.run, args=(call,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert lane.run(call) >= 1
    for thread in threads:
        thread.join()
    assert len(seen) == 4
    assert len(set(seen)) == 1
    assert seen[0] != threading.get_ident()


def test_a_call_within_a_call_does_not_wait_for_it():
    lane = Lane()
    assert lane.run(lambda _: lane.run(lambda _: "inner") + ", outer") == "inner, outer"


def test_a_lane_passes_exceptions_on_and_stays_usable():
    lane = Lane()
    with pytest.raises(ZeroDivisionError):
        lane.run(lambda _: 1 // 0)
    assert lane.run(lambda _: 3) == 3


def test_an_interrupt_stops_the_call_before_it_comes_back():
    lane, ended, deadline = Lane(), [], time.monotonic() + 10

    def call(check):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        try:
            while time.monotonic() < deadline:
                check()
                time.sleep(0.01)
        except Stopped:
            ended.append(True)
            raise

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            lane.run(call)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [True]
    assert lane.run(lambda _: "usable") == "usable"


# What CUDA needs


def test_a_driver_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(cuda_provider, "_driver_version", lambda: "11.8")
    monkeypatch.setattr(cuda_provider, "_built_for", lambda: "13.0")
    with pytest.raises(RuntimeUnavailableError, match=r"for CUDA 13\.0, but the driver here is for CUDA 11\.8: update"):
        cuda_provider._require_driver()
    monkeypatch.setattr(cuda_provider, "_driver_version", lambda: "13.2")
    cuda_provider._require_driver()


def test_a_failure_in_cuda_is_told_in_short():
    message = "[ONNXRuntimeError] : 1 : FAIL : /src/cuda_call.cc:154 CUDNN failure 1001: NOT_INITIALIZED ; GPU=0 ; file=/src/x.cc"
    assert in_short(RuntimeError(message)) == "CUDNN failure 1001: NOT_INITIALIZED."
    assert in_short(RuntimeError("first\nsecond")) == "first"
    assert "CUDNN failure 1001: NOT_INITIALIZED. (onnxruntime-gpu" in str(cuda_provider.cuda_error("it fails", RuntimeError(message)))


@pytest.mark.parametrize(("version", "trusted"), [("1.24.1", False), ("1.30.2", False), ("1.31.0", True), ("2.0.0", True)])
def test_graphs_need_a_version_that_replays_them_rightly(monkeypatch, version, trusted):
    monkeypatch.setattr(ort, "__version__", version)
    assert (why_no_graphs() is None) is trusted
    assert trusted or f"{version}: " in str(why_no_graphs())


def test_the_benchmark_refuses_times_of_something_else():
    counts = {"captured": 0, "replayed": 50, "plain": 0, "off": None}
    receipt = {
        "nodes_per_provider": {"step_00": {"CUDAExecutionProvider": 9}},
        "steps_per_program": {"step_00": 50},
        "cuda_graphs": counts,
    }
    require_on_device("plan", receipt, graphs=True)
    require_on_device("plan", receipt | {"cuda_graphs": counts | {"replayed": 0, "plain": 50}}, graphs=False)
    with pytest.raises(TokenCacheError, match="3 of 50 steps were not replayed"):
        require_on_device("plan", receipt | {"cuda_graphs": counts | {"replayed": 47, "plain": 3}}, graphs=True)
    nodes = {"step_00": {"CUDAExecutionProvider": 8, "CPUExecutionProvider": 1}}
    with pytest.raises(TokenCacheError, match="nodes ran on other providers"):
        require_on_device("plan", receipt | {"nodes_per_provider": nodes}, graphs=False)
