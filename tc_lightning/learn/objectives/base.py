"""What an objective is given, and what it must answer. A distiller trains one or several of them on the same batches.

Shape suffixes: B images, C H W latent, T steps, L blocks, N tokens, 2 branches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning import Trainer
from torch import Tensor, nn

from tc_lightning.cache.soft_forecast import forecast_caches
from tc_lightning.cache.soft_network import StepCaches, reused_eps
from tc_lightning.errors import RunError
from tc_lightning.measure.cache_cases import REPEATED, CacheCases
from tc_lightning.models.companions import NO_COMPANIONS, Companions
from tc_lightning.models.conditions import Given
from tc_lightning.models.network import Network
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature


class Task(NamedTuple):
    """What is distilled: a frozen teacher, sampled in one way, and the caches that its tokens and sensitivities are scored for."""

    teacher: Network
    signature: ModelSignature
    sampler: SamplerTable
    guidance: Guidance
    cases: CacheCases = REPEATED

    @property
    def times(self) -> Tensor:
        """Times of the sampling steps in the network's units, [T]."""
        return torch.tensor([step.t for step in self.sampler.steps])

    @property
    def clock(self) -> Tensor:
        """The same as predictors of importance see them, [T] (`Schedule.clock`)."""
        return torch.tensor([self.teacher.schedule.clock(step.t) for step in self.sampler.steps])


class Loss(NamedTuple):
    """A scalar to minimise, and scalars to log."""

    total: Tensor
    logs: dict[str, Tensor]


class Batch:
    """A batch, with what several objectives want of it computed once.

    Args:
        task: what is distilled.
        content: steps and those before them (`PairBatch`), or one step of rollouts (`RolloutBatch`).
    """

    def __init__(self, task: Task, content: Mapping[str, Any]) -> None:
        self.task, self.content = task, content
        self._caches: dict[CacheCases, StepCaches] = {}
        self._reuse_errors: dict[CacheCases, Tensor] = {}

    @property
    def step(self) -> Tensor:
        """Sampling step of each image, [B]."""
        return self.content["step"]

    @property
    def given(self) -> Given:
        """Conditions of each image."""
        return Given({condition.name: self.content[condition.name] for condition in self.task.signature.conditions})

    def times(self, steps_B: Tensor) -> Tensor:
        """Times of sampling steps in the network's units, [B]."""
        return self.task.times.to(steps_B.device)[steps_B]

    def caches(self, cases: CacheCases = REPEATED) -> StepCaches:
        """What the cache holds at each pair's step: forecasts from full steps on the pair's trajectory."""
        if cases not in self._caches:
            self._caches[cases] = self._forecast(cases)
        return self._caches[cases]

    def _forecast(self, cases: CacheCases) -> StepCaches:
        b, task = self.content, self.task
        reads = [cases.reads(index, step) for index, step in zip(b["index"].tolist(), self.step.tolist(), strict=True)]
        of_S = [(row, source) for row, read in enumerate(reads) for source in read.sources]
        rows_S, sources_S = torch.tensor(of_S, device=self.step.device).unbind(1)
        x_SCHW = b["x_prev"][rows_S, self.step[rows_S] - 1 - sources_S]
        weights = [read.weights for read in reads], [read.kv_weights for read in reads]
        return forecast_caches(task.teacher, task.guidance, x_SCHW, self.times(sources_S), self.given.part(rows_S), *weights)

    def reuse_error_B(self, cases: CacheCases = REPEATED) -> Tensor:
        """Mean squared error of eps with everything reused, by image."""
        if cases not in self._reuse_errors:
            b, task, caches = self.content, self.task, self.caches(cases)
            eps = reused_eps(task.teacher, task.guidance, caches.blocks, b["x"], self.times(self.step), self.given)
            self._reuse_errors[cases] = self.error_B(eps)
        return self._reuse_errors[cases]

    def error_B(self, eps_BCHW: Tensor) -> Tensor:
        """Mean squared error against the recorded eps, by image."""
        return (eps_BCHW - self.content["eps"]).square().flatten(1).mean(1)


class Objective(nn.Module, ABC):
    """A predictor and its loss. Its parameters are trained, and its parameters and buffers are kept in the run's checkpoints."""

    batches = "pairs"  # what it is trained on: pairs of a TrajectoryDataModule, rollouts of a RolloutDataModule, or whole trajectories
    learns: str  # the array of `tc_lightning.measure.scores.Scores` that it fills; empty if it trains a network that plans name

    @abstractmethod
    def prepare(self, task: Task) -> None:
        """Create the predictor."""

    def start(self, device: torch.device) -> None:
        """Measure what the loss needs, with the teacher on its device, before the first step of a fit."""

    @abstractmethod
    def loss(self, batch: Batch, batch_idx: int) -> Loss:
        """Loss of a training batch; the mean over processes is that of one process with all their images."""

    def before_step(self) -> None:
        """Called once for each optimiser step, with the gradients in place."""

    @abstractmethod
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Figures of a batch of held-out pairs, when what was learned is taken as a plan would take it."""

    def finish(self, trainer: Trainer) -> None:
        """Called in all processes at the end of a fit, before `scores`, with the teacher on its device."""

    def companions(self) -> Companions:
        """What it trained that plans may name, as it is now."""
        return NO_COMPANIONS

    def scores(self) -> Tensor:
        """The array named by `learns`."""
        raise NotImplementedError(f"{type(self).__name__} fills no array of the scores.")


class Budgeted(Objective):
    """An objective that holds the mean of w at a target, by an augmented Lagrangian: alone, an error is least at w = 1.

    Args:
        target_share: mean of w that training holds.
        budget_rate: step of the multiplier's dual ascent, for each optimiser step.
        budget_penalty: weight of the squared distance from `target_share`.

    Raises:
        RunError: if `target_share` is out of range.
    """

    def __init__(self, target_share: float, budget_rate: float = 0.1, budget_penalty: float = 10.0) -> None:
        super().__init__()
        if not 0.0 < target_share < 1.0:
            raise RunError(f"target_share is {target_share:g}; it must lie between 0 and 1.")
        self.target_share, self.budget_rate, self.budget_penalty = target_share, budget_rate, budget_penalty

    def prepare(self, task: Task) -> None:
        """See `Objective`."""
        self.task = task
        self.multiplier: Tensor
        self.register_buffer("multiplier", torch.zeros(()))
        self._excess = torch.zeros(())

    def budget(self, mean_w: Tensor) -> Tensor:
        """The Lagrangian's terms; `mean_w` is over all steps, so that it, and the multiplier, are the same on every rank."""
        excess = mean_w - self.target_share
        self._excess = excess.detach()
        return self.multiplier * excess + 0.5 * self.budget_penalty * excess.square()

    def before_step(self) -> None:
        """Dual ascent on the budget's multiplier."""
        self.multiplier += self.budget_rate * self._excess
