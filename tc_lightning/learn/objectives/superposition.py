"""Superposition on recorded trajectories of full compute: the cache of a step is forecast from full steps before it.

Shape suffixes: B images, C H W latent, T steps, L blocks, N tokens, 2 branches.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from tc_lightning.cache.soft_network import mixed_branches_eps, mixed_eps
from tc_lightning.errors import RunError
from tc_lightning.learn.objectives.base import Batch, Budgeted, Loss, Task
from tc_lightning.learn.objectives.routers import RouterObjective
from tc_lightning.models.predictor import CachePredictor, RouterPredictor
from tc_lightning.plan.costs import blocks_macs, full_step_macs

FLOOR = 1e-12  # mean squared eps below which reuse does no damage worth dividing by


class PairBatch(TypedDict):
    """Steps of recorded trajectories, each with the steps before it; steps may differ within a batch.

    Beside these, each condition by its name, [B, ...].
    """

    x_prev: Tensor  # [B, R, C, H, W] latents of step - 1, step - 2, ..., as far as forecasts reach; those of step 0 before it
    x: Tensor  # [B, C, H, W] latents of step
    eps: Tensor  # [B, C, H, W] guided eps of step at full compute
    step: Tensor  # [B] 1 to T - 1
    index: Tensor  # [B] which trajectory


class TokenSuperposition(Budgeted):
    """The Cache Predictor of TokenCache v1 (arXiv 2409.18523), held at a budget.

    The loss of a pair is the error of eps when every token is the superposition of computing and reusing. What is reused is what
    plans reuse (`Task.cases`); the paper's is the step before. The loss is divided by the error of reusing everything, which
    varies by orders of magnitude along the trajectory and from order to order: each pair then says what share of the damage of reuse
    is left (0 at w = 1, 1 at w = 0), and every step counts. Alone, this loss is least at w = 1: the mean of w over all steps, blocks
    and tokens is held at `target_share` by an augmented Lagrangian.

    Args:
        target_share: mean of w over steps, blocks and tokens that training holds.
        budget_rate: step of the multiplier's dual ascent, for each optimiser step.
        budget_penalty: weight of the squared distance from `target_share`.
        hidden_size: width of the predictor.

    Raises:
        RunError: if `target_share` is out of range.
    """

    learns = "importance_TLN"

    def __init__(
        self, target_share: float = 0.5, budget_rate: float = 0.1, budget_penalty: float = 10.0, hidden_size: int = 64
    ) -> None:
        super().__init__(target_share, budget_rate, budget_penalty)
        self.hidden_size = hidden_size

    def prepare(self, task: Task) -> None:
        """See `Objective`."""
        super().prepare(task)
        self.predictor = CachePredictor(task.signature.depth, task.signature.image_tokens, self.hidden_size)
        self.times_T: Tensor
        self.register_buffer("times_T", task.clock, persistent=False)

    def loss(self, batch: Batch, batch_idx: int) -> Loss:
        """Relative distillation error plus the budget's Lagrangian."""
        w_TLN = self.predictor(self.times_T[1:])
        error_B = self._error(batch, w_TLN[batch.step - 1])
        distil = (error_B / batch.reuse_error_B(self.task.cases).clamp(min=FLOOR)).mean()
        mean_w = w_TLN.detach().mean()
        logs = {"distil_relative": distil.detach(), "distil_mse": error_B.detach().mean(), "mean_w": mean_w}
        return Loss(distil + self.budget(w_TLN.mean()), logs | {"macs_share": self._macs_share(mean_w)})

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Error when the most important tokens of each block, `target_share` of them, are recomputed and the others reused."""
        w_TLN = self.predictor(self.times_T[1:])
        keep = max(1, round(self.target_share * w_TLN.shape[-1]))
        hard_TLN = torch.zeros_like(w_TLN).scatter_(-1, w_TLN.topk(keep, dim=-1).indices, 1.0)
        reuse_B = batch.reuse_error_B(self.task.cases)
        return {"distil_mse": self._error(batch, hard_TLN[batch.step - 1]).mean(), "reuse_mse": reuse_B.mean()}

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The importances of all steps, those of step 0 set to 1."""
        w_TLN = self.predictor(self.times_T).float()
        w_TLN[0] = 1.0
        return w_TLN

    def _error(self, batch: Batch, w_BLN: Tensor) -> Tensor:
        """Mean squared error of eps with importances w, by image."""
        task, caches = self.task, batch.caches(self.task.cases).blocks
        args = caches, batch.content["x"], batch.times(batch.step), batch.given, w_BLN
        return batch.error_B(mixed_eps(task.teacher, task.guidance, *args))

    def _macs_share(self, mean_w: Tensor) -> Tensor:
        signature = self.task.signature
        full = full_step_macs(signature)
        least = signature.fixed_macs + blocks_macs(signature, range(signature.depth), signature.fixed_tokens)  # no token of the image
        return 1 - (1 - mean_w) * (full - least) / full


class RouterSuperposition(RouterObjective):
    """Learning-to-Cache (arXiv 2406.01733): each branch of each block a superposition of computing and reusing.

    As in the paper the reused step follows a full one, which is how its plans use it (every second step is full). The paper noises
    real images; here the pairs lie on the teacher's own trajectories.

    Args:
        every: train on every n-th batch only, where the time that the router adds to the training of tokens matters.
        target_share: see `RouterObjective`, as all others.
        beta: the same.
        weighting: the same.
        samples: the same.
        hidden_size: width of the predictor.

    Raises:
        RunError: if an argument is out of range.
    """

    def __init__(
        self,
        every: int = 1,
        target_share: float = 0.5,
        beta: float | None = None,
        weighting: str = "effect",
        samples: int = 2,
        hidden_size: int = 64,
    ) -> None:
        super().__init__(target_share, beta, weighting, samples)
        if min(every, hidden_size) < 1:
            raise RunError(f"router: every is {every} and hidden_size {hidden_size}; they must be at least 1.")
        self.every, self.hidden_size = every, hidden_size

    def make_predictor(self, task: Task) -> RouterPredictor:
        """A network over the steps, since batches mix them, and a table."""
        return RouterPredictor(task.clock, task.signature.depth, self.hidden_size, len(task.signature.block.names))

    def loss(self, batch: Batch, batch_idx: int) -> Loss:
        """Weighted error plus the cost of computing."""
        w_TL2 = self.predictor()
        if batch_idx % self.every:
            return self.idle(w_TL2)
        args = batch.caches().branches, batch.content["x"], batch.times(batch.step), batch.given, w_TL2[batch.step]
        eps, _ = mixed_branches_eps(self.task.teacher, self.task.guidance, *args)
        return self.priced(self.weight_T[batch.step] * batch.error_B(eps), w_TL2)
