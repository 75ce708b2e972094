"""Families of networks by name: for checkpoints that do not say what they hold, and for training from scratch."""

from __future__ import annotations

from tc_lightning.errors import TeacherError
from tc_lightning.models.dit import DiT
from tc_lightning.models.sit import SiT

FAMILIES: dict[str, type[DiT]] = {network.family: network for network in (DiT, SiT)}


def family_of(name: str) -> type[DiT]:
    """The networks of a family.

    Raises:
        TeacherError: if there is no such family.
    """
    if name not in FAMILIES:
        raise TeacherError(f"unknown family {name!r}: choose one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]
