from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.digits import DigitsDataModule, load_digits
from data.imagefolder import ImageFolderDataModule
from tc_lightning.errors import TokenCacheError, TrajectoryError

# Digits


@pytest.mark.parametrize("size", [8, 16])
def test_digits(size):
    images, labels = load_digits(size)
    assert images.shape == (1797, 1, size, size)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1.0, 1.0)
    assert sorted(set(labels.tolist())) == list(range(10))


def test_digits_split():
    module = DigitsDataModule(size=8, batch_size=64, num_val=100)
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert all(x.shape == (64, 1, 8, 8) and y.shape == (64,) for x, y in batches)
    assert len(batches) == (1797 - 100) // 64
    held_out = torch.cat([x for x, _ in module.val_dataloader()])
    torch.testing.assert_close(held_out, load_digits(8)[0][-100:])


# Image folders


def write(root: Path, per_class: int = 10, size: tuple[int, int] = (24, 16)) -> Path:
    """Classes a, b, c; the colour of an image tells its class and number."""
    for c, name in enumerate("abc"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", size, (c * 100, i * 10, 50)).save(root / name / f"{i:03}.png")
    return root


def module(root: Path, **changes) -> ImageFolderDataModule:
    return ImageFolderDataModule(**{"root": str(root), "size": 8, "batch_size": 4, "val_fraction": 0.2, "num_workers": 0} | changes)


def colours(loader) -> set[tuple[int, ...]]:
    return {tuple(((x[:, 4, 4] + 1) * 127.5).round().int().tolist()) for batch, _ in loader for x in batch}


def test_images_and_labels(tmp_path):
    images = module(write(tmp_path))
    assert images.num_classes == 3
    images.setup("fit")
    for x, y in images.train_dataloader():
        assert x.shape == (4, 3, 8, 8)
        assert x.dtype == torch.float32
        torch.testing.assert_close(((x[:, 0, 0, 0] + 1) * 127.5).round(), y * 100.0)
        torch.testing.assert_close(((x[:, 2, 0, 0] + 1) * 127.5).round(), torch.full((4,), 50.0))


def test_split_is_disjoint_and_the_same_every_time(tmp_path):
    first, second = module(write(tmp_path)), module(tmp_path)
    first.setup("fit")
    torch.manual_seed(123)
    second.setup("fit")
    val = colours(first.val_dataloader())
    assert val == colours(second.val_dataloader())
    assert len(val) == 6
    assert not val & colours(first.train_dataloader())
    everything = module(tmp_path, val_fraction=0.0)
    everything.setup("fit")
    assert list(everything.val_dataloader()) == []
    assert len(everything.train_dataloader()) == 7


def test_range_crop_and_flip(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255  # left half black, right half white; the central 8 x 8 is half and half
    for i in range(8):
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i}.png")
    plain = module(tmp_path, batch_size=8, val_fraction=0.0, horizontal_flip=False)
    plain.setup("fit")
    x, _ = next(iter(plain.train_dataloader()))
    expected = torch.cat([-torch.ones(8, 3, 8, 4), torch.ones(8, 3, 8, 4)], dim=3)
    assert torch.equal(x, expected)
    torch.manual_seed(0)
    flipped = module(tmp_path, batch_size=8, val_fraction=0.0)
    flipped.setup("fit")
    x, _ = next(iter(flipped.train_dataloader()))
    mirrored = [torch.equal(image, expected[0].flip(-1)) for image in x]
    assert any(mirrored)
    assert not all(mirrored)
    cropped = module(tmp_path, batch_size=8, val_fraction=0.0, horizontal_flip=False, random_crop=True)
    cropped.setup("fit")
    x, _ = next(iter(cropped.train_dataloader()))
    assert len({image.sum().item() for image in x}) > 1


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("grayscale", [False, True])
def test_colour_modes(tmp_path, mode, grayscale):
    (tmp_path / "a").mkdir()
    for i in range(4):
        Image.new("RGB", (9, 13), (255, 255, 255)).convert(mode).save(tmp_path / "a" / f"{i}.{'tiff' if mode == 'CMYK' else 'png'}")
    images = module(tmp_path, val_fraction=0.0, grayscale=grayscale)
    images.setup("fit")
    x, _ = next(iter(images.train_dataloader()))
    torch.testing.assert_close(x, torch.ones(4, 1 if grayscale else 3, 8, 8))


# Errors


def test_missing_folder(tmp_path):
    with pytest.raises(TokenCacheError, match="gone does not exist"):
        module(tmp_path / "gone").setup("fit")
    with pytest.raises(TokenCacheError, match="gone does not exist"):
        _ = module(tmp_path / "gone").num_classes


def test_no_classes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "stray.png")
    with pytest.raises(TokenCacheError, match="no class sub-folders"):
        module(tmp_path).setup("fit")


def test_class_without_images(tmp_path):
    (write(tmp_path) / "d").mkdir()
    (tmp_path / "d" / "notes.txt").write_text("no image", encoding="utf-8")
    with pytest.raises(TokenCacheError, match=r"no images.*\bd\b"):
        module(tmp_path).setup("fit")


def test_fewer_images_than_a_batch(tmp_path):
    with pytest.raises(TokenCacheError, match=r"leaves 24 images .* one batch of 25"):
        module(write(tmp_path), batch_size=25).setup("fit")


@pytest.mark.parametrize("change", [{"size": 0}, {"batch_size": 0}, {"num_workers": -1}, {"val_fraction": 1.0}, {"val_fraction": -0.1}])
def test_arguments_out_of_range(tmp_path, change):
    with pytest.raises(TokenCacheError, match=next(iter(change))):
        module(tmp_path, **change)


@pytest.mark.parametrize("damage", ["truncated", "text"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_image_is_named(tmp_path, damage, num_workers):
    write(tmp_path, size=(64, 64))
    for image in (tmp_path / "b").iterdir():
        image.write_bytes(image.read_bytes()[:-40] if damage == "truncated" else b"not an image")
    images = module(tmp_path, num_workers=num_workers)
    images.setup("fit")
    with pytest.raises(TokenCacheError, match=r"b/00\d\.png cannot be read") as caught:
        list(images.train_dataloader())
    assert re.fullmatch(r"image \S+ cannot be read \(.*\): replace or remove it\.", str(caught.value))


class Failing(torch.utils.data.Dataset):
    """Fails as data sets here do: with a cause that has lines of its own."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, item: int) -> int:
        try:
            raise ValueError("first\nTrajectoryError: second")
        except ValueError as error:
            raise TrajectoryError("shard 3 is damaged: delete it.") from error


def test_errors_of_data_workers_are_the_paragraph_that_was_raised():
    with pytest.raises(TrajectoryError) as caught:
        list(torch.utils.data.DataLoader(Failing(), num_workers=1))
    assert str(caught.value) == "shard 3 is damaged: delete it."
