"""Fitting a plan's sampler: coefficients that make up for what fewer calls and cached values change.

A step of the sampler is a weighted sum of x, its m and the last ones (`tc_lightning.diffusion.table`). While a plan runs, the
coefficients of each step are set by least squares, so that x_next comes as near as they can bring it to where the target run is at
that time, over all pixels of the images that are fitted on; then the step is taken with them, and the next is fitted from there.
One run of the plan fits it. Solvers with coefficients of each step's own, learned for a model, are known from Shaul et al., arXiv
2403.01329 (there by gradients through the whole run, and without a cache).

Shape suffixes: B images, C H W latent, F coefficients.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tc_lightning.diffusion.table import SamplerStep, SamplerTable
from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.models.dit import DiT
from tc_lightning.plan import CachePlan
from tc_lightning.planner.target import TargetRun
from tc_lightning.ranks import ALONE, Ranks
from tc_lightning.sampling import sample_steps

RIDGE = 1e-6  # of the features' own squares: the coefficients of an analytic solver are kept where the data says nothing
SUFFIX = "-fitted"  # of the sampler's name
_NAMES = ("next_x", "next_m", "next_m_prev", "next_m_prev2")


@dataclasses.dataclass(frozen=True)
class FittedPlan:
    """A plan whose sampler was fitted, and the squared error of each image's final latents, those of the fit first, [B]."""

    plan: CachePlan
    mse_B: Tensor


def fit_sampler(
    model: DiT, plan: CachePlan, target: TargetRun, fitted: int, history: int = 2, ridge: float = RIDGE, ranks: Ranks | None = None
) -> FittedPlan:
    """Run a plan on the target's noise, fitting its sampler on the first images; the others show what that is worth.

    Args:
        model: the teacher.
        plan: the plan; its own coefficients are where the fit starts from.
        target: the run to reproduce, of this process's images.
        fitted: how many images the fit may look at, the first ones of each process.
        history: past outputs that a step may use, 0 to 2.
        ridge: how strongly the plan's own coefficients are held on to.
        ranks: the processes that fit together, each with images of its own.

    Raises:
        PlanError: if the plan scales its eps or its sampler adds noise: there is nothing to fit then.
        TokenCacheError: if latents become NaN.
    """
    if plan.eps_scale or plan.sampler.stochastic:
        raise PlanError("a sampler that scales eps or adds noise cannot be fitted: start from ddim or dpmpp_2m.")
    solver = _Fitter(plan.sampler, target, fitted, history, ridge, ranks or ALONE)
    for state in sample_steps(model, plan, target.x_T, target.labels_B, solver=solver):
        end = state.x_next
    table = dataclasses.replace(plan.sampler, name=f"{plan.sampler.name.removesuffix(SUFFIX)}{SUFFIX}", steps=tuple(solver.rows))
    return FittedPlan(dataclasses.replace(plan, sampler=table), (end - target.x_0).square().flatten(1).mean(1))


class _Fitter:
    """A solver that finds its coefficients while it runs."""

    def __init__(self, table: SamplerTable, target: TargetRun, fitted: int, history: int, ridge: float, ranks: Ranks) -> None:
        self._table, self._target, self._fitted, self._history = table, target, fitted, history
        self._ridge, self._ranks = ridge, ranks
        self._past: list[Tensor] = []  # its own record: the plan's sampler may look back less far
        self.rows: list[SamplerStep] = []

    def __call__(self, step: int, x: Tensor, eps: Tensor, past: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        row = self._table.steps[step]
        m = x * row.m_x + eps * row.m_eps
        features = [x, m, *self._past]
        self._past = [m, *self._past][: self._history]
        base_F = torch.tensor([getattr(row, name) for name in _NAMES[: len(features)]], dtype=torch.float64)
        next_t = self._table.steps[step + 1].t if step + 1 < len(self._table) else None
        found_F = self._solve(features, self._target.at(next_t), base_F)
        self.rows.append(dataclasses.replace(row, **dict(zip(_NAMES, found_F.tolist(), strict=False))))
        x_next = torch.stack([f * c for f, c in zip(features, found_F.tolist(), strict=True)]).sum(0)
        self._require_finite(step, x_next)
        return x_next, m

    def _require_finite(self, step: int, x: Tensor) -> None:
        """All processes stop if one of them has to: the others would wait for its sums for ever."""
        if self._ranks.total((~torch.isfinite(x)).any().double()) > 0:
            raise TokenCacheError(f"latents became NaN or infinite at step {step} of a fit: check the teacher's weights.")

    def _solve(self, features: list[Tensor], wanted: Tensor, base_F: Tensor) -> Tensor:
        """Ridge regression towards `base_F`; the sums are over the images of all processes."""
        columns_PF = torch.stack([f[: self._fitted].flatten() for f in features], 1).double()
        rest_P = wanted[: self._fitted].flatten().double() - columns_PF @ base_F.to(columns_PF)
        gram_FF = self._ranks.total(columns_PF.T @ columns_PF).cpu()
        moment_F = self._ranks.total(columns_PF.T @ rest_P).cpu()
        return base_F + torch.linalg.solve(gram_FF + self._ridge * torch.diag(gram_FF.diagonal()), moment_F)
