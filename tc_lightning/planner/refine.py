"""Refining a fitted plan end to end: Gauss-Newton on the error of the final images.

`tc_lightning.planner.fit` brings each state of a run near to where the target run is, one after the other. What counts is the end: an
error may be made up for by a later step, and one that is made near a fork of an image's path grows, others fade. So theta is then moved
as a whole: the sampler's coefficients of all steps and, if asked, the weights of all forecasts (`tc_lightning.planner.theta`). With
e_b(theta) the difference of image b's final latents to the target's,

    (H + lambda diag H) delta = -g      g = sum_B w_b J_b^T e_b      H = sum_B w_b J_b^T J_b      J_b = d e_b / d theta

where w_b are the weights of a robust mean (`tc_lightning.planner.robust`). g takes one backward pass. H is estimated with random signs
v, since E (J^T v)(J^T v)^T = J^T J: one more pass for each, which gives J_b^T v_b of every image at once, because each has a theta of
its own in the graph. H only says how far to go, so that a dozen images are enough for it; it changes little, so that it is
estimated once and kept. The better of two lambda is taken in the first step, and kept; a step that does not help is the last. Where
there is no memory for the graph of an image's whole run, it is made step by step (`tc_lightning.planner.gradients`). (Solvers with
learned coefficients: Shaul et al., arXiv 2403.01329, by gradient descent. Estimates by random probes: Hutchinson, 1989.)

Shape suffixes: B images, C H W latent, P places of theta.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.models.companions import NO_COMPANIONS, Companions
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.planner.gradients import stepwise, whole
from tc_lightning.planner.graph_size import graph_size
from tc_lightning.planner.memory import free_bytes, images_at_a_time, spare_bytes
from tc_lightning.planner.robust import robust_mean_of_all, robust_weights
from tc_lightning.planner.target import TargetRun
from tc_lightning.planner.theta import Places
from tc_lightning.rollout.ranks import ALONE, Ranks
from tc_lightning.rollout.sampling import Rollout, sample

PROBES = 4
CURVED = 12  # images, evenly spread, that H is estimated on where there are twice as many or more; else all
DAMPING = (1e-1, 1e-2)
_SEED = 0x50726F62

OnPass = Callable[[], object]


class Passes(NamedTuple):
    """How gradients are computed: for so many images at a time, by the graph of the whole run or of one step after the other, with so
    many vectors pulled back together."""

    images: int
    stepwise: bool = False
    vectors: int = 1 + PROBES


def refine_sampler(
    model: Network,
    plan: CachePlan,
    target: TargetRun,
    iterations: int,
    ranks: Ranks | None = None,
    on_pass: OnPass = lambda: None,
    companions: Companions = NO_COMPANIONS,
    weights: bool = False,
) -> CachePlan:
    """Move the sampler's coefficients, and if asked the forecasts' weights, towards less error of final latents.

    Args:
        model: the teacher; its weights are left alone.
        plan: a plan whose sampler was fitted.
        target: the run to reproduce, of this process's images, and what each counts.
        iterations: steps of Gauss-Newton at most; fewer are taken if one does not help. The first is the dear one.
        ranks: the processes that refine together, each with images of its own.
        on_pass: called after every iteration.
        companions: the networks that the plan names, on the model's device.
        weights: whether forecasts of cached values get weights of their own too, in place of their order's.

    Returns:
        The plan with what was found; the plan itself, with a warning, if there is no memory for its gradients.

    Raises:
        PlanError: if the plan scales its eps or its sampler adds noise; or if it is for another model, or names a
            network that is not among the companions.
        TokenCacheError: in all processes, if the plan's own latents become NaN.
    """
    if plan.eps_scale or plan.sampler.stochastic:
        raise PlanError("a sampler that scales eps or adds noise cannot be refined: start from ddim or dpmpp_2m.")
    if not iterations:
        return plan
    refiner = _Refiner(model, target, ranks or ALONE, companions, weights)
    passes = refiner.passes(plan)
    if passes is None:
        return plan
    damping: tuple[float, ...] = DAMPING
    gram_PP: Tensor | None = None
    for _ in range(iterations):
        errors_B, found_PP, slope_P = refiner.normal_equations(plan, passes, PROBES if gram_PP is None else 0)
        if refiner.value(errors_B) == torch.inf:
            raise TokenCacheError(f"the plan {plan.summary} makes latents NaN or infinite: it cannot be refined.")
        gram_PP = found_PP if gram_PP is None else gram_PP
        if not (gram_PP.isfinite().all() and slope_P.isfinite().all()):  # a path so unstable that its gradients overflow
            break
        moves = {lam: refiner.moved(plan, solve(gram_PP, slope_P, lam)) for lam in damping}
        better = refiner.best(plan, errors_B, moves)
        on_pass()
        if better is None:
            break
        damping, plan = (better[0],), better[1]
    return plan


class _Refiner:
    """One target, the processes that share its images, and what is moved: the sampler, or with `weights` forecasts too."""

    def __init__(
        self, model: Network, target: TargetRun, ranks: Ranks, companions: Companions = NO_COMPANIONS, weights: bool = False
    ) -> None:
        self._model, self._target, self._ranks = model, target, ranks
        self._companions, self._weights = companions, weights

    def moved(self, plan: CachePlan, delta_P: Tensor) -> CachePlan:
        """The plan with theta changed by so much."""
        return self._places(plan).moved(plan, delta_P)

    def _places(self, plan: CachePlan) -> Places:
        return Places.of(plan, self._weights)

    def passes(self, plan: CachePlan) -> Passes | None:
        """What there is memory for; None in all processes, with a warning in the first, if in one it is not enough for one image."""
        one, device = self._target.part(slice(0, 1)), self._target.x_0.device
        run = self._rollout(plan, one)
        run.check()
        need = graph_size(run, one.x_T, self._places(plan))
        least, free, spare = need.stepwise(1), free_bytes(device), spare_bytes(device, self._ranks.world)
        vectors = next((v for v in range(1 + PROBES, 0, -1) if need.stepwise(v) <= spare), 0)
        short = torch.tensor(float(not vectors), dtype=torch.float64, device=device)
        if self._ranks.total(short).item() == 0:
            by_step = need.whole > free
            images = int(free // (need.stepwise(vectors) if by_step else need.whole))
            return Passes(max(1, min(images, len(self._target.x_0))), by_step, vectors if by_step else 1 + PROBES)
        if self._ranks.first:
            warnings.warn(
                f"the sampler stays as it was fitted: the gradients of one image's run take {least / 1e9:.3g} GB step by step, "
                f"and {spare / 1e9:.3g} GB are free for them here. Plan on a device with more memory, or with refinements 0.",
                stacklevel=3,
            )
        return None

    def errors(self, plan: CachePlan) -> Tensor:
        """Mean squared error of final latents of this process's images, [B]; infinite for one that became NaN and those run with it."""
        count, at_a_time = len(self._target.x_0), images_at_a_time(plan, self._target.x_0.device)
        return torch.cat([self._errors(plan, self._target.part(slice(i, i + at_a_time))) for i in range(0, count, at_a_time)])

    def _errors(self, plan: CachePlan, target: TargetRun) -> Tensor:
        try:
            end = sample(self._model, plan, target.x_T, target.given, companions=self._companions)
        except PlanError:
            raise
        except TokenCacheError:
            return torch.full((len(target.x_0),), torch.inf, device=target.x_0.device)
        return (end - target.x_0).square().flatten(1).mean(1)

    def _rollout(self, plan: CachePlan, target: TargetRun) -> Rollout:
        return Rollout(self._model, plan, target.given, self._companions)

    def value(self, errors_B: Tensor) -> float:
        """Robust mean over the images of all processes."""
        return robust_mean_of_all(errors_B, self._target.counts_B, self._ranks)

    def best(self, plan: CachePlan, errors_B: Tensor, moves: dict[float, CachePlan]) -> tuple[float, CachePlan, Tensor] | None:
        """The best of a few moves, its name first and its errors last; None if none is better than the plan."""
        tried = [(lam, move, self.errors(move)) for lam, move in moves.items()]
        best = min(tried, key=lambda one: self.value(one[2]))
        return best if self.value(best[2]) < self.value(errors_B) else None

    def normal_equations(self, plan: CachePlan, passes: Passes, probes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Errors of this process's images [B]; over those of all processes, H [P, P] from so many probes (0 without any), and g [P]."""
        count, device, size = len(self._target.x_0), self._target.x_0.device, self._places(plan).size
        first, every = self._ranks.before(count, device), max(1, len(self._ranks.gathered(self._target.counts_B[:, None])) // CURVED)
        errors_B = torch.zeros(count, dtype=torch.float64, device=device)
        of_error_BP = torch.zeros(count, size, dtype=torch.float64, device=device)
        of_signs: list[tuple[slice, Tensor]] = []
        for place in range(every):  # H takes the first of every so many images, counted over all processes
            for begin in range((place - first) % every, count, every * passes.images):
                part = slice(begin, begin + every * passes.images, every)
                signs = [_signs(first + b, 0 if place else probes, self._target.x_0.shape[1:]) for b in range(count)[part]]
                errors_B[part], found = self._products(plan, self._target.part(part), torch.stack(signs, 1), passes)
                of_error_BP[part] = found[0]
                of_signs += [(part, rows_BP) for rows_BP in found[1:]]
        all_B = robust_weights(*self._ranks.gathered(torch.stack([errors_B, self._target.counts_B.double()], 1)).unbind(1))
        weights_B, share = all_B[first : first + count], all_B[::every].sum() / all_B.sum()
        gram_PP = torch.zeros(size, size, dtype=torch.float64, device=device)
        for part, rows_BP in of_signs:
            gram_PP += (rows_BP * weights_B[part, None]).T @ rows_BP / (probes * share)
        return errors_B, self._ranks.total(gram_PP).cpu(), self._ranks.total(weights_B @ of_error_BP).cpu()

    def _products(self, plan: CachePlan, target: TargetRun, signs_VBCHW: Tensor, passes: Passes) -> tuple[Tensor, list[Tensor]]:
        """Errors [B], and J_b^T v_b of each image, [B, P]: for v its difference to the target, then for each of the signs."""
        gradients, run = stepwise if passes.stepwise else whole, self._rollout(plan, target)
        end, pull = gradients(run, target.x_T, self._places(plan))
        apart = end - target.x_0
        vectors = [apart, *signs_VBCHW.to(end)]
        found: list[Tensor] = []
        while True:
            found += pull(vectors[len(found) : len(found) + passes.vectors])
            if len(found) == len(vectors):
                return apart.double().square().flatten(1).mean(1), [products_BP.double() for products_BP in found]
            _, pull = gradients(run, target.x_T, self._places(plan))


def solve(gram_PP: Tensor, slope_P: Tensor, damping: float) -> Tensor:
    """delta [P] of the module's equation; 0 for what no image depends on: coefficients of outputs that do not exist."""
    used_P = gram_PP.diagonal() > 0
    scale = gram_PP.diagonal()[used_P].sqrt()
    scaled = gram_PP[used_P][:, used_P] / scale[:, None] / scale
    delta_P = torch.zeros_like(slope_P)
    delta_P[used_P] = torch.linalg.solve(scaled + damping * torch.eye(len(scale)).to(scaled), -slope_P[used_P] / scale) / scale
    return delta_P


def _signs(image: int, probes: int, shape: torch.Size) -> Tensor:
    """Random signs of one image, [probes, C, H, W], by its place among those of all processes."""
    generator = torch.Generator().manual_seed(_SEED + image)
    return torch.randint(0, 2, (probes, *shape), generator=generator) * 2.0 - 1.0
