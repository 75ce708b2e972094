"""A sampler as a table of coefficients: plain numbers, no torch, no numpy.

DDIM, DPM-Solver++ 2M and 3M, ancestral DDPM and flow-matching Euler are all linear in the latents and in the last network outputs.
With eps the (guided) network output at step i, one step is

    m_i     = m_x * x_i + m_eps * eps                          the quantity that the solver extrapolates (eps, x0 or v)
    x_{i+1} = next_x * x_i + next_m * m_i + next_m_prev * m_{i-1} + next_m_prev2 * m_{i-2} + noise * N(0, I)

and nothing else about the sampler is known anywhere downstream.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from tc_lightning.errors import PlanError
from tc_lightning.plan.json_fields import is_name, is_number, shown

FITTED = "-fitted"  # ends the name of a sampler whose coefficients were fitted to a model
MAX_HISTORY = 2  # past outputs that a step may use


@dataclasses.dataclass(frozen=True)
class SamplerStep:
    """Coefficients of one sampling step (see the module's equations); `t` is the diffusion time given to the network."""

    t: float
    m_x: float
    m_eps: float
    next_x: float
    next_m: float
    next_m_prev: float = 0.0
    next_m_prev2: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # an int would come back from JSON as a float, and change the plan's digest
            object.__setattr__(self, field.name, float(getattr(self, field.name)))

    @property
    def history(self) -> int:
        """How far back the step looks: 0, 1 or 2 steps."""
        return 2 if self.next_m_prev2 else int(self.next_m_prev != 0.0)


_OPTIONAL = "next_m_prev2"  # left out of the JSON where no step uses it: what is named by a digest of a table keeps its name
_COLUMNS = tuple(field.name for field in dataclasses.fields(SamplerStep))


@dataclasses.dataclass(frozen=True)
class SamplerTable:
    """All steps of a sampler, noisiest first.

    Args:
        name: solver, for example `ddim`.
        spacing: how the times were chosen, for example `uniform`.
        steps: one `SamplerStep` per network call.

    Raises:
        PlanError: if the table is empty, holds a non-finite number, or one of its first two steps asks for an
            output that does not exist.
    """

    name: str
    spacing: str
    steps: tuple[SamplerStep, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise PlanError("the sampler table has no steps.")
        for i, step in enumerate(self.steps):
            if not all(math.isfinite(value) for value in dataclasses.astuple(step)):
                raise PlanError(f"sampler step {i} holds a coefficient that is not finite: {step}.")
        for i, step in enumerate(self.steps[:MAX_HISTORY]):
            if step.history > i:
                raise PlanError(f"sampler step {i} looks {step.history} steps back for a network output, and there is none.")

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def in_words(self) -> str:
        """The sampler, for a person."""
        return f"a fitted sampler ({self.name})" if self.name.endswith(FITTED) else self.name

    @property
    def history(self) -> int:
        """How many past m the solver needs: 0, 1 or 2."""
        return max(step.history for step in self.steps)

    @property
    def uses_previous(self) -> bool:
        """Whether any step reads a past m (a multistep solver)."""
        return self.history > 0

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return any(step.noise != 0.0 for step in self.steps)

    def scaled(self, factors: Sequence[float]) -> SamplerTable:
        """The table for a network whose output is multiplied by one factor a step."""
        pairs = zip(self.steps, factors, strict=True)
        return dataclasses.replace(self, steps=tuple(dataclasses.replace(s, m_eps=s.m_eps * factor) for s, factor in pairs))

    def to_json(self) -> dict[str, Any]:
        """Columns as lists, which is what a person can read in `plan.json`; `next_m_prev2` only where it is used."""
        names = [name for name in _COLUMNS if name != _OPTIONAL or self.history == MAX_HISTORY]
        return {"name": self.name, "spacing": self.spacing, **{n: [getattr(s, n) for s in self.steps] for n in names}}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> SamplerTable:
        """Inverse of `to_json`.

        Raises:
            PlanError: if a column is missing, unknown, or of another length than the others.
        """
        if not isinstance(raw, dict) or set(raw) | {_OPTIONAL} != {"name", "spacing", *_COLUMNS}:
            keys = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
            raise PlanError(f"the sampler table must have the keys name, spacing, {', '.join(_COLUMNS)}; found {keys}.")
        names = [name for name in _COLUMNS if name in raw]
        columns = [raw[name] for name in names]
        if not (is_name(raw["name"]) and is_name(raw["spacing"])):
            raise PlanError(f"the sampler's name and spacing must be names, found {shown(raw['name'])} and {shown(raw['spacing'])}.")
        numeric = all(isinstance(c, list) and all(map(is_number, c)) for c in columns)
        if not numeric or len({len(c) for c in columns}) != 1:
            raise PlanError("the sampler table's columns must be lists of numbers of one length.")
        rows = (map(float, row) for row in zip(*columns, strict=True))
        return cls(raw["name"], raw["spacing"], tuple(SamplerStep(**dict(zip(names, row, strict=True))) for row in rows))
