"""Files of a trajectory set: one Arrow shard for every RECORD_BATCH consecutive sample indices.

    root/set.json            what the set was recorded from: teacher, sampler, guidance, seed
    root/shard-00003.arrow   indices 48 to 63, one row per (index, step), step T holding x_0
    root/shard-00003.json    size and sha256, written last: a shard without it is recorded again

Whole shards are recorded even when fewer samples are asked for, so a larger set extends a smaller one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from datasets import Array3D, Features, Sequence, Value

from tc_lightning.errors import TrajectoryError
from tc_lightning.plan import atomic
from tc_lightning.plan.conditions import Condition, Conditions
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable

FORMAT_VERSION = 1
RECORD_BATCH = 16  # part of the format: another size gives other bytes


@dataclasses.dataclass(frozen=True)
class SetOrigin:
    """What a set is recorded from; two sets with equal recipes hold the same trajectories.

    Args:
        teacher: digest of the teacher.
        sampler: a deterministic sampler.
        guidance: classifier-free guidance.
        seed: seed of noise and conditions.
        shape: C, H, W of a latent.
        conditions: what each sample has beside its noise.
        examples: digest of the examples from which those come that cannot be drawn; empty if all can.

    Raises:
        TrajectoryError: if the sampler adds noise: its x_0 would not be a function of x_T.
    """

    teacher: str
    sampler: SamplerTable
    guidance: Guidance
    seed: int
    shape: tuple[int, int, int]
    conditions: Conditions
    examples: str = ""

    def __post_init__(self) -> None:
        if self.sampler.stochastic:
            raise TrajectoryError(f"trajectories need a deterministic sampler, and {self.sampler.name} adds noise: choose ddim.")

    @property
    def num_steps(self) -> int:
        """Sampling steps T."""
        return len(self.sampler)

    @property
    def features(self) -> Features:
        """Columns of a shard."""
        latent = Array3D(self.shape, "float32")
        numbers = {"seed": "int64", "index": "int64", "step": "int32"}
        columns = {name: Value(kind) for name, kind in numbers.items()} | {c.name: _column(c) for c in self.conditions}
        return Features(columns | {"latent": latent, "eps": latent})

    @property
    def shard_bytes(self) -> int:
        """Size of one shard, but for a header: 4 bytes a number and a list offset in two latents, and the other columns."""
        C, H, W = self.shape
        given = sum(math.prod(c.shape) * (8 if c.dtype == "int64" else 4) for c in self.conditions)
        return RECORD_BATCH * (self.num_steps + 1) * (2 * 4 * (C * H * W + C * H + C + 1) + 20 + given)

    @property
    def digest(self) -> str:
        """sha256 of `to_json`."""
        return hashlib.sha256(_canonical(self.to_json())).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Content of set.json."""
        return {
            "format_version": FORMAT_VERSION,
            "teacher": self.teacher,
            "sampler": hashlib.sha256(_canonical(self.sampler.to_json())).hexdigest(),
            "guidance": dataclasses.asdict(self.guidance),
            "seed": self.seed,
            "num_steps": self.num_steps,
            "shape": list(self.shape),
            **_conditions(self.conditions, self.examples),
            "record_batch": RECORD_BATCH,
        }

    def require(self, root: Path) -> None:
        """Check that the set in `root` has this recipe.

        Raises:
            TrajectoryError: naming each field that differs, with both values.
        """
        path, ours = root / "set.json", self.to_json()
        theirs = read_json(path)
        if theirs is None:
            raise TrajectoryError(f"{path} is missing or damaged: delete the folder {root} and it is recorded again.")
        differing = [f"{name} (recorded {theirs.get(name)}, now {ours[name]})" for name in ours if theirs.get(name) != ours[name]]
        if differing:
            raise TrajectoryError(
                f"the trajectories in {root} were recorded from something else. They differ in {'; '.join(differing)}. "
                "Set `root` to another folder, or delete this one to record again."
            )


def _conditions(conditions: Conditions, examples: str) -> dict[str, Any]:
    """What set.json says of conditions: of a class label alone, how many classes, as it did when there was nothing else."""
    if [c.name for c in conditions if c.classes] == ["label"] and len(conditions) == 1:
        return {"num_classes": conditions[0].classes}
    return {"conditions": [c.to_json() for c in conditions], "examples": examples}


def _column(condition: Condition) -> Value | Sequence:
    """A number, or all numbers of a condition in row-major order."""
    value = Value("int64" if condition.dtype == "int64" else "float32")
    return Sequence(value, length=math.prod(condition.shape)) if condition.shape else value


def shards(num_samples: int) -> range:
    """Numbers of the shards that hold samples 0 to num_samples - 1."""
    return range(-(-num_samples // RECORD_BATCH))


def shard_path(root: Path, number: int) -> Path:
    """File of a shard; its index lies beside it with the suffix .json."""
    return root / f"shard-{number:05d}.arrow"


def is_recorded(root: Path, recipe: SetOrigin, number: int) -> bool:
    """Whether a shard is there in full. Its content is checked where it is read (`data.trajectories`)."""
    index, path = shard_index(root, number), shard_path(root, number)
    return index is not None and index["set"] == recipe.digest and path.is_file() and path.stat().st_size == index["bytes"]


def shard_index(root: Path, number: int) -> dict[str, Any] | None:
    """Digest of the recipe (`set`), `rows`, `bytes` and `sha256` of a shard; None if there is no complete index."""
    index = read_json(shard_path(root, number).with_suffix(".json"))
    return index if index is not None and {"set", "rows", "bytes", "sha256"} <= set(index) else None


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if the file is missing or holds anything else."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file under a temporary name, make it durable, and rename it.

    Raises:
        TrajectoryError: if the disk is full or the folder cannot be written; nothing is left under the final name then.
    """
    try:
        atomic.write_atomically(path, content)
    except OSError as error:
        raise TrajectoryError(
            f"cannot write trajectories to {path.parent} ({error}): make room there or set `root` to another folder, and start "
            "again; what was recorded is kept."
        ) from error


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
