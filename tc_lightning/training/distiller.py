"""Distilling a cache plan: trains the Cache Predictor against a frozen teacher, then measures, plans and writes the results.

    lightning fit -c lightning_configs/digits.yaml

Loss of a pair of neighbouring steps (arXiv 2409.18523): the error of eps when every token is the superposition of computing and
reusing. It is divided by the error of reusing everything, which varies by orders of magnitude along the trajectory: each pair
then says what share of the damage of reuse is left (0 at w = 1, 1 at w = 0), and every step counts. Alone, this loss is least
at w = 1: the mean of w over all steps, blocks and tokens is held at `target_share` by an augmented Lagrangian.

Shape suffixes: B images, C H W latent, T steps, L blocks, N tokens.
"""

from __future__ import annotations

import math
from typing import Any, TypedDict

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from tc_lightning.cache import BlockCache
from tc_lightning.costs import block_macs, full_step_macs
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import RunError, TeacherError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, teacher_digest
from tc_lightning.models.dit import DiT
from tc_lightning.plan import Guidance
from tc_lightning.policies.base import Policy
from tc_lightning.policies.tprr import TPRRPolicy
from tc_lightning.predictor import CachePredictor
from tc_lightning.sampling import model_signature
from tc_lightning.scores import sampler_digest
from tc_lightning.superposition import mixed_eps, record_caches, reused_eps
from tc_lightning.training.planning import PlanningJob

FLOOR = 1e-12  # mean squared eps below which reuse does no damage worth dividing by


class PairBatch(TypedDict):
    """Neighbouring steps of recorded trajectories; steps may differ within a batch."""

    x_prev: Tensor  # [B, C, H, W] latents of step - 1
    x: Tensor  # [B, C, H, W] latents of step
    eps: Tensor  # [B, C, H, W] guided eps of step at full compute
    label: Tensor  # [B]
    step: Tensor  # [B] 1 to T - 1
    index: Tensor  # [B] which trajectory


