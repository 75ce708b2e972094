"""How much reusing one branch of one block hurts, for all blocks at once, at the price of a few backward passes.

To first order, reusing branch b of block l changes the guided output by J_lb delta_lb, with delta = gate (cached - computed),
both before the gate, and J the Jacobian of the output with respect to what is added to the residual stream there (the rest of
the network is computed, as in an intervention). For a probe v of independent standard normals, (v . J delta)^2 has the
expectation |J delta|^2, and one backward pass of v gives v J for every branch and every token. Its relative standard deviation
is sqrt(2 / number of probes), whatever the network; several samples and probes are averaged.

Shape suffixes: P probes, B images (guidance doubles them inside), C H W latent, L blocks, 2 branches (0 attn, 1 mlp), N tokens,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tc_lightning.cache.soft import BranchCache
from tc_lightning.cache.soft_network import enter, guided_eps
from tc_lightning.models.conditions import Asked
from tc_lightning.models.network import Network, Take, compose, run_through
from tc_lightning.plan.guidance import Guidance
from tc_lightning.rollout.noise import initial_noise

PROBE_SEED = 0x70726F6265  # apart from any seed that a person would choose for images


def probes_for(model: Network, sample: int, steps: Sequence[int], count: int) -> Tensor:
    """Probes [P, B, C, H, W] of B steps of one sample: each a function of (sample, step) alone, not of batch or process."""
    c = model.config
    shape = (count, c.in_channels, c.input_size, c.input_size)
    return torch.stack([torch.from_numpy(initial_noise(PROBE_SEED, [sample], shape, stream=i)[0]) for i in steps], 1)


def branch_sensitivity(
    model: Network,
    guidance: Guidance,
    cached: Sequence[BranchCache],
    x_BCHW: Tensor,
    t_B: Tensor,
    asked: Asked,
    probes_PBCHW: Tensor,
) -> Tensor:
    """Estimated mean squared change of the guided eps when a branch comes from the cache, [B, L, 2].

    Args:
        model: the teacher.
        guidance: guidance scale and channels.
        cached: branches of each block before the gate: those of another step, or forecasts (`cache.soft_forecast`).
        x_BCHW: latents.
        t_B: their times, in the network's units.
        asked: conditions of each image; of a class-conditional model its labels [B] will do.
        probes_PBCHW: standard normal probes, P for each image; the estimate is the mean over them.
    """
    shifts = _probe_shifts(model, guidance, cached, x_BCHW, t_B, asked, probes_PBCHW)
    return shifts.sum(-1).square().mean(0) / x_BCHW[0].numel()


def token_sensitivity(
    model: Network,
    guidance: Guidance,
    cached: Sequence[BranchCache],
    x_BCHW: Tensor,
    t_B: Tensor,
    asked: Asked,
    probes_PBCHW: Tensor,
) -> Tensor:
    """As `branch_sensitivity`, when a single token of the image comes from the cache in a branch, [B, L, 2, N]."""
    shifts = _probe_shifts(model, guidance, cached, x_BCHW, t_B, asked, probes_PBCHW)
    return shifts[..., model.fixed_tokens :].square().mean(0) / x_BCHW[0].numel()


def _probe_shifts(
    model: Network,
    guidance: Guidance,
    cached: Sequence[BranchCache],
    x: Tensor,
    t: Tensor,
    asked: Asked,
    probes_PBCHW: Tensor,
) -> Tensor:
    """v . J delta by token, [P, B, L, 2, N]; both halves of guidance reuse together, so their shifts add."""
    eps, sums, deltas = _trace(model, guidance, x, t, asked, cached)
    shifts = []
    for probe in probes_PBCHW:
        grads = torch.autograd.grad(eps, sums, probe, retain_graph=True)
        shifts.append(
            torch.stack([(g * d).sum(-1) for g, d in zip(grads, deltas, strict=True)], 1).unflatten(1, (len(model.blocks), -1))
        )
    shifts_PBL2N = torch.stack(shifts)
    if guidance.doubles_batch:
        shifts_PBL2N = shifts_PBL2N[:, : len(x)] + shifts_PBL2N[:, len(x) :]
    return shifts_PBL2N


@torch.enable_grad()
def _trace(
    model: Network, guidance: Guidance, x: Tensor, t: Tensor, asked: Asked, cached: Sequence[BranchCache]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Guided eps, the residual stream after each branch (where v J is read off), and delta of each branch."""
    z_BND, mods, final = enter(model, guidance, x, t, asked)
    z_BND = z_BND.detach().requires_grad_()
    sums: list[Tensor] = []
    deltas: list[Tensor] = []

    def run(b: int, z_BND: Tensor, skip_BND: Tensor | None) -> Tensor:
        block: Any = model.blocks[b]
        before: list[Tensor] = []
        out_BND = compose(block, z_BND, mods[b], _watched(block, mods[b], cached[b], before, deltas), skip_BnD=skip_BND)
        sums.extend([*before[1:], out_BND])
        return out_BND

    z_BND = run_through(list(model.blocks), z_BND, run)
    return guided_eps(model, guidance, z_BND, final), sums, deltas


def _watched(block: Any, mod: Any, cached: BranchCache, before: list[Tensor], deltas: list[Tensor]) -> Take:
    """Computes branches; notes the residual stream before each, and by how much reusing it would change what it adds."""

    def take(name: str, z_BND: Tensor) -> Tensor:
        before.append(z_BND)
        update_BND, _ = block.branch(name, z_BND, mod)
        deltas.append(block.gated(name, cached[name] - update_BND, mod).detach())
        return update_BND

    return take
