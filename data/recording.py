"""Recording of full-compute trajectories of a frozen teacher, in the format of `data.shards`.

A shard's bytes are a function of set.json and of its number. Matrix products round differently in batches of another size, and
with another number of CPU threads, so a shard is always computed as one batch, by one thread, in fp32, whatever the run uses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from data.shards import RECORD_BATCH, SetOrigin, is_recorded, shard_path, shards, write_atomically
from tc_lightning.errors import TrajectoryError
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.given import TRAINING
from tc_lightning.rollout.sampling import full_plan, given_for, model_signature, noise_for, sample_steps


def prepare(root: Path, recipe: SetOrigin, num_samples: int) -> None:
    """Create the folder and its set.json, or check those that exist, and say what will be recorded. Called by one process.

    Raises:
        TrajectoryError: if the folder holds another set, cannot be written, or its disk is too full.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        occupied = any(root.glob("shard-*.arrow"))  # a set.json alone tells of nothing that could be lost
    except OSError as error:
        raise TrajectoryError(f"cannot create the trajectory folder {root} ({error}): set `root` to another one.") from error
    if occupied:
        recipe.require(root)
    else:
        write_atomically(root / "set.json", json.dumps(recipe.to_json(), indent=1).encode() + b"\n")
    missing = [number for number in shards(num_samples) if not is_recorded(root, recipe, number)]
    if not missing:
        return
    size = len(missing) * recipe.shard_bytes
    print(
        f"recording {len(missing) * RECORD_BATCH} trajectories x {recipe.num_steps} steps: {_megabytes(size)} in {root}",
        flush=True,
    )
    if size > free:
        raise TrajectoryError(
            f"the trajectories need {_megabytes(size)} and {root} has {_megabytes(free)} free: make room, set `root` to a "
            "folder on another disk, or lower `num_train` or `num_val`."
        )


def record(
    root: Path, recipe: SetOrigin, teacher: Network, num_samples: int, device: torch.device, rank: int = 0, world_size: int = 1
) -> None:
    """Record this process's share of the shards that are missing: numbers rank, rank + world_size, ...

    Args:
        root: a folder made ready by `prepare`.
        recipe: what is recorded.
        teacher: the model that the recipe names; it is moved to `device`.
        num_samples: samples wanted; whole shards are recorded.
        device: where the teacher runs.
        rank: this process.
        world_size: number of processes.

    Raises:
        TrajectoryError: if a shard cannot be written.
        TokenCacheError: if latents become NaN.
    """
    missing = [n for n in shards(num_samples)[rank::world_size] if not is_recorded(root, recipe, n)]
    if not missing:
        return
    teacher = teacher.to(device).eval()
    plan = full_plan(model_signature(teacher, recipe.teacher), recipe.sampler, recipe.guidance)
    bar = tqdm(total=len(missing) * recipe.num_steps, desc="recording", unit="step", disable=None if rank == 0 else True)
    with reproducible(device), bar:
        for number in missing:
            _write_shard(root, recipe, number, _compute_shard(recipe, number, teacher, plan, device, bar))


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Compute in plain fp32 and in one thread; the caller's settings come back afterwards."""
    switches = _switches()
    before, threads = [getattr(owner, name) for owner, name, _ in switches], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for owner, name, value in switches:
            setattr(owner, name, value)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)
        torch.set_num_threads(threads)


def _switches() -> list[tuple[Any, str, Any]]:
    """What lets products round below fp32 or the algorithm vary: owner, attribute, and the value that forbids it."""
    b: Any = torch.backends
    cudnn = [(b.cudnn, "benchmark", False), (b.cudnn, "deterministic", True)]
    if not hasattr(b.cuda.matmul, "fp32_precision"):  # before torch 2.9
        return [*cudnn, (b.cuda.matmul, "allow_tf32", False), (b.cudnn, "allow_tf32", False)]
    # The RNN is here because the older getters raise when it and the convolution disagree.
    owners = [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv]
    return [*cudnn, *((owner, "fp32_precision", "ieee") for owner in owners)]


def _compute_shard(
    recipe: SetOrigin, number: int, teacher: Network, plan: CachePlan, device: torch.device, bar: tqdm
) -> dict[str, np.ndarray]:
    """Rows of a shard, ordered by index, then step."""
    indices = range(number * RECORD_BATCH, (number + 1) * RECORD_BATCH)
    given = given_for(recipe.seed, indices, teacher, use=TRAINING)
    x_BCHW = noise_for(recipe.seed, indices, teacher, device)
    latents, eps = [x_BCHW.cpu()], []
    for state in sample_steps(teacher, plan, x_BCHW, given.to(device)):
        latents.append(state.x_next.cpu())
        eps.append(state.eps.cpu())
        bar.update()
    rows = recipe.num_steps + 1
    return {
        "seed": np.full(RECORD_BATCH * rows, recipe.seed),
        "index": np.repeat(indices, rows),
        "step": np.tile(np.arange(rows, dtype=np.int32), RECORD_BATCH),
        **{name: np.repeat(_row(value), rows, axis=0) for name, value in given.items()},
        "latent": torch.stack(latents, 1).flatten(0, 1).numpy(),
        "eps": torch.stack([*eps, torch.zeros_like(eps[0])], 1).flatten(0, 1).numpy(),
    }


def _row(value: torch.Tensor) -> np.ndarray:
    """A condition as a column holds it: numbers, or lists of all numbers of one."""
    return (value.flatten(1) if value.ndim > 1 else value).numpy()


def _write_shard(root: Path, recipe: SetOrigin, number: int, columns: dict[str, np.ndarray]) -> None:
    """The shard, then its index."""
    stream = pa.BufferOutputStream()
    with ArrowWriter(stream=stream, features=recipe.features) as writer:
        writer.write_batch(columns)
        rows, _ = writer.finalize(close_stream=False)
    content = memoryview(stream.getvalue())
    path = shard_path(root, number)
    write_atomically(path, content)
    index = {"set": recipe.digest, "rows": rows, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(path.with_suffix(".json"), json.dumps(index).encode() + b"\n")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e6:.2f} MB"
