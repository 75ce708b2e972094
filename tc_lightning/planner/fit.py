"""Fitting a plan's sampler: coefficients that make up for what fewer calls and cached values change.

A step of the sampler is a weighted sum of x, its m and the last ones (`tc_lightning.plan.sampler_table`). While a plan runs, the
coefficients of each step are set by least squares, so that x_next comes as near as they can bring it to where the target run is at
that time, over all pixels of the images that are fitted on; then the step is taken with them, and the next is fitted from there. The
images are reweighted as for a robust mean: one that has ended up elsewhere would outweigh all others. One run of the plan fits it.
A step's coefficients need its eps of all images, so these go through the run side by side: the network sees a few of them at a time,
and what a run goes on from, latents and caches, is kept of all.
Solvers with coefficients of each step's own, learned for a model, are known from Shaul et al., arXiv 2403.01329 (there by gradients
through the whole run, and without a cache).

Shape suffixes: B images, b of them at a time, C H W latent, P pixels, F coefficients.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.models.companions import NO_COMPANIONS, Companions
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.sampler_table import FITTED, SamplerStep, SamplerTable
from tc_lightning.planner.memory import images_at_a_time
from tc_lightning.planner.robust import robust_weights
from tc_lightning.planner.target import TargetRun
from tc_lightning.rollout.ranks import ALONE, Ranks
from tc_lightning.rollout.sampling import Rollout

REWEIGHTED = 2  # times that the weights of images are set anew within a step
HISTORY = 2  # past outputs that a step may use
RIDGE = 1e-6  # of the features' own squares: the coefficients of an analytic solver are kept where the data says nothing
COEFFICIENTS = ("next_x", "next_m", "next_m_prev", "next_m_prev2")


@dataclasses.dataclass(frozen=True)
class FittedPlan:
    """A plan whose sampler was fitted, and the squared error of each image's final latents, those of the fit first, [B]."""

    plan: CachePlan
    mse_B: Tensor


@torch.no_grad()
def fit_sampler(
    model: Network,
    plan: CachePlan,
    target: TargetRun,
    fitted: int,
    ranks: Ranks | None = None,
    companions: Companions = NO_COMPANIONS,
) -> FittedPlan:
    """Run a plan on the target's noise, fitting its sampler on the first images; the others show what that is worth.

    Args:
        model: the teacher.
        plan: the plan; its own coefficients are where the fit starts from.
        target: the run to reproduce, of this process's images.
        fitted: how many images the fit may look at, the first ones of each process.
        ranks: the processes that fit together, each with images of its own.
        companions: the networks that the plan names, on the model's device.

    Raises:
        PlanError: if the plan scales its eps or its sampler adds noise: there is nothing to fit then; or if it is for another model, or
            names a network that is not among the companions.
        TokenCacheError: if a label is out of range, or latents become NaN.
    """
    if plan.eps_scale or plan.sampler.stochastic:
        raise PlanError("a sampler that scales eps or adds noise cannot be fitted: start from ddim or dpmpp_2m.")
    run = Rollout(model, plan, target.given, companions)
    run.check()
    solver = _Fitter(plan.sampler, target, fitted, ranks or ALONE)
    end = _run(run, target.x_T, solver, images_at_a_time(plan, target.x_T.device))
    table = dataclasses.replace(named_fitted(plan.sampler), steps=tuple(solver.rows))
    return FittedPlan(dataclasses.replace(plan, sampler=table), (end - target.x_0).square().flatten(1).mean(1))


def named_fitted(table: SamplerTable) -> SamplerTable:
    """The table under the name that it has once its coefficients are fitted."""
    return dataclasses.replace(table, name=f"{table.name.removesuffix(FITTED)}{FITTED}")


