"""Folders in the layout of diffusers: a transformer's own, or a whole pipeline's. diffusers itself is not needed."""

from __future__ import annotations

from pathlib import Path

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.diffusers_classes import READERS, class_of
from tc_lightning.models.checkpoints.diffusers_config import CONFIG, ReadNetwork, read_config
from tc_lightning.models.checkpoints.diffusers_weights import STEM
from tc_lightning.models.checkpoints.pipeline import INDEX, SCHEDULER, TRANSFORMER, read_pipeline


def is_diffusers(path: Path) -> bool:
    """Whether a path is a folder, or one of the weights files or indices in a model's folder of diffusers."""
    return path.is_dir() or (path.name.startswith(f"{STEM}.") and (path.parent / CONFIG).exists())


def read_diffusers(path: Path) -> ReadNetwork:
    """The network of a folder, by the reader of its class; of a pipeline, with the schedule that its scheduler says.

    Args:
        path: the model's folder or a whole pipeline's; or the one of its weights files (or indices) that is meant.

    Raises:
        TeacherError: if something is missing, damaged, contradictory or not supported.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / INDEX).exists():
        pipeline = read_pipeline(folder)
        model, notes = _read(pipeline.transformer, pipeline.transformer_class)
        pipeline.require_latents(model)
        model.schedule = pipeline.schedule
        return ReadNetwork(model, [*notes, *pipeline.notes])
    if not (folder / CONFIG).exists() and (folder / TRANSFORMER).is_dir():
        if (folder / SCHEDULER).exists():
            raise TeacherError(
                f"{folder} is a pipeline without its {INDEX}: fetch the folder again, whole; or set `weights` to "
                f"{folder / TRANSFORMER}, the network alone, if its family's own schedule is the one that it was trained with."
            )
        return _read(folder / TRANSFORMER)
    if not (folder / CONFIG).exists():
        raise TeacherError(
            f"{folder} holds no {CONFIG}; a folder must be in diffusers' layout: {CONFIG} and {STEM}.safetensors, or a pipeline's "
            f"{INDEX}."
        )
    return _read(path)


def _read(path: Path, expected: str | None = None) -> ReadNetwork:
    folder = path if path.is_dir() else path.parent
    config = read_config(folder / CONFIG)
    name = class_of(config, folder)
    if expected is not None and name != expected:
        raise TeacherError(f"{folder / CONFIG} is of a {name}, and its pipeline has a {expected}: the folder mixes two models.")
    return READERS[name](path, config)
