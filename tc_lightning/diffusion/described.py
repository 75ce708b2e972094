"""Schedules as plain values, for a file beside a network that does not have its family's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tc_lightning.diffusion.flow import Flow
from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import TokenCacheError

KIND = "kind"  # beside the fields of a schedule
_KINDS: dict[str, type[LinearBetas] | type[Flow]] = {"linear_betas": LinearBetas, "flow": Flow}


def describe(schedule: Schedule) -> dict[str, Any]:
    """Plain JSON values; `schedule_from` inverts it exactly.

    Raises:
        TokenCacheError: if the schedule is of a kind that has no name here.
    """
    for kind, made in _KINDS.items():
        if type(schedule) is made:
            return {KIND: kind, **dataclasses.asdict(schedule)}
    raise TokenCacheError(
        f"a {type(schedule).__name__} cannot be written beside a network: make it the `schedule` of the network's class, or take one "
        f"of {', '.join(made.__name__ for made in _KINDS.values())}."
    )


def schedule_from(described: Mapping[str, Any]) -> Schedule:
    """The schedule that was described.

    Raises:
        TokenCacheError: if it is none, or cannot be.
    """
    values = dict(described)
    made = _KINDS.get(str(values.pop(KIND, None)))
    if made is None:
        raise TokenCacheError(f"a schedule of the kind {described.get(KIND)!r} is not known: one of {', '.join(_KINDS)} was expected.")
    defaults = {field.name: field.default for field in dataclasses.fields(made)}
    for name, value in values.items():
        if name not in defaults or type(value) is not type(defaults[name]):
            raise TokenCacheError(f"a schedule {described[KIND]} cannot have {name} = {value!r}.")
    return made(**values)
