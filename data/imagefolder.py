"""A folder of images, one sub-folder a class, as images in [-1, 1]."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from tc_lightning.errors import TokenCacheError, first_line

SPLIT_SEED = 0  # the split is a property of the folder, not of the run


class ImageFolderDataModule(LightningDataModule):
    """`root/<class>/<image>`: classes are numbered in alphabetical order.

    Args:
        root: folder that holds one sub-folder per class.
        size: height and width of the images; the shorter side is resized to it, the longer one cropped.
        batch_size: images per process and step.
        val_fraction: share of the images held out, the same ones in every run.
        num_workers: processes that read images.
        horizontal_flip: mirror half of the training images.
        random_crop: crop training images at random instead of in the middle.
        grayscale: one channel instead of three.

    Raises:
        TokenCacheError: if an argument is out of range, or (in `setup`) the folder is missing or holds too little.
    """

    def __init__(
        self,
        root: str,
        size: int = 256,
        batch_size: int = 64,
        val_fraction: float = 0.05,
        num_workers: int = 4,
        horizontal_flip: bool = True,
        random_crop: bool = False,
        grayscale: bool = False,
    ) -> None:
        super().__init__()
        if min(size, batch_size) < 1 or num_workers < 0 or not 0.0 <= val_fraction < 1.0:
            raise TokenCacheError(
                f"image folder: size ({size}) and batch_size ({batch_size}) must be positive, num_workers ({num_workers}) not "
                f"negative, val_fraction ({val_fraction}) in [0, 1)."
            )
        self.root, self.size, self.batch_size, self.val_fraction = Path(root).expanduser(), size, batch_size, val_fraction
        self.num_workers, self.horizontal_flip, self.random_crop = num_workers, horizontal_flip, random_crop
        self.grayscale = grayscale

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(_classes(self.root))

    def setup(self, stage: str) -> None:
        """List the images and split them."""
        train, val = self._dataset(self._train_transform()), self._dataset(self._crop(random=False))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        num_val = round(len(order) * self.val_fraction)
        self._train, self._val = Subset(train, sorted(order[num_val:])), Subset(val, sorted(order[:num_val]))
        needed = self.batch_size * (self.trainer.world_size if self.trainer else 1)
        if len(self._train) < needed:
            raise TokenCacheError(
                f"{self.root} leaves {len(self._train)} images for training ({num_val} held out), fewer than one batch of "
                f"{needed} over all processes: lower `batch_size` or `val_fraction`, or add images."
            )

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of (images [B, C, S, S], labels [B])."""
        return DataLoader(self._train, self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Held-out batches."""
        return DataLoader(self._val, self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        """Held-out batches."""
        return self.val_dataloader()

    def _dataset(self, transform: transforms.Compose) -> ImageFolder:
        _classes(self.root)
        try:
            return ImageFolder(str(self.root), transform, loader=self._load)
        except FileNotFoundError as error:
            raise TokenCacheError(f"a class folder in {self.root} holds no images. {error}") from error

    def _load(self, path: str) -> Image.Image:
        try:
            with Image.open(path) as image:
                return image.convert("L" if self.grayscale else "RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise TokenCacheError(f"image {path} cannot be read ({first_line(error)}): replace or remove it.") from error

    def _train_transform(self) -> transforms.Compose:
        flip = [transforms.RandomHorizontalFlip()] if self.horizontal_flip else []
        return transforms.Compose([*flip, self._crop(self.random_crop)])

    def _crop(self, random: bool) -> transforms.Compose:
        crop = transforms.RandomCrop(self.size) if random else transforms.CenterCrop(self.size)
        resize = transforms.Resize(self.size, transforms.InterpolationMode.BICUBIC)
        return transforms.Compose([resize, crop, transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])


def _classes(root: Path) -> list[str]:
    if not root.is_dir():
        raise TokenCacheError(f"image folder {root} does not exist; set `root` to a folder with one sub-folder of images per class.")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not classes:
        raise TokenCacheError(f"image folder {root} has no class sub-folders; put images in {root}/<class>/.")
    return classes
