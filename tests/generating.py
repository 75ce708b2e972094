"""What the tests of many images share: jobs on tiny artefacts, shards made in this process, and a disk that is full."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from export.generation.job import Job, completed
from export.generation.ledger import Ledger
from export.generation.worker import ShardMaker


def job_for(artefact: Path, out: Path, **changes: Any) -> Job:
    """Seven images in shards of three, two at a time."""
    given: dict[str, Any] = {
        "images": 7,
        "shard": 3,
        "batch": 2,
        "seed": 5,
        "labels": ("balanced",),
        "conditions": None,
        "guidance": None,
        "full": False,
        "keep": (),
        "provider": "cpu",
    }
    return completed(Job(str(artefact), str(out), **given | changes))


def make(job: Job) -> list[int]:
    """Make what is missing, as the command does, and say which shards that were."""
    maker = ShardMaker()
    with Ledger(job) as ledger:
        made = ledger.missing
        for line in (maker.make(job, shard) for shard in made):
            ledger.record(line)
    return made


def rows_in(out: Path) -> list[dict[str, Any]]:
    """Rows of all shards, in order."""
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def contents(out: Path) -> dict[str, bytes]:
    """Bytes of all shards."""
    return {path.name: path.read_bytes() for path in out.glob("*.parquet")}


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: writing more fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
