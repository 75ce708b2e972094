"""Noise from which students roll out, one batch for each denoising step; nothing of it is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data.trajectory_module import TrajectoryDataModule
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import Conditions
from tc_lightning.plan.given import TRAINING, Arrays, drawn, part_for
from tc_lightning.rollout.noise import initial_noise

# One step of one rollout: noise, step, index, and each condition by its name; collated, noise is [B, C, H, W] and numbers [B].
RolloutStep = dict[str, Any]


class RolloutDataset(TorchDataset[RolloutStep]):
    """Steps 1 to T - 1 of groups of `batch_size` rollouts: all rollouts of a group at a step, then at the next step.

    Args:
        indices: global index of each rollout, which keys its noise; a whole number of groups.
        batch_size: rollouts of a group.
        num_steps: sampling steps T.
        seed: seed of noise and conditions.
        shape: shape of one latent.
        conditions: of the teacher.
        examples: of conditions that cannot be drawn.
    """

    def __init__(
        self,
        indices: range,
        batch_size: int,
        num_steps: int,
        seed: int,
        shape: tuple[int, ...],
        conditions: Conditions,
        examples: Arrays | None = None,
    ) -> None:
        self.indices, self.batch_size, self.num_steps = indices, batch_size, num_steps
        self.seed, self.shape, self.conditions, self.examples = seed, shape, conditions, examples

    def __len__(self) -> int:
        return len(self.indices) * (self.num_steps - 1)

    def __getitem__(self, item: int) -> RolloutStep:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        place, row = divmod(item, self.batch_size)
        group, step = divmod(place, self.num_steps - 1)
        index = self.indices[group * self.batch_size + row]
        noise = torch.from_numpy(initial_noise(self.seed, [index], self.shape)[0])
        given = {name: torch.tensor(rows[0]) for name, rows in drawn(self.conditions, self.seed, [index], self.examples).items()}
        return {"noise": noise, **given, "step": step + 1, "index": index}


class RolloutDataModule(TrajectoryDataModule):
    """Noise for `RouterRollout`, and recorded trajectories for what follows training: sensitivities, planning, validation.

    A batch is one denoising step of `batch_size` rollouts over all processes. Their noise is a function of (seed, index), with
    indices after those of the recorded samples.

    Args:
        root: folder of the recorded set; recorded there if it is missing or incomplete.
        num_train: recorded samples over which sensitivities are measured.
        num_val: held-out samples, the indices after those.
        batch_size: rollouts at once over all processes.
        seed: seed of noise, conditions and shuffling.
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
        conditions, examples = recipe.conditions, part_for(self._distiller().teacher.examples, TRAINING)
        return RolloutDataset(indices, self.batch_size, recipe.num_steps, self.seed, recipe.shape, conditions, examples)

    def train_dataloader(self) -> DataLoader:
        """Rollouts, each process its share of every batch."""
        return self._loader(self.rollouts, shuffle=False)
