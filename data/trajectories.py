"""Reading of recorded trajectories: memory-mapped shards, steps with those before them for training, end points for planning.

The shards are ordinary Hugging Face Arrow files: `datasets.Dataset.from_file("shard-00000.arrow")` opens one, and
`TrajectorySet.table` is all of them.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from data.shards import RECORD_BATCH, SetOrigin, shard_index, shard_path, shards
from tc_lightning.errors import TrajectoryError
from tc_lightning.models.conditions import Given
from tc_lightning.plan.conditions import Condition


class Endpoints(NamedTuple):
    """Where trajectories start and end: noise [B, C, H, W], conditions, final latents [B, C, H, W]."""

    noise: Tensor
    given: Given
    latents: Tensor


# A step of one trajectory with those before it: x_prev, x, eps, step, index, and each condition by its name; collated, latents are
# [B, C, H, W], those of the steps before [B, R, C, H, W], and numbers [B].
Pair = dict[str, Any]


class _Columns(NamedTuple):
    """Read-only views into a mapped shard: [RECORD_BATCH, T + 1, C, H, W] twice, and [RECORD_BATCH, ...] of each condition."""

    latents: np.ndarray
    eps: np.ndarray
    given: dict[str, np.ndarray]


class TrajectorySet:
    """Samples 0 to num_samples - 1 of a recorded set. Nothing is read into memory before it is asked for.

    Args:
        root: folder of the set.
        recipe: what it must have been recorded from.
        num_samples: samples that must be there.

    Raises:
        TrajectoryError: if the set is another one, or a shard is missing or damaged.
    """

    def __init__(self, root: Path, recipe: SetOrigin, num_samples: int) -> None:
        recipe.require(root)
        self.recipe, self.num_samples = recipe, num_samples
        self._shards = [_open_shard(root, recipe, number) for number in shards(num_samples)]
        self._columns = [_columns(shard, recipe) for shard in self._shards]

    @functools.cached_property
    def table(self) -> Dataset:
        """Columns seed, index, step, each condition, latent, eps; rows ordered by index, then step; x_0 at step T, with eps 0."""
        rows = self.num_samples * (self.recipe.num_steps + 1)
        return concatenate_datasets(self._shards).select(range(rows))

    def given(self, index: int) -> dict[str, Tensor]:
        """Conditions of a sample, by name."""
        columns, row = self._find(index)
        return {name: torch.tensor(values[row]) for name, values in columns.given.items()}

    def latent(self, index: int, step: int) -> Tensor:
        """x before a step, [C, H, W]; noise at step 0, x_0 at step T."""
        columns, row = self._find(index)
        return torch.tensor(columns.latents[row, step])

    def eps(self, index: int, step: int) -> Tensor:
        """Guided eps of a step, [C, H, W]."""
        columns, row = self._find(index)
        return torch.tensor(columns.eps[row, step])

    def endpoints(self, indices: range) -> Endpoints:
        """Start and end of the given samples."""
        last = self.recipe.num_steps
        noise, latents = (torch.stack([self.latent(index, step) for index in indices]) for step in (0, last))
        given = [self.given(index) for index in indices]
        names = (condition.name for condition in self.recipe.conditions)
        return Endpoints(noise, Given({name: torch.stack([one[name] for one in given]) for name in names}), latents)

    def _find(self, index: int) -> tuple[_Columns, int]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        return self._columns[index // RECORD_BATCH], index % RECORD_BATCH


class PairDataset(TorchDataset[Pair]):
    """Steps 1 to T - 1 of each sample with the steps before them, ordered by index, then step.

    Args:
        trajectories: the set.
        indices: the samples taken from it.
        reach: how many steps before each step, latest first; step 0 stands in for those before it.
    """

    def __init__(self, trajectories: TrajectorySet, indices: range, reach: int = 1) -> None:
        self.trajectories, self.indices = trajectories, indices
        self._pairs = trajectories.recipe.num_steps - 1
        self._reach = min(reach, self._pairs)

    def __len__(self) -> int:
        return len(self.indices) * self._pairs

    def __getitem__(self, item: int) -> Pair:
        if not 0 <= item < len(self):
            raise IndexError(f"pair {item} of {len(self)}")
        sample, step = divmod(item, self._pairs)
        index, step, source = self.indices[sample], step + 1, self.trajectories
        return dict(
            x_prev=torch.stack([source.latent(index, max(step - 1 - r, 0)) for r in range(self._reach)]),
            x=source.latent(index, step),
            eps=source.eps(index, step),
            **source.given(index),
            step=step,
            index=index,
        )


def _open_shard(root: Path, recipe: SetOrigin, number: int) -> Dataset:
    """Verify a shard and map it."""
    path, index = shard_path(root, number), shard_index(root, number)
    remedy = f"delete {path} and start again: it is then recorded anew"
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TrajectoryError(
            f"trajectory shard {path} cannot be read ({error}). If the run spans several machines, `root` must be a "
            "folder that they share; otherwise start again, and it is recorded anew."
        ) from error
    if index is None or index["set"] != recipe.digest:
        raise TrajectoryError(f"trajectory shard {path} has no index that belongs to this set: {remedy}.")
    if digest != index["sha256"]:
        raise TrajectoryError(f"trajectory shard {path} is damaged (sha256 {digest}, recorded {index['sha256']}): {remedy}.")
    return Dataset.from_file(str(path))


def _columns(shard: Dataset, recipe: SetOrigin) -> _Columns:
    """Views of the mapped columns. A shard is one record batch, so they need no copy."""
    rows = (RECORD_BATCH, recipe.num_steps + 1)
    latents, eps = (_flat(shard, name).reshape(*rows, *recipe.shape) for name in ("latent", "eps"))
    given = {c.name: _numbers(shard, c).reshape(*rows, *c.shape)[:, 0] for c in recipe.conditions}
    return _Columns(latents, eps, given)


def _numbers(shard: Dataset, condition: Condition) -> np.ndarray:
    """All numbers of a condition's column."""
    column = shard.data.column(condition.name).chunk(0)
    return (column.flatten() if condition.shape else column).to_numpy()


def _flat(shard: Dataset, name: str) -> np.ndarray:
    """All numbers of an Array3D column."""
    return shard.data.column(name).chunk(0).storage.flatten().flatten().flatten().to_numpy(zero_copy_only=True)
