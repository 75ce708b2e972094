"""Measure a server under load: latency and throughput, with batches of several requests and without.

    python export/serve_load.py artefacts/digits --requests 200 --clients 8

Starts `export/serve.py` on this machine for each size of batch, asks it from as many clients at a time, and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from export.command import positive, run
from export.serving.client import Running, running
from tc_lightning.errors import TokenCacheError

COLUMNS = ("largest batch", "clients", "requests", "p50 ms", "p95 ms", "images a second", "batches that formed (rows x times)")
PATIENCE_S = 1800.0  # until a server is ready: it runs every size of batch first


class Load(NamedTuple):
    """What was measured: milliseconds of each request, seconds of all of them, and the batches that formed."""

    ms: list[float]
    seconds: float
    batches: dict[str, int]


def main() -> None:
    """Command line."""
    args = _arguments()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for max_batch in args.max_batch:
        limits = ("--max-batch", max_batch, *(("--threads", args.threads) if args.threads else ()))
        with running(args.artefact, *limits, patience=PATIENCE_S) as server:
            load = measured(server, bodies(server, args.requests, args.seed), args.clients)
        print(line(max_batch, args.clients, load), flush=True)


def bodies(server: Running, count: int, seed: int) -> list[dict[str, Any]]:
    """Requests of mixed classes and seeds.

    Raises:
        TokenCacheError: if the artefact is not class-conditional.
    """
    health, rng = server.ask("/health").json(), random.Random(seed)
    classes = health["conditions"][0]["classes"]
    if len(health["conditions"]) != 1 or not classes:
        raise TokenCacheError(f"{health['artefact']} takes more than a class: the load is of classes drawn at random.")
    return [{"label": rng.randrange(classes), "seed": rng.randrange(2**31), "format": "npy"} for _ in range(count)]


def measured(server: Running, asked: list[dict[str, Any]], clients: int) -> Load:
    """Ask for all, from so many clients, each of which waits for its answer before it asks again.

    Raises:
        TokenCacheError: if a request fails.
    """
    before, left = server.ask("/metrics").json()["batch_sizes"], iter(asked)
    lock, ms, failed = threading.Lock(), list[float](), list[str]()

    def client() -> None:
        while not failed:
            with lock:
                body = next(left, None)
            if body is None:
                return
            started = time.perf_counter()
            reply = server.ask("/predict", body)
            ms.append(1e3 * (time.perf_counter() - started))
            if reply.status != 200:
                failed.append(reply.body.decode(errors="replace"))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if failed:
        raise TokenCacheError(f"a request failed: {failed[0]}")
    after = server.ask("/metrics").json()["batch_sizes"]
    formed = {size: count - before.get(size, 0) for size, count in after.items()}
    return Load(ms, seconds, {size: count for size, count in formed.items() if count})


def line(max_batch: int, clients: int, load: Load) -> str:
    """A row of the table."""
    cuts = statistics.quantiles(load.ms, n=20, method="inclusive")
    formed = ", ".join(f"{size} x {count}" for size, count in load.batches.items())
    cells = (max_batch, clients, len(load.ms), f"{cuts[9]:.0f}", f"{cuts[18]:.0f}", f"{len(load.ms) / load.seconds:.1f}", formed)
    return f"| {' | '.join(map(str, cells))} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path, help="artefact folder of a class-conditional model")
    parser.add_argument("--requests", type=positive, default=200)
    parser.add_argument("--clients", type=positive, default=8)
    parser.add_argument("--max-batch", type=positive, nargs="+", default=[1, 8], help="largest batches to compare; 1 is none")
    parser.add_argument("--threads", type=positive, help="threads on the CPU (default: as ONNX Runtime chooses)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