class TokenCacheDistiller(LightningModule):
    """Trains the Cache Predictor; at the end of `fit` the run's folder holds scores, figures, candidates and `plan.json`.

    Args:
        teacher: which teacher to load; it stays frozen, out of the optimiser and out of the checkpoint.
        sampler: ddim, dpmpp_2m or dpmpp_3m (trajectories are recorded, which takes a sampler that adds no noise).
        num_steps: sampling steps.
        spacing: uniform, leading, trailing, quadratic or logsnr.
        guidance_scale: classifier-free guidance; 1 switches it off.
        guidance_channels: guided latent channels, the first ones; None for all (the original DiT release guides 3 of 4).
        policy: what turns scores into a plan; None for Two-Phase Round-Robin.
        predictor_hidden_size: width of the predictor.
        lr: peak learning rate of Adam, annealed to a tenth by a cosine.
        target_share: mean of w over steps, blocks and tokens that training holds.
        budget_rate: step of the multiplier's dual ascent, for each optimiser step.
        budget_penalty: weight of the squared distance from `target_share`.
        sensitivity_samples: trajectories over which sensitivities are averaged.
        sensitivity_probes: random probes for each step of these.

    Raises:
        TeacherError: if the teacher cannot be loaded.
        TokenCacheError: if the sampler, its spacing, or a number is out of range.
    """

    def __init__(
        self,
        teacher: TeacherSpec,
        sampler: str = "ddim",
        num_steps: int = 50,
        spacing: str = "uniform",
        guidance_scale: float = 1.5,
        guidance_channels: int | None = None,
        policy: Policy | None = None,
        predictor_hidden_size: int = 64,
        lr: float = 1e-2,
        target_share: float = 0.5,
        budget_rate: float = 0.1,
        budget_penalty: float = 10.0,
        sensitivity_samples: int = 16,
        sensitivity_probes: int = 4,
    ) -> None:
        super().__init__()
        if num_steps < 2:
            raise RunError(f"num_steps is {num_steps}: with fewer than 2 there is nothing to reuse.")
        if not 0.0 < target_share < 1.0:
            raise RunError(f"target_share is {target_share:g}; it must lie between 0 and 1.")
        if min(sensitivity_samples, sensitivity_probes) < 1:
            raise RunError("sensitivity_samples and sensitivity_probes must be at least 1.")
        if not (lr > 0.0 and math.isfinite(lr)):
            raise RunError(f"lr is {lr:g}; it must be above 0.")
        self.teacher: DiT
        object.__setattr__(self, "teacher", load_teacher(teacher))  # past nn.Module: not a submodule
        c = self.teacher.config
        self.teacher_spec, self.teacher_digest = teacher, teacher_digest(self.teacher)
        self.signature = model_signature(self.teacher, self.teacher_digest)
        self.sampler = make_sampler(sampler, num_steps, spacing)
        self.guidance = Guidance(guidance_scale, c.in_channels if guidance_channels is None else guidance_channels)
        _check_guidance(self.guidance, c.in_channels)
        self.policy = policy or TPRRPolicy()
        self.lr, self.target_share = lr, target_share
        self.budget_rate, self.budget_penalty = budget_rate, budget_penalty
        self.sensitivity_samples, self.sensitivity_probes = sensitivity_samples, sensitivity_probes
        self.predictor = CachePredictor(c.depth, c.num_tokens, predictor_hidden_size)
        self.multiplier: Tensor
        self.register_buffer("multiplier", torch.zeros(()))
        self.times: Tensor
        self.register_buffer("times", torch.tensor([s.t for s in self.sampler.steps]), persistent=False)
        self._excess = torch.zeros(())

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Relative distillation error plus the budget's Lagrangian."""
        w_TLN = self.predictor(self.times[1:])  # all steps, so that the mean, and the multiplier, are the same on every rank
        caches = self._caches(batch)
        error_B = self._error(batch, caches, w_TLN[batch["step"] - 1])
        reuse_B = self._reuse_error(batch, caches)
        distil = (error_B / reuse_B.clamp(min=FLOOR)).mean()
        excess = w_TLN.mean() - self.target_share
        self._excess = excess.detach()
        loss = distil + self.multiplier * excess + 0.5 * self.budget_penalty * excess.square()
        self._log_training(loss.detach(), distil.detach(), error_B.detach().mean(), w_TLN.detach().mean())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Dual ascent on the budget's multiplier, once for each optimiser step."""
        self.multiplier += self.budget_rate * self._excess

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Error when the most important tokens of each block, `target_share` of them, are recomputed and the others reused."""
        self._log_hard_error(batch, "val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """As in validation."""
        self._log_hard_error(batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over the predictor alone, with a cosine to a tenth of the rate."""
        optimiser = torch.optim.Adam(self.predictor.parameters(), self.lr)
        total = float(self.trainer.estimated_stepping_batches)  # infinite if nothing ends the run

        def factor(step: int) -> float:
            return 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / max(1.0, total)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Move the teacher, which Lightning does not know of.

        Raises:
            RunError: if the data cannot tell what planning will need at the end.
            PlanError: if the policy could not reach its target, whatever the scores.
        """
        self.policy.check(self.signature, self.sampler)
        missing = [n for n in ("heldout", "train_endpoints") if not hasattr(self.trainer.datamodule, n)]  # type: ignore[attr-defined]
        if missing and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise RunError(
                f"planning needs trajectories: use data.trajectory_module.TrajectoryDataModule, or one that has {', '.join(missing)}."
            )
        self.teacher.to(self.device)

    def on_validation_start(self) -> None:
        """See `on_fit_start`."""
        self.teacher.to(self.device)

    def on_test_start(self) -> None:
        """See `on_fit_start`."""
        self.teacher.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name what the predictor was trained for."""
        checkpoint["teacher_digest"], checkpoint["sampler_digest"] = self.teacher_digest, sampler_digest(self.sampler)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a predictor that was trained for something else.

        Raises:
            TeacherError: if the teacher is another one.
            RunError: if the sampler is.
        """
        if (theirs := checkpoint.get("teacher_digest")) != self.teacher_digest:
            raise TeacherError(
                f"the checkpoint was trained against the teacher {theirs}, and the configured one is {self.teacher_digest}. "
                "Set `model.teacher` to the former, or start a new run without `--ckpt_path`."
            )
        if (theirs := checkpoint.get("sampler_digest")) != (ours := sampler_digest(self.sampler)):
            raise RunError(
                f"the checkpoint was trained for the sampler {theirs}, and the configured one is {ours}. "
                "Restore sampler, num_steps and spacing, or start a new run without `--ckpt_path`."
            )

        shapes = {name: value.shape for name, value in self.state_dict().items()}
        if {name: value.shape for name, value in checkpoint["state_dict"].items()} != shapes:
            raise RunError("the checkpoint holds a predictor of another size: restore predictor_hidden_size, or start a new run.")

    def on_fit_end(self) -> None:
        """Measure sensitivities on all ranks, then plan and write on rank 0.

        Lightning calls this after the last checkpoint and the last collective of its own, and also when a run that had already
        finished is resumed: a plan lost to an interruption is made by the same command with `--ckpt_path last`.
        """
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            PlanningJob(self).run()

    def _caches(self, batch: PairBatch) -> list[BlockCache]:
        return record_caches(self.teacher, self.guidance, batch["x_prev"], self.times[batch["step"] - 1], batch["label"])

    def _error(self, batch: PairBatch, caches: list[BlockCache], w_BLN: Tensor) -> Tensor:
        """Mean squared error of eps with importances w, by image."""
        t_B = self.times[batch["step"]]
        eps = mixed_eps(self.teacher, self.guidance, caches, batch["x"], t_B, batch["label"], w_BLN)
        return (eps - batch["eps"]).square().flatten(1).mean(1)

    def _reuse_error(self, batch: PairBatch, caches: list[BlockCache]) -> Tensor:
        """The same with everything reused."""
        eps = reused_eps(self.teacher, self.guidance, caches, batch["x"], self.times[batch["step"]], batch["label"])
        return (eps - batch["eps"]).square().flatten(1).mean(1)

    def _log_training(self, loss: Tensor, distil: Tensor, mse: Tensor, mean_w: Tensor) -> None:
        full, blocks = full_step_macs(self.signature), self.signature.depth * block_macs(self.signature, self.signature.tokens)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/distil_relative", distil)
        self.log("train/distil_mse", mse, prog_bar=True)
        self.log("train/mean_w", mean_w, prog_bar=True)
        self.log("train/macs_share", 1 - (1 - mean_w) * blocks / full)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]

    def _log_hard_error(self, batch: PairBatch, stage: str) -> None:
        w_TLN, caches = self.predictor(self.times[1:]), self._caches(batch)
        keep = max(1, round(self.target_share * w_TLN.shape[-1]))
        hard_TLN = torch.zeros_like(w_TLN).scatter_(-1, w_TLN.topk(keep, dim=-1).indices, 1.0)
        error_B = self._error(batch, caches, hard_TLN[batch["step"] - 1])
        size = len(error_B)
        self.log(f"{stage}/distil_mse", error_B.mean(), prog_bar=True, sync_dist=True, batch_size=size)
        self.log(f"{stage}/reuse_mse", self._reuse_error(batch, caches).mean(), sync_dist=True, batch_size=size)


def _check_guidance(guidance: Guidance, in_channels: int) -> None:
    """Refuse what no plan could hold, before hours of training.

    Raises:
        RunError: naming the setting.
    """
    if not math.isfinite(guidance.scale):
        raise RunError(f"guidance_scale is {guidance.scale}; it must be a finite number (1 switches guidance off).")
    least = 1 if guidance.doubles_batch else 0
    if not least <= guidance.channels <= in_channels:
        raise RunError(f"guidance_channels is {guidance.channels}; the teacher has {in_channels}: choose {least} to {in_channels}.")
