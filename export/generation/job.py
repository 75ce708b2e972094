"""What is to be made: plain values that go to every worker, and from which image i follows whoever makes it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import onnxruntime as ort

from export.generation.labels import given_for, require_labels
from export.runtime.contract import read_artefact
from export.runtime.manifest import sha256_of
from export.runtime.request import rows_asked_for
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import Conditions, conditions_from_json
from tc_lightning.plan.rows_file import Rows, read_rows
from tc_lightning.plan.signature import PIXELS

IMAGE, LATENT = "image", "latent"
FORMAT = 1  # of the shards


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of many images, cut into shards.

    Args:
        artefact: folder of the artefact, at the same place on every machine.
        out: folder of the shards, likewise.
        images: how many there are to be.
        shard: images in each shard; the last one may have fewer.
        batch: images computed at a time.
        seed: seed of all images; image i has index i.
        labels: `balanced`, `drawn`, or classes that images take in turn.
        conditions: a .npz file with rows of conditions, which images take in turn.
        guidance: scale; None takes the plan's.
        full: run the reference instead of the plan.
        keep: what of an image is kept, `image` (PNG bytes) and `latent`.
        provider: `cpu` or `cuda`.
        artefact_digest: of the artefact's files.
        plan_digest: of its plan.
        conditions_digest: of the file of conditions.
    """

    artefact: str
    out: str
    images: int
    shard: int
    batch: int
    seed: int
    labels: tuple[str | int, ...]
    conditions: str | None
    guidance: float | None
    full: bool
    keep: tuple[str, ...]
    provider: str
    artefact_digest: str = ""
    plan_digest: str = ""
    conditions_digest: str | None = None

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.images // self.shard)

    def indices(self, shard: int) -> range:
        """Indices of a shard's images."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.images))

    @property
    def identity(self) -> dict[str, Any]:
        """What images and shards depend on: not where they are, how many, or how many at a time."""
        where = ("artefact", "out", "images", "batch", "conditions")
        said = {name: value for name, value in dataclasses.asdict(self).items() if name not in where}
        return {"format": FORMAT} | {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}

    def to_json(self) -> str:
        """Plain text, for a worker."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Inverse of `to_json`."""
        raw = json.loads(text)
        return cls(**raw | {"labels": tuple(raw["labels"]), "keep": tuple(raw["keep"])})


def name_of(shard: int) -> str:
    """File name of a shard."""
    return f"images-{shard:05d}.parquet"


def manifest_of(job: Job) -> dict[str, Any]:
    """The manifest of a job's artefact, checked file by file.

    Raises:
        ArtefactError: if it cannot be used.
    """
    return read_artefact(Path(job.artefact), ort.__version__)


def digest_of(manifest: dict[str, Any]) -> str:
    """sha256 of what an artefact's files are; not of the times that its manifest tells."""
    return hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()


def shows_images(manifest: dict[str, Any]) -> bool:
    """Whether an artefact makes what can be stored as a picture: a decoder's pixels, or its own in one or three channels."""
    model = manifest["model"]
    return "decoder" in manifest or (model["output"] == PIXELS and model["in_channels"] in (1, 3))


def rows_of(job: Job, conditions: Conditions) -> Rows:
    """The rows of conditions that a job names; none if it names no file.

    Raises:
        TokenCacheError: if the file cannot be used.
    """
    return Rows({}, {}) if job.conditions is None else read_rows(Path(job.conditions), conditions)


def completed(job: Job) -> Job:
    """A job with the digests of what it names, checked as far as it can be before anything runs.

    Raises:
        TokenCacheError: if artefact, conditions, labels, seed, guidance or what is to be kept cannot be used.
    """
    manifest = manifest_of(job)
    conditions = conditions_from_json(manifest["model"]["conditions"], "conditions")
    rows = rows_of(job, conditions)
    require_labels(conditions, job.labels, rows.examples)
    given_for(conditions, range(1), job.seed, job.labels, rows.examples)
    keep = job.keep or ((IMAGE,) if shows_images(manifest) else (LATENT,))
    if IMAGE in keep and not shows_images(manifest):
        raise TokenCacheError(
            f"the artefact {job.artefact} makes latents and has no decoder, so there are no images to store: ask for `--keep latent`, "
            "or export it with a decoder (`python export/to_onnx.py --vae FOLDER`)."
        )
    scale = manifest["guidance"]["scale"] if job.guidance is None else job.guidance
    (first,) = rows_asked_for(manifest, 1, [job.seed], [0], [scale])
    return dataclasses.replace(
        job,
        keep=keep,
        guidance=first.scale,
        artefact_digest=digest_of(manifest),
        plan_digest=manifest["plan_digest"],
        conditions_digest=None if job.conditions is None else sha256_of(Path(job.conditions)),
    )
