"""What stages read while requests run: memory, the moments at which steps are in the queue, ONNX Runtime's profile, calls of CUDA."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from export.bench.memory_probe import memory_mb
from export.runtime.cuda_provider import device_memory_mb
from export.runtime.layout import CONDITION
from export.runtime.sampler import CachedSampler


def memory_now(provider: str) -> dict[str, float]:
    """Megabytes that this process holds, and those that are taken of the GPU."""
    host = {"host": memory_mb()["now"]}
    return host | {"device": device_memory_mb()} if provider == "cuda" else host


class Queue(NamedTuple):
    """A request as the host sees it, in milliseconds.

    Args:
        step: between one step and the next in the queue, the median.
        longest: the same, the longest.
        filled: from the start until the last step was in the queue.
        request: from the start until the latents were there.
    """

    step: float
    longest: float
    filled: float
    request: float


def queue_of(sampler: CachedSampler, labels: list[int], full: bool = False) -> Queue:
    """How long the host takes to put a request's steps into the queue. On the CPU a step is in it when it is done."""
    marks: list[float] = []
    started = time.perf_counter()
    sampler.sample(labels, full=full, on_step=lambda *_: marks.append(time.perf_counter()))
    request = time.perf_counter() - started
    gaps = sorted(b - a for a, b in itertools.pairwise(marks))
    return Queue(*(1e3 * seconds for seconds in (gaps[len(gaps) // 2], gaps[-1], marks[-1] - started, request)))


class Profiled(NamedTuple):
    """ONNX Runtime's profile of a sampler's requests.

    Args:
        operators: kinds of node that ran.
        providers: where they ran.
        gaps_us: host time between the end of one program's run and the start of the next, microseconds, in order.
        runs_us: host time of each run.
    """

    operators: set[str]
    providers: set[str]
    gaps_us: list[float]
    runs_us: list[float]


def profiled(sampler: CachedSampler) -> Profiled:
    """What a sampler that was loaded with `profile` has written down; the files go."""
    graphs = {CONDITION, *(sampler.graph_of(bound["program"]) for bound in sampler.manifest["schedule"])}
    begun = {name: sampler.session(name).get_profiling_start_time_ns() / 1e3 for name in graphs}
    operators: set[str] = set()
    providers: set[str] = set()
    runs: list[tuple[float, float]] = []
    for name, path in sampler.end_profiling().items():
        for event in json.loads(Path(path).read_text(encoding="utf-8")):
            if event["name"] == "model_run":
                runs.append((begun[name] + event["ts"], begun[name] + event["ts"] + event["dur"]))
            elif event.get("cat") == "Node":
                operators.add(event["args"]["op_name"])
                providers |= {event["args"]["provider"]} if event["args"].get("provider") else set()
        Path(path).unlink()
    runs.sort()
    gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(runs)]
    return Profiled(operators, providers, gaps, [end - start for start, end in runs])


def cuda_calls(work: Callable[[], object], path: Path) -> list[str]:
    """Calls of the CUDA runtime that the process makes meanwhile, in order of time, as far as PyTorch's profiler sees them.

    Args:
        work: what to do meanwhile.
        path: a file for the trace.
    """
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as trace:
        work()
    trace.export_chrome_trace(str(path))
    events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    return [event["name"] for event in sorted(calls, key=lambda event: float(event["ts"]))]
