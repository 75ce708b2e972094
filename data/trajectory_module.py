"""Recorded trajectories as training data: records what is missing with the module's frozen teacher, then serves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from data.recording import prepare, record
from data.shards import SetOrigin
from data.trajectories import Endpoints, Pair, PairDataset, TrajectorySet
from tc_lightning.errors import TokenCacheError, TrajectoryError
from tc_lightning.models.network import Network
from tc_lightning.plan.given import TRAINING, digest_of, part_for
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable


class Distiller(Protocol):
    """What the LightningModule must have; `reach` is how many steps before a step it looks at."""

    teacher: Network
    teacher_digest: str
    sampler: SamplerTable
    guidance: Guidance
    reach: int


class TrajectoryDataModule(LightningDataModule):
    """Steps of full-compute trajectories with those before them, for a module that has a frozen teacher.

    Batches are those of one process, whatever the number of processes: batch j of all of them together is batch j of one. The
    loaders bring their own distributed sampler, which the trainer leaves alone. Incomplete batches are dropped.

    Args:
        root: folder of the set; recorded there if it is missing or incomplete.
        num_train: training samples, indices 0 to num_train - 1.
        num_val: held-out samples, the indices after those.
        batch_size: pairs per optimiser step over all processes.
        seed: seed of noise, conditions and shuffling.
        num_workers: processes that read pairs; the set is memory-mapped, 0 is usually best.

    Raises:
        TokenCacheError: if an argument is out of range.
    """

    def __init__(
        self,
        root: str,
        num_train: int = 128,
        num_val: int = 32,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if min(num_train, num_val, batch_size) < 1 or num_workers < 0 or not 0 <= seed < 2**63:
            raise TokenCacheError(
                f"trajectories: num_train ({num_train}), num_val ({num_val}) and batch_size ({batch_size}) must be positive, "
                f"num_workers ({num_workers}) not negative and seed ({seed}) in 0 to 2**63 - 1."
            )
        self.root, self.batch_size, self.seed, self.num_workers = Path(root).expanduser(), batch_size, seed, num_workers
        self.train_indices, self.val_indices = range(num_train), range(num_train, num_train + num_val)
        self._set: TrajectorySet | None = None

    def setup(self, stage: str) -> None:
        """Record what is missing, all processes together, and open the set.

        Raises:
            TokenCacheError: if the module has no teacher, the batch size does not suit the number of processes or of samples,
                or the teacher's latents become NaN.
            TrajectoryError: if the folder holds another set, a shard is damaged, or there is no space.
        """
        recipe = self._recipe()
        self._check_batches(recipe.num_steps - 1)
        if self._set is not None and self._set.recipe == recipe:
            return
        self._record(recipe)

        def open_set() -> None:
            self._set = TrajectorySet(self.root, recipe, self.val_indices.stop)

        self._together(open_set)

    @property
    def trajectories(self) -> TrajectorySet:
        """The whole set; available after `setup`."""
        if self._set is None:
            raise TokenCacheError("the trajectories are not there before `setup` has run: use the data module within a Trainer.")
        return self._set

    @property
    def pairs(self) -> PairDataset:
        """Training pairs."""
        return PairDataset(self.trajectories, self.train_indices, self._distiller().reach)

    @property
    def val_pairs(self) -> PairDataset:
        """Held-out pairs."""
        return PairDataset(self.trajectories, self.val_indices, self._distiller().reach)

    def heldout(self) -> Endpoints:
        """Noise, conditions and final latents of the held-out samples."""
        return self.trajectories.endpoints(self.val_indices)

    def train_endpoints(self) -> Endpoints:
        """Noise, conditions and final latents of the training samples."""
        return self.trajectories.endpoints(self.train_indices)

    def train_latents(self, most: int) -> Tensor:
        """Latents of at most so many training samples before every step, [S, T, C, H, W]."""
        steps, found = range(self.trajectories.recipe.num_steps), self.train_indices[:most]
        return torch.stack([torch.stack([self.trajectories.latent(index, step) for step in steps]) for index in found])

    def train_dataloader(self) -> DataLoader[Pair]:
        """Shuffled training pairs, another order in each epoch."""
        return self._loader(self.pairs, shuffle=True)

    def val_dataloader(self) -> DataLoader[Pair]:
        """Held-out pairs, shuffled so that a few batches are of many samples."""
        return self._loader(self.val_pairs, shuffle=True)

    def test_dataloader(self) -> DataLoader[Pair]:
        """As in validation."""
        return self.val_dataloader()

    def _loader(self, items: Dataset, shuffle: bool) -> DataLoader:
        # Used with one process too, so that it and eight see the same order.
        world, rank = self._processes()
        sampler: DistributedSampler = DistributedSampler(items, world, rank, shuffle=shuffle, seed=self.seed, drop_last=True)
        return DataLoader(items, self.batch_size // world, sampler=sampler, drop_last=True, num_workers=self.num_workers)

    def _processes(self) -> tuple[int, int]:
        """Number of processes, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _distiller(self) -> Distiller:
        module = self.trainer.lightning_module if self.trainer else None
        missing = [name for name in Distiller.__annotations__ if not hasattr(module, name)]
        if module is None or missing:
            raise TokenCacheError(
                f"TrajectoryDataModule records trajectories of a module's frozen teacher, but {type(module).__name__} has no "
                f"{', '.join(missing)}. Use it with a module that distils a teacher; to train a teacher, use images "
                "(for example data.digits.DigitsDataModule)."
            )
        return cast(Distiller, module)

    def _recipe(self) -> SetOrigin:
        module = self._distiller()
        teacher, c = module.teacher, module.teacher.config
        shape = (c.in_channels, c.input_size, c.input_size)
        examples = digest_of(part_for(teacher.examples, TRAINING))
        return SetOrigin(module.teacher_digest, module.sampler, module.guidance, self.seed, shape, teacher.conditions, examples)

    def _check_batches(self, pairs_per_sample: int) -> None:
        world, _ = self._processes()
        if self.batch_size % world:
            raise TokenCacheError(
                f"batch_size {self.batch_size} counts the pairs of all processes together and is not a multiple of the {world} "
                f"processes: set it to a multiple of {world}."
            )
        fewest = min(len(self.train_indices), len(self.val_indices)) * pairs_per_sample
        if fewest < self.batch_size:
            raise TokenCacheError(
                f"batch_size {self.batch_size} is larger than the {fewest} pairs of neighbouring steps in the smaller of "
                "training and held-out samples: lower it, or raise `num_train`, `num_val` or the number of sampling steps."
            )

    def _record(self, recipe: SetOrigin) -> None:
        num, (world, rank) = self.val_indices.stop, self._processes()
        assert self.trainer is not None
        teacher, device = self._distiller().teacher, self.trainer.strategy.root_device
        self._together(lambda: prepare(self.root, recipe, num) if rank == 0 else None)
        self._together(lambda: record(self.root, recipe, teacher, num, device, rank, world))

    def _together(self, work: Callable[[], None]) -> None:
        """Do something in each process and wait for all (the reduction is a barrier); if one fails, so do the others."""
        failure: TokenCacheError | None = None
        try:
            work()
        except TokenCacheError as error:
            failure = error
        assert self.trainer is not None
        fine = self.trainer.strategy.reduce_boolean_decision(failure is None)
        if failure is not None:
            raise failure
        if not fine:
            raise TrajectoryError(f"another process could not record or read its part of {self.root}: its message says why.")
