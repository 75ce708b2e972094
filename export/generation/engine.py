"""Ray Data starts the actors, one a GPU or one a core, and hands them numbers of shards; what comes back is a line for each."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from export.generation.job import Job
from export.generation.worker import Line, ShardMaker
from tc_lightning.errors import TokenCacheError, first_line

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "ERROR", "RAY_BACKEND_LOG_LEVEL": "fatal"}
# On one machine: it listens on loopback alone, and workers are as nice as the command was started, not 15 nicer.
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0", "RAY_prestart_worker_first_driver": "0"}
OBJECTS = 100 * 2**20  # bytes for what is handed about: numbers of shards, and lines


def require_workers(workers: int | None, provider: str, address: str | None) -> None:
    """Refuse more workers than this machine has cores, before anything is started.

    Raises:
        TokenCacheError: if there are more.
    """
    if address is None and provider == "cpu":
        _require_at_most(workers, _cores(), "core")


def lines_of(job: Job, shards: Sequence[int], workers: int | None, address: str | None) -> Generator[Line, None, None]:
    """Make shards, and give the line of each as it is done; when this is closed, so are the workers.

    Args:
        job: what is made.
        shards: their numbers.
        workers: how many; None: one a GPU, or one a core.
        address: of a Ray cluster that runs; None starts one on this machine, which ends with this process.

    Raises:
        TokenCacheError: if Ray is not installed or cannot be reached, or there are not so many GPUs or cores.
    """
    ray = _ray(address is None)
    try:
        _connect(ray, job.provider, workers, address)
        unit = {"cpu": "CPU", "cuda": "GPU"}[job.provider]
        known = int(ray.cluster_resources().get(unit, 0)) if address is not None or unit == "GPU" else _cores()
        if not known:
            raise TokenCacheError(
                f"Ray found no {unit} here: ask for `--provider cpu`, or give the `--address` of a cluster that has one."
            )
        _require_at_most(workers, known, unit)
        yield from _run(ray, job, shards, min(workers or known, len(shards)), unit)
    finally:
        ray.shutdown()


def _run(ray: Any, job: Job, shards: Sequence[int], workers: int, unit: str) -> Iterator[Line]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    text = job.to_json()
    todo = ray.data.from_items([{"job": text, "shard": shard} for shard in shards], override_num_blocks=len(shards))
    pool = ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1)
    needs = {"num_gpus": 1, "num_cpus": 0} if unit == "GPU" else {"num_cpus": 1}
    for batch in todo.map_batches(ShardMaker, batch_size=1, compute=pool, **needs).iter_batches(batch_size=None, prefetch_batches=0):
        yield from map(json.loads, batch["line"])


def _ray(local: bool) -> Any:
    """The library, told before it is imported to keep to itself."""
    for name, value in (QUIET | (LOCAL if local else {})).items():
        os.environ.setdefault(name, value)
    try:
        import ray.data
    except ImportError as error:
        raise TokenCacheError(f"making many images needs Ray ({first_line(error)}): `pip install -e '.[ray]'`.") from error
    return ray


def _connect(ray: Any, provider: str, workers: int | None, address: str | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is not None:
            ray.init(address, **quiet)
            return
        cores = {"num_cpus": workers or _cores()} if provider == "cpu" else {}
        ray.init("local", include_dashboard=False, object_store_memory=OBJECTS, **cores, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "on this machine" if address is None else f"at {address}"
        raise TokenCacheError(f"Ray cannot be used {where}: {first_line(error)} `ray start --head` begins a cluster.") from error


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _require_at_most(workers: int | None, known: int, unit: str) -> None:
    if workers is not None and workers > known:
        raise TokenCacheError(
            f"{workers} workers were asked for, and there {'is' if known == 1 else 'are'} {known} {unit}{'' if known == 1 else 's'}: "
            f"ask for {known} at most, or leave `--workers` out."
        )
