"""Load a Triton server with requests of many kinds at once, hold every answer against its own row made alone, and say what it took.

    python export/triton_load.py artefacts/digits --requests 1000

The artefact is served twice on this machine, with dynamic batching and without, by one thread each, so that equal rows are equal bytes.
Then a server is killed in the middle of a load and started again. Needs the environment that `export/triton_server.py` needs.
Exit status: 0 all held, 3 something fell short.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.command import positive, run
from export.runtime.sampler import CachedSampler
from export.serving.triton_client import Client
from export.serving.triton_config import Settings, served_name
from export.serving.triton_load import Alone, Ask, Outcome, complete, faults, mixed, send
from export.serving.triton_process import free_ports, started
from export.serving.triton_repository import write_repository

FELL_SHORT = 3
EARLY, GROWTH = 100, 0.02  # memory after so many requests, and by how much of it that may grow until the end


def main() -> None:
    """Command line."""
    args = _arguments()
    sampler = CachedSampler(args.artefact, threads=1)
    settings = Settings(threads=1, max_batch=args.max_batch, delay_ms=args.delay_ms)
    kinds = {"batching": settings, "no batching": dataclasses.replace(settings, batching=False)}
    made, asks = Alone(sampler), mixed(sampler, args.requests, args.seed)
    asks = [complete(sampler, ask) for ask in asks] if args.complete else asks
    found = {kind: _loaded(made, asks, args, one) for kind, one in kinds.items()}
    found["killed"] = _killed(made, mixed(sampler, args.requests_killed, args.seed + 1), args, settings)
    print(json.dumps(found, indent=1) if args.json else _in_words(found))
    if any(one["faults"] for one in found.values()):
        raise SystemExit(FELL_SHORT)


def _loaded(made: Alone, asks: Sequence[Ask], args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Figures of a load, and what was not as it must be."""
    name = served_name(args.artefact)
    with tempfile.TemporaryDirectory() as folder:
        write_repository([args.artefact], Path(folder) / "repository", settings)
        with started(Path(folder) / "repository") as server:
            memory: dict[int, int] = {}

            def done(count: int) -> None:
                if count in (EARLY, args.requests):
                    memory[count] = server.memory()

            began = time.perf_counter()
            outcomes = send(server.address, name, asks, args.clients, done)
            seconds = time.perf_counter() - began
            with Client(server.address) as client:
                batches = _batches(client.get(f"/v2/models/{name}/stats"))
    good = [outcome for outcome in outcomes if outcome.outputs is not None]
    return {
        "requests": len(asks),
        "refused": sum(outcome.error is not None for outcome in outcomes),
        "images": (images := sum(outcome.ask.rows for outcome in good)),
        **_milliseconds(good),
        "images_per_second": images / seconds,
        "batches": batches,
        "memory_bytes": memory,
        "faults": [*faults(made, outcomes), *_grown(memory), *(f"request {n} was lost" for n, o in enumerate(outcomes) if o.lost)],
    }


def _milliseconds(outcomes: Sequence[Outcome]) -> dict[str, float]:
    p50, p95 = np.percentile([outcome.ms for outcome in outcomes], (50, 95))
    return {"p50_ms": float(p50), "p95_ms": float(p95)}


def _batches(stats: Any) -> dict[str, int]:
    """How many batches of each number of rows were computed."""
    found = stats["model_stats"][0]["batch_stats"]
    return {str(one["batch_size"]): int(one["compute_infer"]["count"]) for one in found}


def _grown(memory: dict[int, int]) -> list[str]:
    if EARLY not in memory or max(memory) == EARLY or memory[max(memory)] <= (1 + GROWTH) * memory[EARLY]:
        return []
    return [f"memory grew from {memory[EARLY]:,} bytes after request {EARLY} to {memory[max(memory)]:,} after {max(memory)}"]


def _killed(made: Alone, asks: Sequence[Ask], args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """A server killed in the middle of a load, and another started in its place: what was in flight is lost, and nothing else."""
    name = served_name(args.artefact)
    ports, outcomes, half = free_ports(), list[Outcome](), threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        write_repository([args.artefact], repository, settings)

        def load(address: str) -> None:
            outcomes.extend(send(address, name, asks, args.clients, lambda count: half.set() if count >= len(asks) // 2 else None))

        with started(repository, ports=ports) as first:
            thread = threading.Thread(target=load, args=(first.address,))
            thread.start()
            half.wait()
            first.kill()
        with started(repository, ports=ports):
            thread.join()
    lost = sum(outcome.lost for outcome in outcomes)
    wrong = [] if 1 <= lost <= args.clients else [f"{lost} requests were lost, with {args.clients} clients of one request at a time"]
    wrong += [] if len(outcomes) == len(asks) else [f"{len(outcomes)} of {len(asks)} requests had an end"]
    return {"requests": len(asks), "lost_in_flight": lost, "faults": [*faults(made, outcomes), *wrong]}


def _in_words(found: dict[str, dict[str, Any]]) -> str:
    return "\n".join(f"{kind}\n" + "\n".join(f"  {name:<18} {value}" for name, value in one.items()) for kind, one in found.items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path, help="artefact folder")
    parser.add_argument("--requests", type=positive, default=200, help="requests of each load; 1 to 3 images each, one in 20 bad")
    parser.add_argument("--requests-killed", type=positive, default=100, help="requests of the load in which the server is killed")
    parser.add_argument("--clients", type=positive, default=16, help="threads that ask, one request at a time each")
    parser.add_argument("--max-batch", type=positive, default=16)
    parser.add_argument("--delay-ms", type=float, default=Settings().delay_ms)
    parser.add_argument("--complete", action="store_true", help="requests leave nothing out, so that all of them can share batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
