"""The networks beside the teacher that plans may name: whoever runs or exports plans is given them as one value."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from tc_lightning.errors import PlanError
from tc_lightning.models.content_predictor import Selector
from tc_lightning.models.corrector import Corrector
from tc_lightning.plan.cache_plan import CachePlan

One = TypeVar("One", Selector, Corrector)


@dataclasses.dataclass(frozen=True, eq=False)
class Companions:
    """What there is of them.

    Args:
        selector: the content predictor, which chooses tokens; None if there is none.
        corrector: the corrector, which adds to forecasts; None if there is none.
    """

    selector: Selector | None = None
    corrector: Corrector | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """Their networks."""
        selector, corrector = self.selector, self.corrector
        return [*([selector.predictor] if selector else []), *([corrector.module] if corrector else [])]

    def to(self, device: torch.device | str) -> Companions:
        """The same on a device."""
        selector, corrector = self.selector, self.corrector
        return Companions(selector and selector.to(device), corrector and corrector.to(device))

    def joined(self, other: Companions) -> Companions:
        """These, and where there is none the other's."""
        return Companions(self.selector or other.selector, self.corrector or other.corrector)

    def named_by(self, plan: CachePlan) -> Companions:
        """Those that a plan names.

        Raises:
            PlanError: if one is missing, or is another one.
        """
        return Companions(
            _named(plan, plan.selector, self.selector, "chooses tokens with the content predictor", "content.safetensors"),
            _named(plan, plan.corrector, self.corrector, "corrects forecasts with the corrector", "corrector.safetensors"),
        )


NO_COMPANIONS = Companions()


def read_companions(selector: Path | None, corrector: Path | None, config: Any) -> Companions:
    """Those of a run, from its files; None for one that it has not.

    Raises:
        RunError: if a file is missing or damaged, or is for another teacher.
    """
    return Companions(
        None if selector is None else Selector.load(selector, config),
        None if corrector is None else Corrector.load(corrector, config),
    )


def companions_for(plan: CachePlan, selector: Path | None, corrector: Path | None, config: Any) -> Companions:
    """Those that a plan names, from the files of its run; no other file is read.

    Raises:
        PlanError: if the run has none, or has another one.
        RunError: if a file is missing or damaged, or is for another teacher.
    """
    return read_companions(selector if plan.selector else None, corrector if plan.corrector else None, config).named_by(plan)


def _named(plan: CachePlan, digest: str, one: One | None, does: str, file: str) -> One | None:
    if digest and (one is None or one.digest != digest):
        found = "none was given" if one is None else f"{one.digest[:8]} was given"
        said = f"the plan {plan.digest[:8]} {does} {digest[:8]}, but {found}"
        raise PlanError(f"{said}: load the `{file}` of the run that made the plan.")
    return one if digest else None
