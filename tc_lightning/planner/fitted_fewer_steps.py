"""Fewer steps, fitted and refined: full compute with as many steps as a budget pays for, the row that every cache has to beat."""

from __future__ import annotations

import contextlib
import dataclasses

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.models.conditions import labels_in
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.planner.fit import fit_sampler
from tc_lightning.planner.image_choice import images
from tc_lightning.planner.refine import refine_sampler
from tc_lightning.planner.robust import robust_mean
from tc_lightning.planner.shapes import fewer_steps
from tc_lightning.planner.target import run_target
from tc_lightning.rollout.evaluation import BATCH
from tc_lightning.rollout.sampling import full_plan

NAME = "fewer steps, fitted and refined"
FIT, JUDGE = 10, 14  # images that spacings are fitted and compared on; the best is refined on both
REFINEMENTS = 1  # a second step found nothing better in most runs, and costs a third of the first


def fitted_fewer_steps(model: Network, plan: CachePlan, num_steps: int, progress: str | None = None) -> CachePlan:
    """Full compute with fewer steps at the spacing of least error, fitted and refined to the images of a plan's reference run.

    What the planner does with `cache: none`, for one number of steps, and on images as they come.

    Args:
        model: the teacher.
        plan: says what run is replaced, and how it is guided.
        num_steps: sampling steps, at least 2.
        progress: what a progress bar is to say; None for none.

    Raises:
        PlanError: if there are fewer than 2 steps, or the reference run adds noise.
        TokenCacheError: if the latents of the reference run become NaN, or those of every spacing.
    """
    if num_steps < 2:
        raise PlanError(f"{num_steps} steps cannot be fitted: at least 2 are needed.")
    if plan.reference.stochastic:
        raise PlanError(f"{plan.reference.name} adds noise, so nothing can be fitted to its images.")
    noise = images(model, list(range(FIT + JUDGE)))
    target = run_target(model, plan.reference, plan.guidance, *noise, BATCH, progress)
    fits: list[tuple[float, int, CachePlan]] = []
    for shape in fewer_steps():
        full = full_plan(plan.model, make_sampler(model.schedule, shape.solver, num_steps, shape.spacing), plan.guidance)
        with contextlib.suppress(TokenCacheError):  # with a few steps one spacing may lead to NaN where others do not
            fit = fit_sampler(model, dataclasses.replace(full, reference=plan.reference), target, FIT)
            fits.append((float(robust_mean(fit.mse_B[FIT:], target.counts_B[FIT:])), len(fits), fit.plan))
    if not fits:
        raise TokenCacheError(f"{num_steps} steps make the latents NaN or infinite at every spacing: allow more steps.")
    best = fit_sampler(model, min(fits)[2], target, FIT + JUDGE).plan
    refined = refine_sampler(model, best, target, REFINEMENTS)
    on = {"target": "reference", "guidance": plan.guidance.scale, "images": FIT + JUDGE} | labels_in(plan.model.conditions, noise[1])
    provenance = {"policy": "fewer_steps_fitted", "arguments": {"steps": num_steps}, "fit": on}
    return dataclasses.replace(refined, provenance=provenance)
