"""Noise from which students roll out, one batch for each denoising step; nothing of it is recorded."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data.trajectory_module import TrajectoryDataModule
from tc_lightning.errors import TokenCacheError
from tc_lightning.rollout.noise import drawn_labels, initial_noise


class Rollout(TypedDict):
    """One step of one rollout; collated, noise is [B, C, H, W] and numbers [B]."""

    noise: Tensor
    label: int
    step: int
    index: int


class RolloutDataset(TorchDataset[Rollout]):
    """Steps 1 to T - 1 of groups of `batch_size` rollouts: all rollouts of a group at a step, then at the next step.

    Args:
        indices: global index of each rollout, which keys its noise; a whole number of groups.
        batch_size: rollouts of a group.
        num_steps: sampling steps T.
        seed: seed of noise and labels.
        shape: shape of one latent.
        num_classes: classes of the labels.
    """

    def __init__(self, indices: range, batch_size: int, num_steps: int, seed: int, shape: tuple[int, ...], num_classes: int) -> None:
        self.indices, self.batch_size, self.num_steps = indices, batch_size, num_steps
        self.seed, self.shape, self.num_classes = seed, shape, num_classes

    def __len__(self) -> int:
        return len(self.indices) * (self.num_steps - 1)

    def __getitem__(self, item: int) -> Rollout:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        place, row = divmod(item, self.batch_size)
        group, step = divmod(place, self.num_steps - 1)
        index = self.indices[group * self.batch_size + row]
        noise = torch.from_numpy(initial_noise(self.seed, [index], self.shape)[0])
        label = int(drawn_labels(self.seed, [index], self.num_classes)[0])
        return Rollout(noise=noise, label=label, step=step + 1, index=index)


class RolloutDataModule(TrajectoryDataModule):
    """Noise for `RouterRollout`, and recorded trajectories for what follows training: sensitivities, planning, validation.

    A batch is one denoising step of `batch_size` rollouts over all processes. Their noise is a function of (seed, index), with
    indices after those of the recorded samples.

    Args:
        root: folder of the recorded set; recorded there if it is missing or incomplete.
        num_train: recorded samples over which sensitivities are measured.
        num_val: held-out samples, the indices after those.
        batch_size: rollouts at once over all processes.
        seed: seed of noise, labels and shuffling.
        num_workers: processes that make noise; 0 is usually best.
        groups: groups of `batch_size` rollouts in an epoch, each of T - 1 batches; an epoch after it has the same ones.

    Raises:
        TokenCacheError: if an argument is out of range.
    """

    def __init__(
        self,
        root: str,
        num_train: int = 16,
        num_val: int = 32,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
        groups: int = 64,
    ) -> None:
        super().__init__(root, num_train, num_val, batch_size, seed, num_workers)
        if groups < 1:
            raise TokenCacheError(f"rollouts: groups ({groups}) must be positive.")
        self.groups = groups

    @property
    def rollouts(self) -> RolloutDataset:
        """Training rollouts, in order."""
        recipe, first = self.trajectories.recipe, self.val_indices.stop
        indices = range(first, first + self.groups * self.batch_size)
        return RolloutDataset(indices, self.batch_size, recipe.num_steps, self.seed, recipe.shape, recipe.num_classes)

    def train_dataloader(self) -> DataLoader:
        """Rollouts, each process its share of every batch."""
        return self._loader(self.rollouts, shuffle=False)