def _run(run: Rollout, x_BCHW: Tensor, solver: _Fitter, batch: int) -> Tensor:
    """Final latents of all images, [B, C, H, W], of which the network sees so many at a time."""
    runs = [dataclasses.replace(run, asked=given) for given in run.given.split(batch)]
    states = [part.start(x_bCHW) for part, x_bCHW in zip(runs, x_BCHW.split(batch), strict=True)]
    for step in range(run.plan.num_steps):
        eps, writes = zip(*(part.predict(state) for part, state in zip(runs, states, strict=True)), strict=True)
        x_BCHW, m_BCHW = solver(step, x_BCHW, torch.cat(eps))
        nexts = zip(runs, states, x_BCHW.split(batch), m_BCHW.split(batch), writes, strict=True)
        states = [part.after(state, x_bCHW, m_bCHW, written) for part, state, x_bCHW, m_bCHW, written in nexts]
    return x_BCHW


class _Fitter:
    """A solver that finds its coefficients while it runs."""

    def __init__(self, table: SamplerTable, target: TargetRun, fitted: int, ranks: Ranks) -> None:
        self._table, self._target, self._fitted, self._ranks = table, target, fitted, ranks
        self._past: list[Tensor] = []  # its own record: the plan's sampler may look back less far
        self.rows: list[SamplerStep] = []

    def __call__(self, step: int, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The next x and the m of a step, of all images."""
        row = self._table.steps[step]
        m = x * row.m_x + eps * row.m_eps
        features = [x, m, *self._past]
        self._past = [m, *self._past][:HISTORY]
        base_F = torch.tensor([getattr(row, name) for name in COEFFICIENTS[: len(features)]], dtype=torch.float64)
        next_t = self._table.steps[step + 1].t if step + 1 < len(self._table) else None
        found_F = self._solve(features, self._target.at(next_t), base_F)
        self.rows.append(dataclasses.replace(row, **dict(zip(COEFFICIENTS, found_F.tolist(), strict=False))))
        x_next = torch.stack([f * c for f, c in zip(features, found_F.tolist(), strict=True)]).sum(0)
        self._require_finite(step, x_next)
        return x_next, m

    def _require_finite(self, step: int, x: Tensor) -> None:
        """All processes stop if one of them has to: the others would wait for its sums for ever."""
        if self._ranks.total((~torch.isfinite(x)).any().double()) > 0:
            raise TokenCacheError(f"latents became NaN or infinite at step {step} of a fit: check the teacher's weights.")

    def _solve(self, features: list[Tensor], wanted: Tensor, base_F: Tensor) -> Tensor:
        """Ridge regression towards `base_F`, in which images that have left the path already count for little."""
        columns_BPF = torch.stack([f[: self._fitted].double().flatten(1) for f in features], 2)
        wanted_BP = wanted[: self._fitted].double().flatten(1)
        found_F = base_F.to(columns_BPF)
        for _ in range(REWEIGHTED):
            weights_B = self._weights((wanted_BP - columns_BPF @ found_F).square().mean(1))
            found_F = self._regression(columns_BPF, wanted_BP, weights_B, base_F.to(columns_BPF))
        return found_F.cpu()

    def _weights(self, left_B: Tensor) -> Tensor:
        """How much each image's pixels count, by what is left of its error."""
        counts_B = self._target.counts_B[: self._fitted].double()
        all_B, first = self._ranks.gathered(torch.stack([left_B, counts_B], 1)), self._ranks.before(len(left_B), left_B.device)
        return robust_weights(*all_B.unbind(1))[first : first + len(left_B)]

    def _regression(self, columns_BPF: Tensor, wanted_BP: Tensor, weights_B: Tensor, base_F: Tensor) -> Tensor:
        """The sums are over the images of all processes."""
        rest_BP = wanted_BP - columns_BPF @ base_F
        weighted_BPF = columns_BPF * weights_B[:, None, None]
        gram_FF = self._ranks.total(torch.einsum("bpf,bpg->fg", weighted_BPF, columns_BPF))
        moment_F = self._ranks.total(torch.einsum("bpf,bp->f", weighted_BPF, rest_BP))
        return base_F + torch.linalg.solve(gram_FF + RIDGE * torch.diag(gram_FF.diagonal()), moment_F)
