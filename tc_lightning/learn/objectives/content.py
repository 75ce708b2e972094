"""TokenCache v2's predictor, which looks at the image, on recorded trajectories.

Loss of a pair (arXiv 2409.18523, version 2): |x^_L - x_L|^2 + lambda |a|_1, where x_L are the tokens after the last block and x^_L
those when each token of each block is the superposition of computing and reusing, with its score a as weight. What is reused is
forecast from full steps, as plans do (`Task.cases`); the paper repeats the step before. The last blocks may stay uncached: they are
computed, and do not count. The error of reuse varies by orders of magnitude along a trajectory; undivided, the last steps would be
all that is learned. So it is divided by the error of reusing everything, as in version 1, but not wholly: what is left of it
(`emphasis`) is what lets scores tell steps apart, and full steps are placed by the sum of scores.

Shape suffixes: B images, M rows (guidance doubles them), C H W latent, S samples, T steps, L blocks, N tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from tc_lightning.cache.soft import mixed_block
from tc_lightning.cache.soft_network import enter, mixed_eps
from tc_lightning.errors import RunError
from tc_lightning.learn.objectives.base import Batch, Loss, Objective, Task
from tc_lightning.learn.objectives.superposition import FLOOR
from tc_lightning.models.companions import Companions
from tc_lightning.models.content_predictor import ContentPredictor, Selector
from tc_lightning.models.network import run_through
from tc_lightning.plan.guidance import Guidance

LATENTS_AT_ONCE = 64  # latents that the predictor scores in one forward pass


class ContentSuperposition(Objective):
    """Trains a content predictor in place of the Cache Predictor; the importances that policies see are its means over trajectories.

    Args:
        uncached_blocks: last blocks that are always computed.
        cost: lambda, the price of recomputing everything; None finds the one at which the mean score is `target_share`.
        emphasis: 0 counts every pair alike, 1 by its error relative to |x_L|^2 (the paper, up to that constant).
        target_share: mean score that training holds if `cost` is None; share of the tokens recomputed in validation.
        budget_rate: step of lambda's dual ascent, for each optimiser step.
        budget_penalty: weight of the squared distance from `target_share`.
        samples: training trajectories over which scores are averaged in the end, at most.

    Raises:
        RunError: if an argument is out of range.
    """

    learns = "importance_TLN"

    def __init__(
        self,
        uncached_blocks: int = 1,
        cost: float | None = None,
        emphasis: float = 0.5,
        target_share: float = 0.5,
        budget_rate: float = 0.1,
        budget_penalty: float = 10.0,
        samples: int = 256,
    ) -> None:
        super().__init__()
        if not 0.0 < target_share < 1.0:
            raise RunError(f"target_share is {target_share:g}; it must lie between 0 and 1.")
        if not 0.0 <= emphasis <= 1.0 or (cost is not None and not cost > 0.0) or uncached_blocks < 0 or samples < 1:
            raise RunError(
                "content: emphasis must lie in 0 to 1, cost above 0 (or null), uncached_blocks be 0 or more, samples 1 or more."
            )
        self.uncached_blocks, self.cost, self.emphasis, self.target_share = uncached_blocks, cost, emphasis, target_share
        self.budget_rate, self.budget_penalty, self.samples = budget_rate, budget_penalty, samples

    def prepare(self, task: Task) -> None:
        """See `Objective`."""
        self.task = task
        self.cached_blocks = task.signature.depth - self.uncached_blocks
        if self.cached_blocks < 1:
            raise RunError(f"content: uncached_blocks is {self.uncached_blocks}, and the teacher has {task.signature.depth} blocks.")
        self.predictor = ContentPredictor.from_teacher(task.teacher)
        self.multiplier: Tensor
        self.register_buffer("multiplier", torch.zeros(()))
        self._excess = torch.zeros(())
        self._mean_TLN: Tensor | None = None

    def loss(self, batch: Batch, batch_idx: int) -> Loss:
        """Weighted error of x_L plus lambda times the mean score."""
        a_BLN = self._importances(batch)
        error_B, reuse_B, size_B = self._token_errors(batch, a_BLN)
        unit_B = reuse_B.clamp(min=FLOOR) ** (1 - self.emphasis) * size_B**self.emphasis
        mean_a = a_BLN[:, : self.cached_blocks].mean()
        self._excess = _over_processes(mean_a.detach()) - self.target_share
        price = self.multiplier + self.budget_penalty * self._excess if self.cost is None else self.cost
        distil = (error_B / unit_B).mean()
        relative = (error_B / reuse_B.clamp(min=FLOOR)).mean().detach()
        logs = {"distil_relative": relative, "x_L_mse": error_B.detach().mean(), "mean_w": mean_a.detach()}
        return Loss(distil + price * mean_a, logs)

    def before_step(self) -> None:
        """Dual ascent on lambda, unless it is given."""
        if self.cost is None:
            self.multiplier += self.budget_rate * self._excess

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Error of eps when an image's highest scores over all cached blocks, `target_share` of them, are recomputed."""
        a_BLN = self._importances(batch)
        scores_BS = a_BLN[:, : self.cached_blocks].flatten(1)
        keep = max(1, round(self.target_share * scores_BS.shape[1]))
        hard_BS = torch.zeros_like(scores_BS).scatter_(1, scores_BS.topk(keep, dim=1).indices, 1.0)
        w_BLN = torch.cat([hard_BS.unflatten(1, (self.cached_blocks, -1)), a_BLN[:, self.cached_blocks :]], 1)
        task, caches = self.task, batch.caches(self.task.cases).blocks
        args = caches, batch.content["x"], batch.times(batch.step), batch.given, w_BLN
        eps = mixed_eps(task.teacher, task.guidance, *args)
        return {"distil_mse": batch.error_B(eps).mean(), "reuse_mse": batch.reuse_error_B(task.cases).mean()}

    @torch.no_grad()
    def finish(self, trainer: Trainer) -> None:
        """Average scores over training trajectories; processes share these."""
        device, world = trainer.strategy.root_device, trainer.world_size
        predictor, signature = self.predictor.to(device), self.task.signature
        latents_STCHW = trainer.datamodule.train_latents(self.samples)  # type: ignore[attr-defined]
        total_TLN = torch.zeros(len(self.task.sampler), signature.depth, signature.tokens, dtype=torch.float64)
        for i, t in enumerate(self.task.times.tolist()):
            for x in latents_STCHW[trainer.global_rank :: world, i].split(LATENTS_AT_ONCE):
                t_B = torch.full((len(x),), t, device=device)
                total_TLN[i] += predictor.scores(self.task.teacher, x.to(device), t_B).double().sum(0).cpu()
        if world > 1:
            total_TLN = trainer.strategy.reduce(total_TLN.to(device), reduce_op="sum").cpu()
        self._mean_TLN = (total_TLN / len(latents_STCHW)).float()
        self._mean_TLN[0], self._mean_TLN[:, self.cached_blocks :] = 1.0, 1.0

    def scores(self) -> Tensor:
        """Mean scores of all steps; 1 at step 0, and in the blocks that stay uncached."""
        assert self._mean_TLN is not None, "finish comes first"
        return self._mean_TLN

    def companions(self) -> Companions:
        """See `Objective`."""
        return Companions(Selector.of(self.predictor))

    def _importances(self, batch: Batch) -> Tensor:
        """Scores [B, L, N]; 1 in the blocks that stay uncached."""
        a_BLN = self.predictor.scores(self.task.teacher, batch.content["x"], batch.times(batch.step))
        return torch.cat([a_BLN[:, : self.cached_blocks], torch.ones_like(a_BLN[:, self.cached_blocks :])], 1)

    def _token_errors(self, batch: Batch, a_BLN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared error of x_L by image, the same with everything reused, and the mean square of x_L."""
        teacher, guidance = self.task.teacher, self.task.guidance
        z_MND, mods, _ = enter(teacher, guidance, batch.content["x"], batch.times(batch.step), batch.given)
        w_MLN = torch.cat([a_BLN, a_BLN]) if guidance.doubles_batch else a_BLN
        blocks: list[Any] = list(teacher.blocks)
        caches = batch.caches(self.task.cases).blocks

        def computed(b: int, z: Tensor, skip: Tensor | None) -> Tensor:
            return blocks[b](z, mods[b], skip)

        def reusing(b: int, z: Tensor, skip: Tensor | None) -> Tensor:
            return z + caches[b].residual if b < self.cached_blocks else computed(b, z, skip)

        def mixing(b: int, z: Tensor, skip: Tensor | None) -> Tensor:
            cached = b < self.cached_blocks
            return mixed_block(blocks[b], z, mods[b], w_MLN[:, b], caches[b], skip) if cached else computed(b, z, skip)

        with torch.no_grad():
            full, reused = (run_through(blocks, z_MND, run) for run in (computed, reusing))
        mixed = run_through(blocks, z_MND, mixing)
        error_B, reuse_B, size_B = (_mean_square(x, guidance) for x in (mixed - full, reused - full, full))
        return error_B, reuse_B, size_B


def _mean_square(x_MND: Tensor, guidance: Guidance) -> Tensor:
    """By image: over tokens, width and both halves of guidance, [B]."""
    square_M = x_MND.float().square().flatten(1).mean(1)
    return square_M.unflatten(0, (2, -1)).mean(0) if guidance.doubles_batch else square_M


def _over_processes(value: Tensor) -> Tensor:
    """Mean over processes, so that lambda is the same in all of them."""
    if not torch.distributed.is_initialized():
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()
