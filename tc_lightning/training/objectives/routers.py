"""What the training of routers has in common: the cost of computing, and how much the error of each step counts.

Loss of sampling step i, with r its weights (1: compute): lambda_i MSE(eps) + beta mean(r). The lambda are scaled so that reusing
everything costs 1 in the mean over all steps, so that beta means the same for every teacher: a branch whose reuse does the mean
damage of a branch, and adds up with that of others, ends at w = 1 - beta / 2. The papers' own beta (1e-6 in Learning-to-Cache, 7e-8
in HarmoniCa, for DiT-XL/2) weighs the sum of r against an unscaled MSE.

Shape suffixes: B images, C H W latent, T sampling steps, L blocks, 2 branches (0 attn, 1 mlp).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tc_lightning.diffusion.update import Coefficients, advance
from tc_lightning.errors import RunError
from tc_lightning.predictor import RouterPredictor
from tc_lightning.sampling import full_plan, noise_for
from tc_lightning.step_effect import step_effect
from tc_lightning.superposition import full_eps, mixed_branches_eps
from tc_lightning.training.objectives.base import Batch, Objective, Task

WEIGHTINGS = ("none", "relative", "effect", "image_error")
THRESHOLD = 0.1  # at inference a branch with w above it is computed (both papers)
MEASURE_SEED = 0x6C616D626461  # apart from any seed that a person would choose for images


class RouterObjective(Objective):
    """A router for each (step, block, branch).

    Args:
        beta: weight of the mean of w against the damage of reusing everything.
        weighting: how much the squared error of eps at a step counts. none: 1 (Learning-to-Cache); relative: 1 over what reusing
            everything at that step does, so that every step counts the same; effect: what an error of eps at that step does to the
            final image; image_error: the error of the final image when that step alone reuses everything (IEPO of HarmoniCa).
        hidden_size: width of the predictor.
        samples: images over which damage and effects are averaged.

    Raises:
        RunError: if an argument is out of range.
    """

    learns = "router_TL2"

    def __init__(self, beta: float = 1.0, weighting: str = "none", hidden_size: int = 64, samples: int = 2) -> None:
        super().__init__()
        if not (beta > 0.0 and math.isfinite(beta)):
            raise RunError(f"router: beta is {beta:g}; it must be above 0, or everything would be computed.")
        if weighting not in WEIGHTINGS:
            raise RunError(f"router: unknown weighting {weighting!r}, choose one of {', '.join(WEIGHTINGS)}.")
        if min(samples, hidden_size) < 1:
            raise RunError("router: samples and hidden_size must be at least 1.")
        self.beta, self.weighting, self.hidden_size, self.samples = beta, weighting, hidden_size, samples

    def prepare(self, task: Task) -> None:
        """See `Objective`."""
        self.task = task
        self.predictor = RouterPredictor(task.times, task.signature.depth, self.hidden_size)
        self.weight_T: Tensor
        self.register_buffer("weight_T", torch.ones(len(task.sampler)), persistent=False)

    def start(self, device: torch.device) -> None:
        """Measure the weights of the steps: the same in every process."""
        x_BCHW = noise_for(MEASURE_SEED, range(self.samples), self.task.teacher, device)
        labels_B = torch.arange(self.samples, device=device) % self.task.signature.num_classes
        self.weight_T = step_weights(self.weighting, self.task, x_BCHW, labels_B).to(device, torch.float32)

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Error and computed share of branches when those with w above `THRESHOLD` are computed and the others reused."""
        b, (teacher, _, _, guidance) = batch.content, self.task
        hard_BL2 = (self.predictor(batch.step) > THRESHOLD).float()
        args = b["x"], batch.times(batch.step), b["label"], hard_BL2
        eps, _ = mixed_branches_eps(teacher, guidance, batch.caches.branches, *args)
        return {"router_mse": batch.error_B(eps).mean(), "router_computed": hard_BL2.mean()}

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The weights of all steps, those of step 0 set to 1."""
        w_TL2 = self.predictor()
        w_TL2[0] = 1.0
        return w_TL2


def step_weights(weighting: str, task: Task, x_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Weight of the squared error of each step, [T] float64 on the CPU, such that weight x damage has the mean 1; 0 at step 0.

    Args:
        weighting: one of `WEIGHTINGS`.
        task: what is distilled.
        x_BCHW: noise of the images to measure on.
        labels_B: their classes.

    Raises:
        RunError: if reusing everything does no damage at all.
    """
    damage_T = reuse_damage(task, x_BCHW, labels_B)
    if not bool((damage_T[1:] > 0).all() and damage_T.isfinite().all()):
        raise RunError(f"reusing everything changes eps by {damage_T.tolist()}: the teacher's blocks do nothing, or it is damaged.")
    weight_T = torch.ones_like(damage_T)
    if weighting in ("effect", "image_error"):
        weight_T = step_effect(task.teacher, full_plan(task.signature, task.sampler, task.guidance), x_BCHW, labels_B)
    if weighting == "image_error":
        weight_T = weight_T * damage_T
    if weighting == "relative":
        weight_T[1:] = 1 / damage_T[1:]
    weight_T[0] = 0.0
    return weight_T / (weight_T * damage_T)[1:].mean()


@torch.no_grad()
def reuse_damage(task: Task, x_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Mean squared change of the guided eps when a step reuses all branches of the step before, [T] float64 on the CPU; 0 at step 0.

    The trajectories are those of full compute.
    """
    teacher, _, sampler, guidance = task
    none_BL2 = torch.zeros(len(x_BCHW), task.signature.depth, 2, device=x_BCHW.device)
    damage, branches, m = [], None, None
    for row in sampler.steps:
        t_B = torch.full((len(x_BCHW),), row.t, device=x_BCHW.device)
        eps, caches = full_eps(teacher, guidance, x_BCHW, t_B, labels_B)
        reused = eps if branches is None else mixed_branches_eps(teacher, guidance, branches, x_BCHW, t_B, labels_B, none_BL2)[0]
        damage.append(float((reused - eps).double().square().mean()))
        x_BCHW, m = advance(x_BCHW, eps, m, Coefficients(row.m_x, row.m_eps, row.next_x, row.next_m, row.next_m_prev or None))
        branches = caches.branches
    return torch.tensor(damage, dtype=torch.float64)
