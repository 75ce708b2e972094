"""`.safetensors` files: `save_teacher`'s own, and anybody's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tc_lightning.diffusion.described import schedule_from
from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import TeacherError, TokenCacheError
from tc_lightning.models.checkpoints.digest import FAMILY, SCHEDULE, SHAPE, digest
from tc_lightning.models.checkpoints.state import fits, parse_json, sample_values
from tc_lightning.models.dit import DiT
from tc_lightning.models.families import FAMILIES
from tc_lightning.plan.nulls import PREFIX
from tc_lightning.plan.signature import OUTPUTS, PIXELS

_SAID = {SHAPE, "sha256", "output"}  # what a file that `save_teacher` wrote says of itself, but for the last in early ones


class SafetensorsFile(NamedTuple):
    """What a file holds: tensors, and of one that `save_teacher` wrote shape, family, where it is not the family's, schedule, and the
    null values that it stores."""

    tensors: dict[str, Tensor]
    config: Any = None
    family: str | None = None
    schedule: Schedule | None = None
    nulls: dict[str, Tensor] | None = None


def read_safetensors(path: Path) -> SafetensorsFile:
    """All that is in a file; the digest of one that `save_teacher` wrote is checked.

    Raises:
        TeacherError: if the file is damaged, or its shape is not understood.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            raw = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise TeacherError(f"{path} is damaged or not a safetensors file ({error}). Copy or create it again.") from error
    if SHAPE not in metadata:
        return SafetensorsFile(raw)
    if metadata.keys() - _SAID or metadata.get("sha256") != digest(metadata[SHAPE], raw):
        raise TeacherError(f"{path} is damaged: its content does not have the sha256 it was written with. Copy or create it again.")
    output = metadata.get("output", PIXELS)  # before there was a word for it, what this package trained made pixels
    if output not in OUTPUTS:
        raise TeacherError(f"{path}: its metadata has the output {output!r}, which this version does not understand.")
    config, family, schedule = _parse_config(metadata[SHAPE], path)
    config = dataclasses.replace(config, output=output) if hasattr(config, "output") else config
    nulls = {name.removeprefix(PREFIX): raw.pop(name) for name in list(raw) if name.startswith(PREFIX)}
    return SafetensorsFile(raw, config, family, schedule, nulls or None)


def _parse_config(text: str, path: Path) -> tuple[Any, str, Schedule | None]:
    raw = parse_json(text, path)
    schedule = _parse_schedule(raw.pop(SCHEDULE, None), path)
    family = raw.pop(FAMILY, DiT.family)
    if not isinstance(family, str) or family not in FAMILIES:
        raise TeacherError(f"{path}: its metadata has family = {family!r}, which this version does not understand.")
    shape = FAMILIES[family].config
    samples = sample_values(shape)
    for key, value in raw.items():
        if key not in samples or not fits(value, samples[key]):
            raise TeacherError(f"{path}: the shape in its metadata has {key} = {value!r}, which this version does not understand.")
    try:
        return shape(**raw), family, schedule
    except (TypeError, ValueError) as error:
        raise TeacherError(f"{path}: its metadata has no shape of a {family} ({error}), as this version understands it.") from error


def _parse_schedule(raw: Any, path: Path) -> Schedule | None:
    if raw is None:
        return None
    try:
        if not isinstance(raw, dict):
            raise TokenCacheError(f"an object was expected, found {raw!r}.")
        return schedule_from(raw)
    except TokenCacheError as error:
        raise TeacherError(f"{path}: its metadata has a schedule that this version does not understand: {error}") from error
