"""What the soft forms take from the cache of a plan that cases: values of full steps, weighted as `semantics.forecast` has it.

Shape suffixes: B images (guidance doubles them inside, to M rows), S full steps of all images together, J full steps of one image,
C H W latent, N tokens, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tc_lightning.cache.semantics import forecast
from tc_lightning.cache.soft import BlockCache, full_block
from tc_lightning.cache.soft_network import StepCaches, enter
from tc_lightning.models.conditions import Asked
from tc_lightning.models.network import KeyValue, Network, run_through
from tc_lightning.plan.guidance import Guidance


@torch.no_grad()
def forecast_caches(
    model: Network,
    guidance: Guidance,
    x_SCHW: Tensor,
    t_S: Tensor,
    asked_S: Asked,
    weights: Sequence[Sequence[float]],
    kv_weights: Sequence[Sequence[float]],
) -> StepCaches:
    """Compute full steps, and forecast from those of each image what `mixed_eps` and `mixed_branches_eps` reuse.

    Args:
        model: the teacher.
        guidance: guidance scale and channels.
        x_SCHW: latents of the full steps: those of the first image, latest first, then those of the second, and so on.
        t_S: their times, in the network's units.
        asked_S: their conditions.
        weights: for each of the B images what its full steps weigh in residuals and branches.
        kv_weights: the same for keys and values.
    """
    own, kv = (_Rows(each, guidance.doubles_batch, x_SCHW.device) for each in (weights, kv_weights))
    z_MND, mods, _ = enter(model, guidance, x_SCHW, t_S, asked_S)
    caches = StepCaches([], [])

    def run(b: int, z_MND: Tensor, skip_MND: Tensor | None) -> Tensor:
        out_MND, whole, branches = full_block(model.blocks[b], z_MND, mods[b], skip_MND)  # type: ignore[arg-type]
        caches.blocks.append(BlockCache(own(whole.residual), None if whole.kv is None else KeyValue(*map(kv, whole.kv))))
        caches.branches.append({name: own(update) for name, update in branches.items()})
        return out_MND

    run_through(list(model.blocks), z_MND, run)
    return caches


class _Rows:
    """CacheCases a value of B images from its rows at their S full steps; images with fewer of these than others have weights of 0."""

    def __init__(self, weights: Sequence[Sequence[float]], both: bool, device: torch.device) -> None:
        counts = [len(own) for own in weights]
        starts, most = [0, *itertools.accumulate(counts)], max(counts)
        rows_JB = [[start + min(j, n - 1) for start, n in zip(starts, counts, strict=False)] for j in range(most)]
        weights_JB = [[own[j] if j < len(own) else 0.0 for own in weights] for j in range(most)]
        rows, factors = torch.tensor(rows_JB, device=device), torch.tensor(weights_JB, dtype=torch.float64, device=device)
        self.rows_JM = torch.cat([rows, rows + starts[-1]], 1) if both else rows
        self.weights_JM = torch.cat([factors, factors], 1) if both else factors
        self.repeats = most == 1

    def __call__(self, value_SND: Tensor) -> Tensor:
        precision = torch.promote_types(value_SND.dtype, torch.float32)
        weights_JM11 = () if self.repeats else self.weights_JM.to(precision)[..., None, None].unbind()
        return forecast([value_SND[rows_M] for rows_M in self.rows_JM], weights_JM11).to(value_SND.dtype)
