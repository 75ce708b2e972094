"""A `PlanningContext` from a run folder: policies can be asked for plans long after training."""

from __future__ import annotations

import dataclasses
import functools

from tc_lightning.calibrate import calibrate
from tc_lightning.calibration import Calibration
from tc_lightning.errors import RunError
from tc_lightning.evaluation import RolloutEvaluator
from tc_lightning.models.checkpoints import load_teacher
from tc_lightning.models.dit import DiT
from tc_lightning.plan import CachePlan
from tc_lightning.policies.base import PlanningContext
from tc_lightning.runs import Run
from tc_lightning.sampling import model_signature, reference_plan
from tc_lightning.scores import Scores, sampler_digest
from tc_lightning.targets import Targets

CALIBRATION_TRAJECTORIES = 4


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run with its teacher, plan and scores in memory."""

    run: Run
    model: DiT
    plan: CachePlan
    scores: Scores


def load_run(run: Run) -> LoadedRun:
    """Load teacher, plan and scores, and check that they belong together.

    Raises:
        TeacherError: if the teacher cannot be loaded.
        PlanError: if the plan is damaged, or was made for another teacher.
        RunError: if the scores are missing or damaged, or are of another teacher.
    """
    model, plan, scores = load_teacher(run.teacher), CachePlan.load(run.plan), Scores.load(run.scores)
    plan.require_model(model_signature(model))
    if scores.teacher != plan.model.teacher:
        raise RunError(f"{run.scores} belongs to another teacher than {run.plan}: run `lightning fit` again.")
    return LoadedRun(run, model, plan, scores)


def planning_context(loaded: LoadedRun, targets: Targets) -> PlanningContext:
    """What the run hands to policies; candidates are judged on the given images, against the reference run.

    Args:
        loaded: the run.
        targets: images that neither training nor a later comparison of the plans uses.
    """
    plan = reference_plan(loaded.plan)
    evaluate = RolloutEvaluator(loaded.model, targets.x_T, targets.labels, targets.reference)
    measure = functools.partial(_calibration, loaded, targets)
    return PlanningContext(
        plan.model, plan.sampler, plan.guidance, loaded.scores, evaluate, plan.reference, calibrate=measure, model=loaded.model
    )


def _calibration(loaded: LoadedRun, targets: Targets) -> Calibration:
    """What the run measured, or else a new measurement, kept in the run's folder."""
    plan, path = reference_plan(loaded.plan), loaded.run.folder / "calibration.safetensors"
    if path.is_file():
        known = Calibration.load(path)
        if (known.teacher, known.sampler) == (plan.model.teacher, sampler_digest(plan.sampler)):
            return known
    count = slice(CALIBRATION_TRAJECTORIES)
    measured = calibrate(loaded.model, plan, targets.x_T[count], targets.labels[count])
    measured.save(path)
    return measured
