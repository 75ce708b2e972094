"""The 1,797 real handwritten digits of scikit-learn (8 x 8 grey levels), upsampled, as images in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tc_lightning.errors import TokenCacheError

IMAGES = 1797


def load_digits(size: int = 16) -> tuple[Tensor, Tensor]:
    """Images [1797, 1, size, size] float32 in [-1, 1] (bilinear upsampling) and labels [1797] int64."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images.astype(np.float32) / 8.0 - 1.0)[:, None]
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False), torch.from_numpy(bunch.target).long()


class DigitsDataModule(LightningDataModule):
    """Digits for training a teacher; the last `num_val` images are held out.

    Args:
        size: height and width to upsample to.
        batch_size: images per process and step.
        num_val: images held out for validation.
    """

    num_classes = 10

    def __init__(self, size: int = 16, batch_size: int = 64, num_val: int = 128) -> None:
        super().__init__()
        if not 1 <= num_val <= IMAGES - batch_size or min(size, batch_size) < 1:
            raise TokenCacheError(
                f"digits: size ({size}), batch_size ({batch_size}) and num_val ({num_val}) must be at least 1, and leave one batch of "
                f"the {IMAGES} images for training."
            )
        self.size, self.batch_size, self.num_val = size, batch_size, num_val

    def setup(self, stage: str) -> None:
        """Load and split."""
        images, labels = load_digits(self.size)
        self._train = TensorDataset(images[: -self.num_val], labels[: -self.num_val])
        self._val = TensorDataset(images[-self.num_val :], labels[-self.num_val :])

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of (images [B, 1, S, S], labels [B])."""
        return DataLoader(self._train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Held-out batches."""
        return DataLoader(self._val, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Held-out batches."""
        return self.val_dataloader()
