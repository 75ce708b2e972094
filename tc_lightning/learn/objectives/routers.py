"""What the training of routers has in common: the cost of computing, and how much the error of each step counts.

Loss of sampling step i, with r the weights (1: compute): lambda_i MSE(eps) + beta mean(r). The lambda are scaled so that reusing
everything costs 1 at the median step. The papers fix beta (1e-6 in Learning-to-Cache, 7e-8 in HarmoniCa, for DiT-XL/2, where it
weighs the sum of r against an unscaled MSE), and find it by trying; here beta is by default the multiplier that holds the mean of r
at a share.

The default weighting is the effect of an error on the final image: lambda_i MSE is then, to first order, the image's error. The
papers' own are `none` and `image_error`. On the digits teacher the damage of reuse grows from 1e-5 to 0.4 along the trajectory, and
its effect on the image stays within a factor of ten but for the last two steps: with the papers' weightings those two would be all
that a router sees. For the same reason no step counts more than `CAP` times the median.

Shape suffixes: B images, C H W latent, T sampling steps, L blocks, 2 branches (0 attn, 1 mlp).
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from tc_lightning.cache.soft_network import full_eps, mixed_branches_eps
from tc_lightning.diffusion.update import advance, coefficients
from tc_lightning.errors import RunError
from tc_lightning.learn.objectives.base import Batch, Budgeted, Loss, Task
from tc_lightning.measure.step_effect import step_effect
from tc_lightning.models.conditions import Asked
from tc_lightning.plan.given import TRAINING
from tc_lightning.rollout.sampling import full_plan, given_for, noise_for

WEIGHTINGS = ("effect", "none", "image_error", "relative")
CAP = 4.0  # most that reusing everything at a step may cost, in units of the median step
THRESHOLD = 0.1  # at inference a branch with w above it is computed (both papers)
MEASURE_SEED = 0x6C616D626461  # apart from any seed that a person would choose for images


class RouterObjective(Budgeted):
    """A router for each (step, block, branch).

    Args:
        target_share: mean of w over steps, blocks and branches that training holds.
        beta: a fixed weight of the mean of w instead (the papers').
        weighting: how much the squared error of eps at a step counts. effect: what an error of eps at that step does to the final
            image; none: 1 (Learning-to-Cache); image_error: the error of the final image when that step alone reuses everything
            (IEPO of HarmoniCa); relative: 1 over what reusing everything at that step does, so that every step counts the same.
        samples: images over which damage and effects are averaged.

    Raises:
        RunError: if an argument is out of range.
    """

    learns = "router_TL2"

    def __init__(
        self,
        target_share: float = 0.5,
        beta: float | None = None,
        weighting: str = "effect",
        samples: int = 2,
    ) -> None:
        super().__init__(target_share)
        if beta is not None and not (beta > 0.0 and math.isfinite(beta)):
            raise RunError(f"router: beta is {beta:g}; it must be above 0, or everything would be computed.")
        if weighting not in WEIGHTINGS:
            raise RunError(f"router: unknown weighting {weighting!r}, choose one of {', '.join(WEIGHTINGS)}.")
        if samples < 1:
            raise RunError(f"router: samples is {samples}; it must be at least 1.")
        self.beta, self.weighting, self.samples = beta, weighting, samples

    @abstractmethod
    def make_predictor(self, task: Task) -> nn.Module:
        """What gives the weights [T, L, 2]."""

    def prepare(self, task: Task) -> None:
        """See `Objective`."""
        super().prepare(task)
        self.predictor = self.make_predictor(task)
        self.weight_T: Tensor
        self.register_buffer("weight_T", torch.ones(len(task.sampler)), persistent=False)

    def start(self, device: torch.device) -> None:
        """Measure the weights of the steps: the same in every process."""
        x_BCHW = noise_for(MEASURE_SEED, range(self.samples), self.task.teacher, device)
        given = given_for(MEASURE_SEED, range(self.samples), self.task.teacher, device, TRAINING)
        self.weight_T = step_weights(self.weighting, self.task, x_BCHW, given).to(device, torch.float32)

    def priced(self, weighted_B: Tensor, w_TL2: Tensor) -> Loss:
        """Weighted errors plus the cost of computing."""
        error, mean_w = weighted_B.mean(), w_TL2[1:].mean()
        cost = self.budget(mean_w) if self.beta is None else self.beta * mean_w
        return Loss(error + cost, {"router_error": error.detach(), "router_mean_w": mean_w.detach()})

    def idle(self, w_TL2: Tensor) -> Loss:
        """No loss, but a gradient for every parameter, which training in several processes asks for."""
        self._excess = torch.zeros_like(self._excess)
        return Loss(0.0 * w_TL2.sum(), {})

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Error and computed share of branches when those with w above `THRESHOLD` are computed and the others reused."""
        hard_BL2 = (self.predictor() > THRESHOLD).float()[batch.step]
        args = batch.caches().branches, batch.content["x"], batch.times(batch.step), batch.given, hard_BL2
        eps, _ = mixed_branches_eps(self.task.teacher, self.task.guidance, *args)
        return {"router_mse": batch.error_B(eps).mean(), "router_computed": hard_BL2.mean()}

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The weights of all steps, those of step 0 set to 1."""
        w_TL2 = self.predictor()
        w_TL2[0] = 1.0
        return w_TL2


def step_weights(weighting: str, task: Task, x_BCHW: Tensor, asked: Asked) -> Tensor:
    """Weight of the squared error of each step, [T] float64 on the CPU; 0 at step 0.

    Weight x damage has the median 1, and is nowhere above `CAP`.

    Args:
        weighting: one of `WEIGHTINGS`.
        task: what is distilled.
        x_BCHW: noise of the images to measure on.
        asked: their conditions.

    Raises:
        RunError: if reusing everything does no damage at all.
    """
    damage_T = reuse_damage(task, x_BCHW, asked)
    if not bool((damage_T[1:] > 0).all() and damage_T.isfinite().all()):
        raise RunError(f"reusing everything changes eps by {damage_T.tolist()}: the teacher's blocks do nothing, or it is damaged.")
    weight_T = torch.ones_like(damage_T)
    if weighting in ("effect", "image_error"):
        weight_T = step_effect(task.teacher, full_plan(task.signature, task.sampler, task.guidance), x_BCHW, asked)
    if weighting == "image_error":
        weight_T = weight_T * damage_T
    if weighting == "relative":
        weight_T[1:] = 1 / damage_T[1:]
    weight_T[0] = 0.0
    cost_T = weight_T * damage_T / (weight_T * damage_T)[1:].median()
    return torch.where(damage_T > 0, cost_T.clamp(max=CAP) / damage_T, 0.0)


@torch.no_grad()
def reuse_damage(task: Task, x_BCHW: Tensor, asked: Asked) -> Tensor:
    """Mean squared change of the guided eps when a step reuses all branches of the step before, [T] float64 on the CPU; 0 at step 0.

    The trajectories are those of full compute.
    """
    teacher, sampler, guidance = task.teacher, task.sampler, task.guidance
    none_BL2 = torch.zeros(len(x_BCHW), task.signature.depth, len(task.signature.block.names), device=x_BCHW.device)
    damage: list[float] = []
    past: tuple[Tensor, ...] = ()
    branches = None
    for row in sampler.steps:
        t_B = torch.full((len(x_BCHW),), row.t, device=x_BCHW.device)
        eps, caches = full_eps(teacher, guidance, x_BCHW, t_B, asked)
        reused = eps if branches is None else mixed_branches_eps(teacher, guidance, branches, x_BCHW, t_B, asked, none_BL2)[0]
        damage.append(float((reused - eps).double().square().mean()))
        x_BCHW, m = advance(x_BCHW, eps, past, coefficients(row))
        branches, past = caches.branches, (m, *past)[: sampler.history]
    return torch.tensor(damage, dtype=torch.float64)
