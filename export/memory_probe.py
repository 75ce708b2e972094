"""Memory of a process that loads an artefact and runs a request, as JSON.

    python -m export.memory_probe ARTEFACT PROVIDER BATCH MEMORY

A process of its own, without torch, so that what it holds is what a serving process would.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from export.runtime import CachedSampler


def memory_mb() -> dict[str, float]:
    """Resident megabytes of this process, now and at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[key].split()[0]) / 1e3 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def probe(path: Path, provider: str, batch: int, room: float) -> dict[str, float]:
    """Megabytes above those of the interpreter and its libraries: after loading, after a request when idle, and at the peak."""
    before = memory_mb()["now"]
    sampler = CachedSampler(path, provider, max_batch=batch, memory=room)
    loaded = memory_mb()["now"] - before
    sampler.sample([0] * batch)
    after = memory_mb()
    return {"loaded_mb": loaded, "idle_mb": after["now"] - before, "peak_mb": after["peak"] - before}


if __name__ == "__main__":
    print(json.dumps(probe(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))))
