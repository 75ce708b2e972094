"""What the field's evaluators of FID read: a .npz file with `arr_0`, [N, H, W, 3] uint8; a few images are in memory at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from export.generation.job import IMAGE, Job, name_of
from export.generation.shard import read_pictures
from export.grid import replacing
from tc_lightning.errors import TokenCacheError

ARRAY = "arr_0.npy"  # as OpenAI's guided-diffusion writes it, whose evaluator others took over


def require_npz(job: Job, path: Path) -> None:
    """Check before anything is made what can be checked.

    Raises:
        TokenCacheError: if no images are kept, or the file could not be written.
    """
    if IMAGE not in job.keep:
        raise TokenCacheError("`--npz` is of images, and these are not kept: ask for `--keep image` or `--keep image latent`.")
    if not path.resolve().parent.is_dir() or path.is_dir():
        raise TokenCacheError(f"cannot write {path}: it is a folder, or the one that it is to be made in does not exist.")
    if path.resolve().parent == Path(job.out).resolve():
        raise TokenCacheError(f"cannot write {path}: all files beside the shards are read as shards. Name a file elsewhere.")
    if path.resolve().parent == Path(job.artefact).resolve():
        raise TokenCacheError(f"cannot write {path}: nothing may be added to an artefact. Name a file outside it.")


def write_npz(job: Job, path: Path, on_images: Callable[[int], object]) -> None:
    """Write the images of all shards, in order of their indices.

    Args:
        job: what was made.
        path: file to write; it is there when it is whole.
        on_images: called with how many more were written.

    Raises:
        TokenCacheError: if an image is missing.
    """
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        _write(job, archive, on_images)


def _write(job: Job, archive: zipfile.ZipFile, on_images: Callable[[int], object]) -> None:
    begun = False
    with archive.open(ARRAY, "w", force_zip64=True) as file:
        for shard in range(job.shards):
            for missing, pictures in read_pictures(Path(job.out) / name_of(shard)):
                if missing:
                    raise TokenCacheError(
                        f"there is no image {missing[0]} ({name_of(shard)} says in its column `failed` why), and an evaluator takes "
                        "every one: make them anew with another seed or guidance, or evaluate what the shards hold."
                    )
                if not begun:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (job.images, *pictures[0].shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                    begun = True
                for picture in pictures:
                    file.write(picture.tobytes())
                on_images(len(pictures))
