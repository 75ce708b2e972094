"""Figures of a distillation run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tc_lightning.measure.scores import Scores
from tc_lightning.plan.segments import BRANCHES

COLUMNS = 8  # steps shown


def importance_figure(scores: Scores) -> Figure:
    """Token maps of w: a row for each block, a column for each of up to 8 steps, each sqrt(N) x sqrt(N)."""
    T, L, N = scores.importance_TLN.shape
    side = math.isqrt(N)
    shape = (side, side) if side * side == N else (1, N)
    steps = np.unique(np.linspace(min(1, T - 1), T - 1, COLUMNS).round().astype(int))
    figure = Figure(figsize=(1.0 * len(steps) + 1.2, 0.9 * L + 0.8), layout="constrained")
    axes = figure.subplots(L, len(steps), squeeze=False)
    for (block, column), ax in np.ndenumerate(axes):
        image = ax.imshow(scores.importance_TLN[steps[column], block].reshape(shape), vmin=0, vmax=1, cmap="viridis")
        ax.set(xticks=[], yticks=[])
        if block == 0:
            ax.set_title(f"step {steps[column]}", fontsize=8)
        if column == 0:
            ax.set_ylabel(f"block {block}", fontsize=8)
    figure.colorbar(image, ax=axes, label="w (1: recompute)", shrink=0.5)
    return figure


def sensitivity_figure(scores: Scores, names: Sequence[str] = BRANCHES) -> Figure:
    """Mean squared change of eps by step and block, one panel a branch, logarithmic colours."""
    sensitivity_TL2 = scores.sensitivity_TL2[1:]
    positive = sensitivity_TL2[sensitivity_TL2 > 0]
    norm = LogNorm(positive.min(), positive.max()) if positive.size else None
    title = "repeated" if scores.cases.orders == (0,) else "forecast"
    return _branch_maps(sensitivity_TL2, names, title, "mean squared change of eps", norm=norm, cmap="magma")


def router_figure(router_TL2: np.ndarray, names: Sequence[str] = BRANCHES) -> Figure:
    """A router's w by step and block, one panel a branch."""
    return _branch_maps(router_TL2[1:], names, "router", "w (1: compute)", vmin=0, vmax=1, cmap="viridis")


def _branch_maps(values_TL2: np.ndarray, names: Sequence[str], title: str, label: str, **colours: Any) -> Figure:
    """Values of sampling steps from 1 on, by block."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    extent = (0.5, len(values_TL2) + 0.5, -0.5, values_TL2.shape[1] - 0.5)
    for b, ax in enumerate(axes):
        image = ax.imshow(values_TL2[..., b].T, aspect="auto", origin="lower", extent=extent, **colours)
        ax.set(title=f"{names[b]} {title}", xlabel="sampling step", ylabel="block")
    figure.colorbar(image, ax=axes, label=label)
    return figure
