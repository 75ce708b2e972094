"""A pipeline's folder of diffusers (`model_index.json`): which transformer, what schedule, which VAE. Nothing of it is guessed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.diffusers_classes import PIPELINES
from tc_lightning.models.checkpoints.diffusers_config import CLASS, CONFIG, read_config
from tc_lightning.models.checkpoints.diffusers_weights import choose_weights
from tc_lightning.models.checkpoints.scheduler_config import SCHEDULER_CONFIG, read_schedule
from tc_lightning.models.checkpoints.spec import TeacherSpec, locate
from tc_lightning.models.network import Network

INDEX = "model_index.json"
TRANSFORMER, SCHEDULER, VAE = "transformer", "scheduler", "vae"
VAE_CLASS = "AutoencoderKL"
_SCALING = 0.18215  # what diffusers takes where an older configuration says nothing


@dataclasses.dataclass(frozen=True)
class Vae:
    """Where the decoder of a model's latents is, and how they are given to it: latents / scaling_factor + shift_factor.

    Args:
        folder: its folder, in diffusers' layout.
        channels: of the latents.
        scaling_factor: see above.
        shift_factor: see above.
    """

    folder: Path
    channels: int
    scaling_factor: float
    shift_factor: float

    def require_channels(self, channels: int) -> None:
        """Check that it decodes what a network makes.

        Raises:
            TeacherError: if it has other channels.
        """
        if channels != self.channels:
            raise TeacherError(
                f"the VAE in {self.folder} decodes latents of {self.channels} channels, and the network makes {channels}: they do not "
                "belong together. Name the folder of the VAE that the network was trained with."
            )


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What there is of a pipeline.

    Args:
        transformer: folder of its transformer.
        transformer_class: the class that it has.
        schedule: what its scheduler says.
        vae: its VAE.
        notes: what a user wants to know of it, in words.
    """

    transformer: Path
    transformer_class: str
    schedule: Schedule
    vae: Vae
    notes: list[str]

    def require_latents(self, network: Network) -> None:
        """Check that the VAE decodes what the network makes.

        Raises:
            TeacherError: if it has other channels.
        """
        self.vae.require_channels(network.config.in_channels)


def read_pipeline(folder: Path) -> Pipeline:
    """What a pipeline's folder says of itself; no weights are read.

    Raises:
        TeacherError: if the pipeline, its scheduler or its VAE is not supported, or a part is missing or damaged.
    """
    path = folder / INDEX
    index = read_config(path)
    name = index.get(CLASS)
    if not isinstance(name, str) or name not in PIPELINES:
        raise TeacherError(
            f"{path} is of a {name}: pipelines of {', '.join(PIPELINES)} can be read. If its transformer is of a class that can, set "
            f"`weights` to {folder / TRANSFORMER}."
        )
    _part(folder, index, TRANSFORMER, CONFIG)
    schedule = read_schedule(folder / SCHEDULER, _part(folder, index, SCHEDULER, SCHEDULER_CONFIG))
    if index.get(VAE) in (None, [None, None]):
        raise TeacherError(
            f"{path} names no {VAE}: without one there are no pixels. Fetch the pipeline whole; or set `weights` to "
            f"{folder / TRANSFORMER} to make latents alone."
        )
    if (kind := _part(folder, index, VAE, CONFIG)) != VAE_CLASS:
        raise TeacherError(
            f"{path}: its {VAE} is of a {kind}, and only {VAE_CLASS} is supported. Set `weights` to {folder / TRANSFORMER} to make "
            "latents alone."
        )
    return Pipeline(folder / TRANSFORMER, PIPELINES[name], schedule.schedule, read_vae(folder / VAE), schedule.notes)


def find_vae(spec: TeacherSpec) -> Vae | None:
    """The VAE of a teacher that is a whole pipeline; None for any other.

    Raises:
        TeacherError: if the pipeline cannot be used.
    """
    path = locate(spec.weights)
    return read_pipeline(path).vae if (path / INDEX).exists() else None


def read_vae(folder: Path) -> Vae:
    """What a folder says of the VAE in it; no weights are read.

    Raises:
        TeacherError: if it is of another class, or something is missing or damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise TeacherError(f"no VAE in {folder}: a folder of diffusers was expected, with {CONFIG} and weights.")
    raw = read_config(path)
    if raw.get(CLASS) != VAE_CLASS:
        raise TeacherError(f"{path} is of a {raw.get(CLASS)}: only {VAE_CLASS} is supported.")
    for key in ("latents_mean", "latents_std"):
        if raw.get(key) is not None:
            raise TeacherError(f"{path}: {key} is set; only one scaling_factor and one shift_factor for all channels are supported.")
    channels, scaling, shift = raw.get("latent_channels", 4), raw.get("scaling_factor", _SCALING), raw.get("shift_factor") or 0.0
    if type(channels) is not int or channels < 1:
        raise TeacherError(f"{path}: latent_channels is {channels!r}; a positive integer was expected.")
    if not _is_number(scaling) or not scaling > 0:
        raise TeacherError(f"{path}: scaling_factor is {scaling!r}; a positive number was expected.")
    if not _is_number(shift):
        raise TeacherError(f"{path}: shift_factor is {shift!r}; a number was expected, or null.")
    choose_weights(folder)
    return Vae(folder, channels, float(scaling), float(shift))


def _part(folder: Path, index: dict[str, Any], part: str, file: str) -> str:
    """The class of a part, whose folder holds its configuration."""
    said = index.get(part)
    if not isinstance(said, list) or len(said) != 2 or said[0] != "diffusers" or not isinstance(said[1], str):
        raise TeacherError(f'{folder / INDEX}: its {part} is {said!r}; a class of diffusers was expected, as ["diffusers", NAME].')
    if not (folder / part / file).is_file():
        raise TeacherError(f"{folder} names a {part} ({said[1]}) and holds no {part}/{file}: fetch the folder again, whole.")
    return said[1]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
