"""How much an error of the network's output at each sampling step moves the final image.

An error e of the guided eps at step i moves the final latents by J_i e, to first order, where J_i is the Jacobian of everything
that follows: the sampler's update and the network at all later steps. For e of independent normal entries the mean squared error of
the image over that of eps is |J_i|^2 / (C H W), the *effect* of step i. For a random probe v, |J_i^T v|^2 has the expectation
|J_i|^2, and one pass from the last step to the first gives J_i^T v for every step: it costs T backward passes, where perturbing each
step and running the rest would cost T (T + 1) / 2 forward ones. The same quantity, measured per trajectory, weighs the rollout loss
of HarmoniCa (IEPO, arXiv 2410.01723), which has lambda_t = effect_t x the error that caching makes at t.

Shape suffixes: B images, C H W latent, T sampling steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tc_lightning.cache.soft_network import enter, guided_eps
from tc_lightning.models.conditions import Asked
from tc_lightning.models.network import Network, compute_through
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import MAX_HISTORY, SamplerStep
from tc_lightning.rollout.noise import initial_noise
from tc_lightning.rollout.sampling import full_plan, sample_steps

PROBE_SEED = 0x656666656374  # apart from any seed that a person would choose for images


def step_effect(model: Network, plan: CachePlan, x_T: Tensor, asked: Asked, first_index: int = 0) -> Tensor:
    """Mean squared error of the final latents over that of the guided eps of each step, [T] float64 on the CPU.

    Args:
        model: the teacher.
        plan: tells sampler and guidance; the trajectories are those of full compute, whatever it caches.
        x_T: initial noise [B, C, H, W].
        asked: conditions of each image; of a class-conditional model its labels [B] will do.
        first_index: global index of the first image, which keys its probe: the mean over images does not depend on batches.

    Returns:
        The mean over the images, one probe each.

    Raises:
        TokenCacheError: if a condition cannot be what it is, or the latents become NaN.
    """
    full = full_plan(plan.model, plan.sampler, plan.guidance)
    x_before = [state.x for state in sample_steps(model, full, x_T, asked)]
    shape = tuple(x_T.shape[1:])
    probe = initial_noise(PROBE_SEED, range(first_index, first_index + len(x_T)), shape)
    effects, adjoint = [], _Adjoint(torch.from_numpy(probe).to(x_T))
    for x_BCHW, row in zip(reversed(x_before), reversed(plan.sampler.steps), strict=True):
        g_eps = adjoint.through_update(row)
        effects.append(float(g_eps.double().square().sum() / probe.size))
        adjoint.x = adjoint.x + _eps_adjoint(model, plan.guidance, x_BCHW, row.t, asked, g_eps)
    return torch.tensor(effects[::-1], dtype=torch.float64)


class _Adjoint:
    """Gradient of v . x_0 by the latents, and by the past outputs m that later steps of a multistep solver read."""

    def __init__(self, probe_BCHW: Tensor) -> None:
        self.x, self.m = probe_BCHW, [torch.zeros_like(probe_BCHW) for _ in range(MAX_HISTORY)]  # of the latest m first

    def through_update(self, row: SamplerStep) -> Tensor:
        """Step back through one sampler update (equations of `tc_lightning.plan.sampler_table`); returns the gradient by eps."""
        g_m = self.m[0] + row.next_m * self.x
        self.m = [self.m[1] + row.next_m_prev * self.x, row.next_m_prev2 * self.x]
        self.x = row.next_x * self.x + row.m_x * g_m
        return row.m_eps * g_m


@torch.enable_grad()
def _eps_adjoint(model: Network, guidance: Guidance, x_BCHW: Tensor, t: float, asked: Asked, g_eps: Tensor) -> Tensor:
    """Gradient by the latents of g_eps . eps, where eps is the guided output at full compute."""
    x_BCHW = x_BCHW.detach().requires_grad_()
    z_BND, mods, final = enter(model, guidance, x_BCHW, torch.full((len(x_BCHW),), t, device=x_BCHW.device), asked)
    z_BND = compute_through(list(model.blocks), mods, z_BND)
    (grad,) = torch.autograd.grad(guided_eps(model, guidance, z_BND, final), x_BCHW, g_eps)
    return grad
