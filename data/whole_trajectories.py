"""Whole recorded trajectories as training data, for what is learned from several steps of one run at once."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data.trajectories import TrajectorySet
from data.trajectory_module import TrajectoryDataModule
from tc_lightning.errors import TokenCacheError

# Latents before every step, index, and each condition by its name; collated, latents are [B, T, C, H, W] and numbers [B].
Whole = dict[str, Any]


class WholeTrajectories(TorchDataset[Whole]):
    """Recorded samples, each with its latents before all steps.

    Args:
        trajectories: the set.
        indices: the samples taken from it.
    """

    def __init__(self, trajectories: TrajectorySet, indices: range) -> None:
        self.trajectories, self.indices = trajectories, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> Whole:
        index, source = self.indices[item], self.trajectories
        latents = torch.stack([source.latent(index, step) for step in range(source.recipe.num_steps)])
        return {"latents": latents, **source.given(index), "index": index}


class WholeTrajectoryDataModule(TrajectoryDataModule):
    """Batches of whole trajectories, for `tc_lightning.learn.objectives.corrector`; arguments of `TrajectoryDataModule`, of which
    `batch_size` counts trajectories.

    Raises:
        TokenCacheError: if an argument is out of range.
    """

    def __init__(
        self,
        root: str,
        num_train: int = 96,
        num_val: int = 32,
        batch_size: int = 4,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(root, num_train, num_val, batch_size, seed, num_workers)

    def train_dataloader(self) -> DataLoader:
        """Shuffled training trajectories, another order in each epoch."""
        return self._loader(WholeTrajectories(self.trajectories, self.train_indices), shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Held-out trajectories."""
        return self._loader(WholeTrajectories(self.trajectories, self.val_indices), shuffle=True)

    def _check_batches(self, pairs_per_sample: int) -> None:
        fewest = min(len(self.train_indices), len(self.val_indices))
        if fewest < self.batch_size:
            raise TokenCacheError(
                f"batch_size {self.batch_size} counts trajectories and is larger than the {fewest} samples of training or validation, "
                "whichever are fewer: lower it, or raise `num_train` or `num_val`."
            )
        super()._check_batches(1)
