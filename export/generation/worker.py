"""What an actor does: it is given the number of a shard, makes its images, writes it whole, and answers with a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.generation.job import IMAGE, Job, digest_of, name_of, rows_of
from export.generation.labels import given_for
from export.generation.shard import as_parquet, table_of
from export.grid import png_of
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.atomic import write_atomically

Line = dict[str, Any]  # shard, rows, bytes, sha256, failed; or shard, error


class ShardMaker:
    """Makes shards in the process that it is in; the artefact is loaded at the first.

    Called by Ray Data with a batch of rows {job, shard}, it answers with a batch of rows {line}.
    """

    def __init__(self) -> None:
        self._job: Job | None = None

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
        """Lines, as JSON, of the shards in a batch. What goes wrong is told in the line, in words."""
        lines = [self._told(Job.from_json(str(job)), int(shard)) for job, shard in zip(batch["job"], batch["shard"], strict=True)]
        return {"line": [json.dumps(line) for line in lines]}

    def make(self, job: Job, shard: int) -> Line:
        """Make a shard and write it under its name.

        Raises:
            TokenCacheError: if the artefact cannot be used, or is another than the job's.
            OSError: if the shard cannot be written.
        """
        if self._job != job:
            self._load(job)
        indices = job.indices(shard)
        given = given_for(self._sampler.conditions, indices, job.seed, job.labels, self._rows.examples)
        pictures: list[bytes | None] = []
        latents: list[np.ndarray] = []
        failed: dict[int, str] = {}
        for start in range(0, len(indices), job.batch):
            cut = slice(start, start + job.batch)
            made = self._sampler.sample(
                seed=job.seed,
                indices=indices[cut],
                guidance=job.guidance,
                full=job.full,
                conditions={name: value[cut] for name, value in given.items()},
                negative=self._rows.nulls if self._rows.nulls and job.guidance != 1.0 else None,
                pixels=IMAGE in job.keep,
                strict=False,
            )
            latents.append(made.latents)
            failed |= {start + place: why for place, why in made.failed.items()}
            if made.images is not None and IMAGE in job.keep:
                pictures += [None if place in made.failed else png_of(image) for place, image in enumerate(made.images)]
        rows = len(next(iter(self._rows.examples.values()), ()))
        table = table_of(job, self._sampler.conditions, indices, given, rows, pictures, np.concatenate(latents), failed)
        content = as_parquet(table)
        write_atomically(Path(job.out) / name_of(shard), content)
        digest = hashlib.sha256(content).hexdigest()
        return {"shard": shard, "rows": len(indices), "bytes": len(content), "sha256": digest, "failed": len(failed)}

    def _told(self, job: Job, shard: int) -> Line:
        try:
            return self.make(job, shard)
        except TokenCacheError as error:
            return {"shard": shard, "error": str(error)}
        except OSError as error:  # a full disk, a folder that may not be written
            what = f"{error.filename or job.out}: {error.strerror or error}"
            return {"shard": shard, "error": f"{name_of(shard)} could not be made: {what}. Free space or choose another folder."}

    def _load(self, job: Job) -> None:
        """One thread on the CPU: sums are then made in one order, and an image is the same bit for bit wherever it is made."""
        threads = 1 if job.provider == "cpu" else None
        self._sampler = CachedSampler(job.artefact, provider=job.provider, threads=threads, max_batch=job.batch)
        if digest_of(self._sampler.manifest) != job.artefact_digest:
            raise TokenCacheError(
                f"the artefact {job.artefact} is not the one that this run began with: put the same one at the same place on every "
                "machine, and do not export it anew while a run goes on."
            )
        self._rows, self._job = rows_of(job, self._sampler.conditions), job
