"""Memory of a process that loads an artefact and runs requests, as JSON.

    python -m export.bench.memory_probe ARTEFACT PROVIDER BATCH MEMORY

A process of its own, without torch, so that what it holds is what a serving process would. On CUDA it is the memory of the GPU, which
nobody else should use meanwhile.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from export.bench.random_values import random_values
from export.runtime.cuda_provider import device_memory_mb
from export.runtime.sampler import CachedSampler
from export.runtime.sessions import prepare


def memory_mb() -> dict[str, float]:
    """Resident megabytes of this process, now and at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[key].split()[0]) / 1e3 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def probe(path: Path, provider: str, batch: int, room: float) -> dict[str, float]:
    """Megabytes above those of the interpreter and its libraries: after loading, after two requests when idle, and at the peak.

    On CUDA ONNX Runtime gives nothing back while a sampler lives: there the peak is what is held in the end.
    """
    now = (lambda: memory_mb()["now"]) if provider == "cpu" else _prepared_device()
    before = now()
    sampler = CachedSampler(path, provider, max_batch=batch, memory=room)
    loaded = now() - before
    for _ in range(1 if provider == "cpu" else 2):  # the first captures CUDA graphs
        sampler.sample(conditions=random_values(sampler.conditions, batch))
    idle = now() - before
    peak = memory_mb()["peak"] - before if provider == "cpu" else idle
    return {"loaded_mb": loaded, "idle_mb": idle, "peak_mb": peak}


def _prepared_device() -> Callable[[], float]:
    """The device's memory, once CUDA itself has taken its share."""
    prepare("cuda", None)
    return device_memory_mb


if __name__ == "__main__":
    print(json.dumps(probe(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))))
