"""Classifier-free guidance as a plan sees it: its scale, and which halves of the batch a step computes. Needs no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from tc_lightning.errors import PlanError
from tc_lightning.plan.forecasts import Forecast, forecast_from_json, forecast_to_json
from tc_lightning.plan.json_fields import is_name

GUIDANCE_MODES = ("both", "forecast", "cond")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: eps = uncond + scale (cond - uncond) on the first `channels` channels, cond on the others.

    With scale 1 the unconditional half is not computed. The DiT release guides 3 of its 4 channels, diffusers all of them.
    """

    scale: float = 1.0
    channels: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(self.scale))  # 2 and 2.0 are equal, and must be written alike: the digest is

    @property
    def doubles_batch(self) -> bool:
        """Whether the network sees a conditional and an unconditional half."""
        return self.scale != 1.0


@dataclasses.dataclass(frozen=True)
class GuidanceMode:
    """Which halves of a guided batch one step computes.

    both: the conditional and the unconditional one. forecast: the conditional one; the difference cond - uncond comes from the
    cache, so that eps = cond + (scale - 1) difference on the guided channels. cond: the conditional one, without guidance.

    Args:
        mode: both, forecast or cond.
        order: forecast order of the difference, 0 to 2.
        weights: free forecast weights in its place, latest value first.
    """

    mode: str = "both"
    order: int = 0
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))

    @property
    def forecast(self) -> Forecast:
        """How the difference of the halves is forecast."""
        return Forecast(self.order, self.weights)

    @property
    def outline(self) -> tuple[str, int]:
        """What it does, but for what the forecast weighs: modes of one outline share a program."""
        return self.mode, self.forecast.history

    @property
    def single(self) -> bool:
        """Whether only the conditional half is computed."""
        return self.mode != "both"

    def to_json(self) -> dict[str, Any]:
        """The fields that the mode uses."""
        return {"mode": self.mode} | (forecast_to_json(self.forecast) if self.mode == "forecast" else {})

    @classmethod
    def from_json(cls, raw: Any, where: str) -> GuidanceMode:
        """Inverse of `to_json`.

        Raises:
            PlanError: if a key is missing or unknown, or a value has the wrong type.
        """
        if not isinstance(raw, dict) or not {"mode"} <= set(raw) <= {"mode", "order", "weights"}:
            raise PlanError(
                f"{where}: guidance must be an object with a mode, and an order or weights if that is forecast; found {raw!r}."
            )
        if not is_name(raw["mode"]):
            raise PlanError(f"{where}: the mode of guidance must be a name; found {raw!r}.")
        return cls(raw["mode"], *forecast_from_json(raw, f"{where}, guidance"))


BOTH = GuidanceMode()
