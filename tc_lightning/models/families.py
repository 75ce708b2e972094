"""The families of networks that the package knows: the one place that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tc_lightning.diffusion.described import describe, schedule_from
from tc_lightning.errors import TeacherError, TokenCacheError
from tc_lightning.models.dit import DiT, DiTConfig
from tc_lightning.models.mdt import MDT, MDTConfig
from tc_lightning.models.network import Network
from tc_lightning.models.pixart import PixArt, PixArtConfig
from tc_lightning.models.sd3 import SD3, SD3Config
from tc_lightning.models.sit import SiT


class Family(NamedTuple):
    """A network, and the dataclass of plain values that says its shape: `network(config(**values))` makes one."""

    network: type[Network]
    config: type


FAMILIES: dict[str, Family] = {
    "dit": Family(DiT, DiTConfig),
    "sit": Family(SiT, DiTConfig),
    "pixart": Family(PixArt, PixArtConfig),
    "mdt": Family(MDT, MDTConfig),
    "sd3": Family(SD3, SD3Config),
}


def family_of(name: str) -> Family:
    """The family of this name.

    Raises:
        TeacherError: if there is none.
    """
    if name not in FAMILIES:
        raise TeacherError(f"unknown family {name!r}: choose one of {', '.join(FAMILIES)}, or update tc-lightning.")
    return FAMILIES[name]


def shaped_as_dit(name: str) -> type[DiT]:
    """The network of a family that has a DiT's shape and names of weights: what today's readers and the training of teachers take.

    Raises:
        TeacherError: if there is no such family, or it has a shape of its own.
    """
    network = family_of(name).network
    if not issubclass(network, DiT):
        raise TeacherError(f"a {name} has not the shape of a DiT, which is what is read and trained here: choose another `family`.")
    return network


def build(name: str, values: Mapping[str, Any], schedule: Mapping[str, Any] | None = None) -> Network:
    """A network of a family from the values of its shape, on the device that torch creates tensors on.

    Args:
        name: the family.
        values: of its shape.
        schedule: `own_schedule` of it; None for the family's.

    Raises:
        TeacherError: if there is no such family, or it has no such shape or schedule.
    """
    family = family_of(name)
    try:
        network = family.network(family.config(**values))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise TeacherError(f"the shape of a {name} cannot be {dict(values)}: {error}.") from error
    if schedule is not None:
        try:
            network.schedule = schedule_from(schedule)
        except TokenCacheError as error:
            raise TeacherError(f"the schedule of a {name} cannot be {dict(schedule)}: {error}") from error
    return network


def own_schedule(network: Network) -> dict[str, Any] | None:
    """A network's schedule in plain values, where it is not its family's; None where it is.

    Raises:
        TokenCacheError: if it is of a kind that cannot be written down.
    """
    return None if network.schedule == type(network).schedule else describe(network.schedule)
