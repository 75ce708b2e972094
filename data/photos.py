"""Crops of scikit-learn's two photographs (a temple in China, a flower), as images in [-1, 1]: real colour images on any machine.

The photographs are reduced by `SHRINK`, so that a crop of 32 pixels shows parts of things, not only texture. The class of a crop is
the photograph that it comes from.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tc_lightning.errors import TokenCacheError

NAMES = ("china.jpg", "flower.jpg")
SHRINK = 3
HELD_OUT = 0.25  # of the width, at the right: validation crops come from there, training crops from the rest


def load_photos() -> list[Tensor]:
    """The reduced photographs, each [3, H, W] float32 in [-1, 1]."""
    from sklearn import datasets

    photos = [torch.from_numpy(datasets.load_sample_image(name).astype(np.float32) / 127.5 - 1.0) for name in NAMES]
    return [F.avg_pool2d(photo.permute(2, 0, 1), SHRINK) for photo in photos]


class CropDataset(Dataset[tuple[Tensor, int]]):
    """Random crops: item i is a function of (seed, i) alone. Half of them are mirrored.

    Args:
        photos: images [3, H, W], one a class.
        size: side of a crop.
        length: number of items.
        seed: seed of places and mirroring.
    """

    def __init__(self, photos: list[Tensor], size: int, length: int, seed: int) -> None:
        self.photos, self.size, self.length, self.seed = photos, size, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        if not 0 <= item < self.length:
            raise IndexError(f"crop {item} of {self.length}")
        chooser = np.random.Generator(np.random.Philox(key=[self.seed, item]))
        label = item % len(self.photos)
        photo = self.photos[label]
        top, left = (int(chooser.integers(side - self.size + 1)) for side in photo.shape[1:])
        crop = photo[:, top : top + self.size, left : left + self.size]
        return (crop.flip(2) if chooser.random() < 0.5 else crop), label


class PhotoCropsDataModule(LightningDataModule):
    """Crops for training a teacher; validation crops come from the right quarter of the photographs, which training never sees.

    Args:
        size: side of a crop.
        batch_size: images per process and step.
        crops_per_epoch: training crops of one epoch.
        num_val: validation crops.
        seed: seed of the crops.

    Raises:
        TokenCacheError: if an argument is out of range.
    """

    num_classes = len(NAMES)

    def __init__(self, size: int = 32, batch_size: int = 64, crops_per_epoch: int = 65536, num_val: int = 256, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= size <= 48 or min(batch_size, num_val) < 1 or crops_per_epoch < batch_size or seed < 0:
            raise TokenCacheError(
                f"photo crops: size ({size}) must be 1 to 48, batch_size ({batch_size}) and num_val ({num_val}) at least 1, "
                f"crops_per_epoch ({crops_per_epoch}) at least one batch, seed ({seed}) not negative."
            )
        self.size, self.batch_size, self.crops_per_epoch, self.num_val, self.seed = size, batch_size, crops_per_epoch, num_val, seed

    def setup(self, stage: str) -> None:
        """Load the photographs and part them."""
        photos = load_photos()
        borders = [round(photo.shape[2] * (1 - HELD_OUT)) for photo in photos]
        train = [photo[:, :, :border] for photo, border in zip(photos, borders, strict=True)]
        val = [photo[:, :, border:] for photo, border in zip(photos, borders, strict=True)]
        self._train = CropDataset(train, self.size, self.crops_per_epoch, self.seed)
        self._val = CropDataset(val, self.size, self.num_val, self.seed + 1)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Shuffled batches of (images [B, 3, S, S], labels [B])."""
        return DataLoader(self._train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Held-out batches."""
        return DataLoader(self._val, self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Held-out batches."""
        return self.val_dataloader()
