"""What a policy is given, and what it returns."""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tc_lightning.errors import PlanError
from tc_lightning.measure.calibration import Calibration
from tc_lightning.measure.residuals import Residuals
from tc_lightning.measure.scores import sampler_digest
from tc_lightning.models.companions import NO_COMPANIONS, Companions
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.choice import PlanChoice
from tc_lightning.policies.subject import Subject
from tc_lightning.rollout.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from tc_lightning.models.network import Network


@dataclasses.dataclass(frozen=True)
class PlanningContext(Subject):
    """All that a policy may look at: what is planned for, and what can be found out about it here.

    Args:
        evaluate: mean squared error of a plan's final latents against full compute, over the first n held-out images
            (None: all).
        calibrate: measures the teacher's full-compute trajectories, once and only if a policy asks; None where nothing can.
        model: the teacher, for policies that run more than `evaluate` does; None where there is none.
        ranks: the processes that plan together.
        companions: the networks that plans may name, on the device of the model.
        folder: where a policy may keep what it would need to go on after an interruption; None for nowhere.
    """

    evaluate: Callable[[CachePlan, int | None], float]
    calibrate: Callable[[], Calibration] | None = None
    model: Network | None = None
    ranks: Ranks = ALONE
    companions: Companions = NO_COMPANIONS
    folder: Path | None = None

    @functools.cached_property
    def calibration(self) -> Calibration:
        """What `calibrate` measures.

        Raises:
            PlanError: if nothing can be measured here, or what is measured belongs to another sampler.
        """
        if self.calibrate is None:
            raise PlanError("this policy needs calibration data, and none can be measured here: plan with `lightning fit`.")
        calibration = self.calibrate()
        if calibration.sampler != sampler_digest(self.sampler):
            raise PlanError("the calibration data were measured for another sampler than the one that is planned: measure them again.")
        return calibration

    @property
    def residuals(self) -> Residuals:
        """What the calibration tells of the summed residual of all blocks.

        Raises:
            PlanError: as `calibration`, or if residuals were not measured.
        """
        if self.calibration.residuals is None:
            raise PlanError("the calibration data are of before residuals were measured: delete them, and they are measured again.")
        return self.calibration.residuals


class Policy(ABC):
    """A caching method: anything that turns a `PlanningContext` into a plan."""

    on_all_ranks = False  # whether `plan` is to be called on every process of a distributed run, each with its share of the images

    needs: tuple[str, ...] = ()  # optional arrays of the scores that it cannot do without

    def check(self, signature: ModelSignature, sampler: SamplerTable) -> None:  # noqa: B027 (a hook that may be left empty)
        """Say before training what could only fail after it.

        Raises:
            PlanError: if no scores would let the policy satisfy what was asked for.
        """

    def most(self, context: PlanningContext) -> float:
        """The greatest speed-up in MACs that the method reaches; infinite where there is no limit, or none is known."""
        return math.inf

    def unavailable(self, context: PlanningContext) -> str | None:
        """Why the policy cannot plan here, in a sentence; None if it can."""
        try:
            self.check(context.signature, context.sampler)
        except PlanError as error:
            return str(error)
        return None

    @abstractmethod
    def plan(self, context: PlanningContext) -> PlanChoice:
        """Choose a plan.

        Raises:
            PlanError: if no plan satisfies what was asked for.
        """
