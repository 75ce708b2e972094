"""The families of networks that the package knows: the one place that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tc_lightning.errors import TeacherError
from tc_lightning.models.dit import DiT, DiTConfig
from tc_lightning.models.network import Network


class Family(NamedTuple):
    """A network, and the dataclass of plain values that says its shape: `network(config(**values))` makes one."""

    network: type[Network]
    config: type


FAMILIES: dict[str, Family] = {"dit": Family(DiT, DiTConfig)}


def build(name: str, values: Mapping[str, Any]) -> Network:
    """A network of a family from the values of its shape, on the device that torch creates tensors on.

    Raises:
        TeacherError: if there is no such family, or it has no such shape.
    """
    if name not in FAMILIES:
        raise TeacherError(
            f"there is no family {name!r} of networks here: known are {', '.join(sorted(FAMILIES))}. Update tc-lightning."
        )
    family = FAMILIES[name]
    try:
        return family.network(family.config(**values))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise TeacherError(f"the shape of a {name} cannot be {dict(values)}: {error}.") from error
