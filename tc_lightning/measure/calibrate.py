"""Measuring a `Calibration` on full-compute trajectories of the frozen teacher.

A run has one, made of images of its own whoever asks first: `lightning fit`, for the policy that it ends with, or a later report.

Shape suffixes: B images (guidance doubles them inside), C H W latent, T sampling steps, G gaps, S spacings, L blocks, 2 branches,
O forecast orders, N tokens, D width.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tc_lightning.cache.semantics import Step, forecast, run_blocks
from tc_lightning.cache.soft_network import enter, guided_eps
from tc_lightning.errors import TokenCacheError
from tc_lightning.measure.calibration import MAX_GAP, Calibration
from tc_lightning.measure.scores import sampler_digest
from tc_lightning.measure.step_effect import step_effect
from tc_lightning.models.conditions import Asked, given_of
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.forecasts import MAX_ORDER, lagrange_weights
from tc_lightning.plan.given import PLANNING
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute
from tc_lightning.rollout.sampling import device_of, full_plan, given_for, noise_for, sample_steps

BATCH = 4  # trajectories at a time: the branches of the last G steps of each are held
IMAGES = 8  # of a run's calibration
SEED = 0x63616C6962  # of its noise and conditions: apart from any seed that a person would choose for images
NAME = "calibration.safetensors"


def run_calibration(model: Network, plan: CachePlan, folder: Path, keep: bool = True) -> Calibration:
    """The calibration of the full-compute run that a plan belongs to: the one in the run's folder if it is of the same, else a new one.

    Args:
        model: the teacher, on the device where it is to be measured.
        plan: tells model, sampler and guidance.
        folder: of the run.
        keep: write what was measured there; of several processes one should.

    Raises:
        RunError: if the file in the folder is damaged.
        TokenCacheError: if the latents become NaN.
    """
    path, digest = folder / NAME, sampler_digest(plan.sampler)
    made_of = f"guidance {plan.guidance.scale:g} on {plan.guidance.channels} channels, {IMAGES} images of seed {SEED}"
    if path.is_file():
        known = Calibration.load(path)
        if (known.teacher, known.sampler, known.made_of) == (plan.model.teacher, digest, made_of):
            return known
    device, images = device_of(model), range(IMAGES)
    given = given_for(SEED, images, model, device, PLANNING)
    measured = dataclasses.replace(calibrate(model, plan, noise_for(SEED, images, model, device), given), made_of=made_of)
    if keep:
        measured.save(path)
    return measured


def calibrate(model: Network, plan: CachePlan, x_T: Tensor, asked: Asked, max_gap: int = MAX_GAP, progress: bool = True) -> Calibration:
    """Measure drifts, reuse errors and step effects, each the mean over the given trajectories.

    Args:
        model: the teacher.
        plan: tells model, sampler and guidance; the trajectories are those of full compute, whatever it caches.
        x_T: initial noise [B, C, H, W].
        asked: conditions of each image; of a class-conditional model its labels [B] will do.
        max_gap: largest distance between a computation and its reuse; no more than there are steps.
        progress: show a progress bar.

    Raises:
        TokenCacheError: if there is no trajectory, a condition cannot be what it is, or the latents become NaN.
    """
    if not len(x_T) or max_gap < 1:
        raise TokenCacheError(f"cannot calibrate on {len(x_T)} trajectories with gaps up to {max_gap}: both must be at least 1.")
    full, given = full_plan(plan.model, plan.sampler, plan.guidance), given_of(model.conditions, asked)
    gaps = min(max_gap, max(plan.num_steps - 1, 1))
    drifts = (plan.num_steps, gaps, plan.model.depth, len(plan.model.block.names))
    sums = [np.zeros(drifts), np.zeros((plan.num_steps, gaps, gaps, MAX_ORDER + 1))]
    effect_T = np.zeros(plan.num_steps)
    with tqdm(total=len(x_T), desc="calibration", unit="trajectory", disable=not progress) as bar:
        for start in range(0, len(x_T), BATCH):
            part = slice(start, start + BATCH)
            x, y = x_T[part], given.part(part)
            for total, mean in zip(sums, _trajectory_tables(model, full, x, y, gaps), strict=True):
                total += len(x) * mean
            effect_T += len(x) * step_effect(model, full, x, y, first_index=start).numpy()
            bar.update(len(x))
    drift, error, effect = (total / len(x_T) for total in (*sums, effect_T))
    return Calibration(drift, error, effect, plan.model.teacher, sampler_digest(plan.sampler))


class _Known(NamedTuple):
    """One step at full compute: tokens before the blocks, their summed residual, branch outputs in the order attn 0, mlp 0, ..."""

    z_BND: Tensor
    span_BND: Tensor
    branches: list[Tensor]
    final: Any
    eps: Tensor


@torch.no_grad()
def _trajectory_tables(model: Network, full: CachePlan, x_T: Tensor, asked: Asked, gaps: int) -> tuple[np.ndarray, np.ndarray]:
    """Drifts [T, G, L, 2] and gap errors [T, G, S, O] of some trajectories."""
    drift = np.zeros((full.num_steps, gaps, full.model.depth, len(full.model.block.names)))
    error = np.zeros((full.num_steps, gaps, gaps, MAX_ORDER + 1))
    branches: list[list[Tensor]] = []  # of the last steps, latest first
    spans: list[Tensor] = []
    for state in sample_steps(model, full, x_T, asked):
        known = _known(model, full.guidance, state.x, full.sampler.steps[state.step].t, asked)
        for g, earlier in enumerate(branches):
            drift[state.step, g] = _drift(earlier, known.branches).reshape(drift.shape[2:])
        for g in range(min(gaps, state.step)):
            error[state.step, g] = _gap_error_SO(model, full.guidance, known, spans, state.step, g + 1, gaps)
        branches = [known.branches, *branches[: gaps - 1]]
        spans.append(known.span_BND)
    return drift, error


def _known(model: Network, guidance: Guidance, x_BCHW: Tensor, t: float, asked: Asked) -> _Known:
    L = len(model.blocks)
    z_BND, mods, final = enter(model, guidance, x_BCHW, torch.full((len(x_BCHW),), t, device=x_BCHW.device), asked)
    span, entries = Entry("span", 0, L), [Entry(branch, b, b + 1) for b in range(L) for branch in model.blocks[b].branches]  # type: ignore[union-attr]
    out_BND, writes = run_blocks(Step((compute(0, L),), (None,), {}, [span, *entries]), z_BND, list(model.blocks), mods)
    return _Known(z_BND, writes[span], [writes[e] for e in entries], final, guided_eps(model, guidance, out_BND, final))


def _drift(earlier: list[Tensor], now: list[Tensor]) -> np.ndarray:
    """Relative L1 change of every branch of every block; one that is silent at both steps has not changed."""
    ratios = [
        float((a - b).abs().sum() / b.abs().sum().clamp(min=torch.finfo(b.dtype).tiny)) for a, b in zip(earlier, now, strict=True)
    ]
    return np.array(ratios)


def _gap_error_SO(
    model: Network, guidance: Guidance, known: _Known, spans: list[Tensor], step: int, gap: int, spacings: int
) -> np.ndarray:
    """Error of one step by spacing and order, [S, O], where the last full computation was `gap` steps before."""
    seen: dict[tuple[int, ...], float] = {}

    def error(spacing: int, order: int) -> float:
        sources = tuple(s for s in range(step - gap, step - gap - spacing * order - 1, -spacing) if s >= 0)
        if sources not in seen:
            span_BND = forecast([spans[s] for s in sources], lagrange_weights(sources, step))
            eps = guided_eps(model, guidance, known.z_BND + span_BND, known.final)
            seen[sources] = float((eps - known.eps).square().mean())
        return seen[sources]

    return np.array([[error(spacing + 1, order) for order in range(MAX_ORDER + 1)] for spacing in range(spacings)])
