"""Training a network from scratch: what makes the teacher that ships with the package, and any other."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from tc_lightning.diffusion.loss import Times, training_loss
from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints import save_teacher
from tc_lightning.models.dit import DiTConfig
from tc_lightning.models.families import shaped_as_dit


class TeacherModule(LightningModule):
    """Training of what the network's schedule says that it predicts, with label dropout for classifier-free guidance.

    Args:
        dit: shape of the model.
        lr: peak learning rate of AdamW, reached after `warmup_steps` and annealed to zero by a cosine.
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: AdamW's weight decay.
        label_dropout: share of labels replaced by the null label.
        family: which network (`tc_lightning.models.families`).
        times: at which times a flow is trained: uniform or logit_normal.

    Raises:
        TeacherError: if labels are to be dropped and the shape has no null label, or there is no such family.
        TokenCacheError: if its schedule is not trained at such times.
    """

    def __init__(
        self,
        dit: DiTConfig,
        lr: float = 1e-3,
        warmup_steps: int = 200,
        weight_decay: float = 0.0,
        label_dropout: float = 0.1,
        family: str = "dit",
        times: Times = "uniform",
    ) -> None:
        super().__init__()
        if label_dropout and not dit.null_label:
            raise TeacherError(
                f"label_dropout is {label_dropout:g}, and the model has no null label: set it to 0, or `dit.null_label` to true."
            )
        self.model = shaped_as_dit(family)(dit)
        self.loss = training_loss(self.model.schedule, times)
        self.lr, self.warmup_steps, self.weight_decay, self.label_dropout = lr, warmup_steps, weight_decay, label_dropout

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One step on (images [B, C, S, S] in [-1, 1], labels [B])."""
        x, y = batch
        self._check_images(x)
        dropped = torch.rand(len(y), device=y.device) < self.label_dropout
        t = self.loss.draw(len(y), y.device)
        y = torch.where(dropped, torch.full_like(y, self.model.config.num_classes), y)
        loss = self.loss(self.model, x, y, t, torch.randn_like(x))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss at evenly spread times with fixed noise, so that epochs can be compared."""
        self.log("val/loss", self._fixed_loss(batch, batch_idx), prog_bar=True, sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """As in validation."""
        self.log("test/loss", self._fixed_loss(batch, batch_idx), sync_dist=True)

    def _fixed_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self._check_images(x)
        t = self.loss.spread(len(y), y.device)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(batch_idx)).to(x)
        return self.loss(self.model, x, y, t, noise)

    def on_fit_start(self) -> None:
        """Compare the data with the model.

        Raises:
            TeacherError: if the data has more classes than the model: the first one too many would be taken for the null label.
        """
        classes, ours = getattr(self.trainer.datamodule, "num_classes", None), self.model.config.num_classes  # type: ignore[attr-defined]
        if classes is not None and classes > ours:
            raise TeacherError(f"the data has {classes} classes, the model {ours}: set `model.init_args.dit.num_classes` to {classes}.")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine decay over the whole run."""
        optimiser = torch.optim.AdamW(self.model.parameters(), self.lr, weight_decay=self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _check_images(self, x_BCHW: Tensor) -> None:
        c = self.model.config
        if x_BCHW.shape[1:] != (expected := (c.in_channels, c.input_size, c.input_size)):
            raise TeacherError(
                f"images are {tuple(x_BCHW.shape[1:])}, and the model takes {expected}: make `data.init_args` (size, grayscale) and "
                "`model.init_args.dit` (input_size, in_channels) agree."
            )

    def on_fit_end(self) -> None:
        """Write the (averaged) weights as `teacher.safetensors` in the run's folder."""
        folder = self.trainer.log_dir or self.trainer.default_root_dir  # asks all ranks
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_teacher(self.model, Path(folder) / "teacher.safetensors")
            print(f"wrote {Path(folder) / 'teacher.safetensors'}")
