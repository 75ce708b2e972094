"""Shards: Parquet that `datasets` reads, an image a row. Shape suffixes: B images, C H W.

Columns: index, seed, guidance, full, plan_digest; every condition that is a number; of other conditions the row of their file
(conditions_row) and its sha256; `image` (PNG) and `latent` [C, H, W] where they are kept; `failed`, why there is no image.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from export.generation.job import IMAGE, LATENT, Job
from tc_lightning.plan.conditions import Conditions
from tc_lightning.plan.given import Arrays

NUMBERS = {"int64": pa.int64(), "fp32": pa.float32()}
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as `datasets` stores images
LATENTS = pa.list_(pa.list_(pa.list_(pa.float32())))


def table_of(
    job: Job,
    conditions: Conditions,
    indices: Sequence[int],
    given: Arrays,
    table_rows: int,
    pictures: Sequence[bytes | None],
    latents_BCHW: np.ndarray,
    failed: dict[int, str],
) -> pa.Table:
    """A shard's rows.

    Args:
        job: what is made.
        conditions: of the model.
        indices: of the images.
        given: their conditions, [B, ...] each.
        table_rows: rows of the file of conditions; 0 without one.
        pictures: PNG bytes of each image, where they are kept.
        latents_BCHW: what the model made.
        failed: why there is no image, by place.
    """
    count = len(indices)
    columns: dict[str, pa.Array] = {
        "index": pa.array(list(indices), pa.int64()),
        "seed": pa.array([job.seed] * count, pa.int64()),
        "guidance": pa.array([job.guidance] * count, pa.float64()),
        "full": pa.array([job.full] * count, pa.bool_()),
        "plan_digest": pa.array([job.plan_digest] * count, pa.string()),
    }
    columns |= {c.name: pa.array(given[c.name], NUMBERS[c.dtype]) for c in conditions if not c.shape}
    if table_rows:
        columns["conditions_row"] = pa.array([index % table_rows for index in indices], pa.int64())
        columns["conditions_sha256"] = pa.array([job.conditions_digest] * count, pa.string())
    if IMAGE in job.keep:
        columns[IMAGE] = pa.array([None if png is None else {"bytes": png, "path": None} for png in pictures], PICTURE)
    if LATENT in job.keep:
        columns[LATENT] = _nested(latents_BCHW)
    columns["failed"] = pa.array([failed.get(place) for place in range(count)], pa.string())
    found = pa.table(columns)
    return found.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": _features(found.schema, latents_BCHW.shape[1:])}})}
    )


def as_parquet(table: pa.Table) -> memoryview:
    """The bytes of a shard: the same for the same rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return memoryview(sink.getvalue())


def read_pictures(path: Path, most: int = 64) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Indices of images that are missing, and the others, [H, W, 3] uint8 each; at most so many rows at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(most, columns=["index", IMAGE]):
            rows = batch.to_pylist()
            missing = [row["index"] for row in rows if row[IMAGE] is None]
            yield missing, [np.asarray(Image.open(io.BytesIO(row[IMAGE]["bytes"]))) for row in rows if row[IMAGE] is not None]


def _nested(latents_BCHW: np.ndarray) -> pa.Array:
    values = pa.array(np.ascontiguousarray(latents_BCHW, np.float32).reshape(-1))
    for size in reversed(latents_BCHW.shape[1:]):
        values = pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, size, dtype=np.int32)), values)
    return values


def _features(schema: pa.Schema, latent: Sequence[int]) -> dict[str, Any]:
    """What `datasets` takes the columns for."""
    names = {pa.int64(): "int64", pa.float64(): "float64", pa.float32(): "float32", pa.bool_(): "bool", pa.string(): "string"}
    known: dict[str, Any] = {IMAGE: {"_type": "Image"}, LATENT: {"shape": list(latent), "dtype": "float32", "_type": "Array3D"}}
    return {field.name: known.get(field.name) or {"dtype": names[field.type], "_type": "Value"} for field in schema}
