"""Image grids as PNG files."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

LABEL_WIDTH, PAD, SMALLEST = 84, 4, 64


def to_pixels(latents_BCHW: np.ndarray) -> np.ndarray:
    """RGB bytes [B, H, W, 3]: pixels in [-1, 1] as they are; of a latent with more channels, the first three over their range."""
    x = latents_BCHW.transpose(0, 2, 3, 1)
    if x.shape[-1] == 1:
        x = np.repeat(x, 3, axis=-1)
    elif x.shape[-1] != 3:
        x = x[..., :3] / max(float(np.abs(x[..., :3]).max()), 1e-6)
    return np.round((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)


def difference_pixels(a_BCHW: np.ndarray, b_BCHW: np.ndarray, gain: float) -> np.ndarray:
    """Absolute difference, averaged over channels and amplified, as grey levels [B, H, W, 3]."""
    grey = np.clip(np.abs(a_BCHW - b_BCHW).mean(1) * gain, 0, 2)
    return np.repeat(np.round(grey * 127.5).astype(np.uint8)[..., None], 3, axis=-1)


def save_grid(rows: dict[str, np.ndarray], path: Path) -> None:
    """Write rows of images [B, H, W, 3] uint8, each with its name on the left, as one PNG."""
    tiles = {name: [_enlarge(image) for image in images] for name, images in rows.items()}
    height, width = np.asarray(next(iter(tiles.values()))[0]).shape[:2]
    columns = max(len(images) for images in tiles.values())
    canvas = Image.new("RGB", (LABEL_WIDTH + columns * (width + PAD), len(tiles) * (height + PAD)), "white")
    draw = ImageDraw.Draw(canvas)
    for r, (name, images) in enumerate(tiles.items()):
        draw.text((PAD, r * (height + PAD) + height // 2 - 6), name, fill="black")
        for c, image in enumerate(images):
            canvas.paste(image, (LABEL_WIDTH + c * (width + PAD), r * (height + PAD)))
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG")


def save_images(rows: dict[str, np.ndarray], folder: Path) -> None:
    """Write every image [H, W, 3] uint8 of some rows as a PNG of its own, `NUMBER-ROW.png`, into a folder that is made if need be."""
    folder.mkdir(exist_ok=True)
    for name, images in rows.items():
        for number, image in enumerate(images):
            with replacing(folder / f"{number:04d}-{name}.png") as temporary:
                Image.fromarray(image).save(temporary, format="PNG")


def png_of(image_CHW: np.ndarray) -> bytes:
    """An image in [-1, 1] as the bytes of a PNG file, in colour; of more than three channels the first three."""
    file = io.BytesIO()
    Image.fromarray(to_pixels(image_CHW[None])[0]).save(file, format="PNG")
    return file.getvalue()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when all went well, and vanishes if not.

    Raises:
        OSError: if the disk is full or the folder cannot be written; it names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _enlarge(pixels: np.ndarray) -> Image.Image:
    factor = max(1, -(-SMALLEST // pixels.shape[0]))
    image = Image.fromarray(pixels)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
