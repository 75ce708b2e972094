"""A run in memory, and a `PlanningContext` of it: policies can be asked for plans long after training."""

from __future__ import annotations

import dataclasses
import functools

import torch

from tc_lightning.errors import RunError
from tc_lightning.measure.calibrate import run_calibration
from tc_lightning.measure.calibration import Calibration
from tc_lightning.measure.scores import Scores
from tc_lightning.models.checkpoints import load_teacher
from tc_lightning.models.companions import Companions, read_companions
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.policies.base import PlanningContext
from tc_lightning.rollout.evaluation import RolloutEvaluator
from tc_lightning.rollout.sampling import model_signature, reference_plan
from tc_lightning.rollout.targets import Targets
from tc_lightning.runs.folder import Run


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedRun:
    """All that a run holds, in memory: whoever exports, lowers, samples or evaluates plans of a run finds here what they need.

    Args:
        run: where it is.
        model: its teacher.
        plan: its plan.
        scores: what was learned and measured.
        companions: its content predictor and its corrector, where it has them, on the teacher's device.
    """

    run: Run
    model: Network
    plan: CachePlan
    scores: Scores
    companions: Companions

    @functools.cached_property
    def reference(self) -> CachePlan:
        """The full-compute run that the plan replaces."""
        return reference_plan(self.plan)

    @functools.cached_property
    def calibration(self) -> Calibration:
        """What the reference run's trajectories tell: kept in the run's folder, measured when it is first asked for."""
        return run_calibration(self.model, self.reference, self.run.folder)


def load_run(run: Run, device: torch.device | str = "cpu") -> LoadedRun:
    """Load everything that a run holds, and check that it belongs together.

    Args:
        run: what `tc_lightning.runs.folder.read_run` read.
        device: where teacher and companions are to be.

    Raises:
        TeacherError: if the teacher cannot be loaded.
        PlanError: if the plan is damaged, or was made for another teacher, content predictor or corrector.
        RunError: if the scores or a companion are missing or damaged, or are of another teacher.
    """
    model, plan, scores = load_teacher(run.teacher), CachePlan.load(run.plan), Scores.load(run.scores)
    plan.require_model(model_signature(model))
    if scores.teacher != plan.model.teacher:
        raise RunError(f"{run.scores} belongs to another teacher than {run.plan}: run `lightning fit` again.")
    companions = read_companions(*run.companions, model.config)
    companions.named_by(plan)
    selector = companions.selector
    if scores.selector and (selector is None or selector.digest != scores.selector):
        raise RunError(f"{run.scores} was measured with another content predictor than the run holds: run `lightning fit` again.")
    return LoadedRun(run, model.to(device), plan, scores, companions.to(device))


def planning_context(loaded: LoadedRun, targets: Targets) -> PlanningContext:
    """What the run hands to policies; candidates are judged on the given images, against the reference run.

    Args:
        loaded: the run.
        targets: images that neither training nor a later comparison of the plans uses.
    """
    plan = loaded.reference
    evaluate = RolloutEvaluator(loaded.model, targets.x_T, targets.given, targets.reference, loaded.companions)
    return PlanningContext(
        plan.model,
        loaded.model.schedule,
        plan.sampler,
        plan.guidance,
        loaded.scores,
        plan.sampler,
        evaluate,
        calibrate=lambda: loaded.calibration,
        model=loaded.model,
        companions=loaded.companions,
    )
