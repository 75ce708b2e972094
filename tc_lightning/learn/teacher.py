"""Training a network from scratch: what makes the teacher that ships with the package, and any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from tc_lightning.diffusion.loss import Times, training_loss
from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints import save_teacher
from tc_lightning.models.conditions import Asked, Given, given_of
from tc_lightning.models.dit import DiTConfig
from tc_lightning.models.families import build, shaped_as_dit
from tc_lightning.plan.given import checked
from tc_lightning.plan.nulls import checked_stored
from tc_lightning.plan.rows_file import write_arrays

Batch = tuple[Tensor, Asked]  # images, and their conditions


class TeacherModule(LightningModule):
    """Training of what the network's schedule says that it predicts, with null conditions now and then for classifier-free guidance.

    Its data may have `num_classes`, which are compared with the model's; `examples`, rows of conditions that cannot be drawn; and
    `nulls`, the null values that the model is to store.

    Args:
        dit: shape of the model, of a family that has a DiT's.
        lr: peak learning rate of AdamW, reached after `warmup_steps` and annealed to zero by a cosine.
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: AdamW's weight decay.
        condition_dropout: share of images whose conditions are replaced by their null values.
        family: which network (`tc_lightning.models.families`).
        times: at which times a flow is trained: uniform or logit_normal.
        shape: shape of the model by the names of its fields, of any family, in place of `dit`.

    Raises:
        TeacherError: if conditions are to be dropped and one has no null value, there is no such family or shape, or there are two
            shapes or none.
        TokenCacheError: if its schedule is not trained at such times.
    """

    def __init__(
        self,
        dit: DiTConfig | None = None,
        lr: float = 1e-3,
        warmup_steps: int = 200,
        weight_decay: float = 0.0,
        condition_dropout: float = 0.1,
        family: str = "dit",
        times: Times = "uniform",
        shape: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (dit is None) == (shape is None):
            raise TeacherError("the model needs one shape: set either `dit` or, for a family with a shape of its own, `shape`.")
        self.model = build(family, shape) if shape is not None else shaped_as_dit(family)(dit)  # type: ignore[arg-type]
        if condition_dropout and (lacking := [c.name for c in self.model.conditions if c.null is None]):
            raise TeacherError(
                f"condition_dropout is {condition_dropout:g}, and the model has no null {', '.join(lacking)}: set it to 0, "
                "or, of labels, `null_label` of the shape to true."
            )
        self.loss = training_loss(self.model.schedule, times)
        self.lr, self.warmup_steps, self.weight_decay, self.condition_dropout = lr, warmup_steps, weight_decay, condition_dropout

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step on images [B, C, S, S] in [-1, 1] and their conditions by name, [B, ...] each, or labels [B]."""
        x, given = self._taken(batch)
        dropped = torch.rand(len(x), device=x.device) < self.condition_dropout
        t = self.loss.draw(len(x), x.device)
        loss = self.loss(self.model, x, self._with_nulls(given, dropped), t, torch.randn_like(x))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _with_nulls(self, given: Given, dropped_B: Tensor) -> Given:
        """The conditions, of some images the null values."""
        if not self.condition_dropout:
            return given
        nulls = given.with_nulls(self.model.conditions, self.model.nulls).part(slice(len(dropped_B), None))
        return Given({name: torch.where(dropped_B.view(-1, *[1] * (own.ndim - 1)), nulls[name], own) for name, own in given.items()})

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss at evenly spread times with fixed noise, so that epochs can be compared."""
        self.log("val/loss", self._fixed_loss(batch, batch_idx), prog_bar=True, sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation."""
        self.log("test/loss", self._fixed_loss(batch, batch_idx), sync_dist=True)

    def _fixed_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        x, given = self._taken(batch)
        t = self.loss.spread(len(x), x.device)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(batch_idx)).to(x)
        return self.loss(self.model, x, given, t, noise)

    def setup(self, stage: str) -> None:
        """Take from the data what the model stores, and compare the two.

        Raises:
            TeacherError: if the data has more classes than the model: the first one too many would be taken for the null label.
            TokenCacheError: if its conditions are not the model's.
        """
        data, conditions = self.trainer.datamodule, self.model.conditions  # type: ignore[attr-defined]
        classes, ours = getattr(data, "num_classes", None), sum(c.classes for c in conditions)
        if classes is not None and ours and classes > ours:
            raise TeacherError(
                f"the data has {classes} classes, the model {ours}: set `num_classes` of the model's shape to {classes}."
            )
        examples, nulls = getattr(data, "examples", None), getattr(data, "nulls", None)
        self.model.examples = None if examples is None else checked(conditions, examples)
        self.model.nulls = None if nulls is None else checked_stored(conditions, nulls)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine decay over the whole run."""
        optimiser = torch.optim.AdamW(self.model.parameters(), self.lr, weight_decay=self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _taken(self, batch: Batch) -> tuple[Tensor, Given]:
        """Images and conditions of a batch that is the model's."""
        x_BCHW, asked = batch
        c = self.model.config
        if x_BCHW.shape[1:] != (expected := (c.in_channels, c.input_size, c.input_size)):
            raise TeacherError(
                f"images are {tuple(x_BCHW.shape[1:])}, and the model takes {expected}: make `data.init_args` (size, grayscale) and "
                "the model's shape (input_size, in_channels) agree."
            )
        return x_BCHW, given_of(self.model.conditions, asked)

    def on_fit_end(self) -> None:
        """Write the (averaged) weights as `teacher.safetensors` in the run's folder, and examples of conditions as `conditions.npz`."""
        folder = self.trainer.log_dir or self.trainer.default_root_dir  # asks all ranks
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_teacher(self.model, Path(folder) / "teacher.safetensors")
            print(f"wrote {Path(folder) / 'teacher.safetensors'}")
            if self.model.examples is not None:
                write_arrays(Path(folder) / "conditions.npz", self.model.examples)
                print(f"wrote {Path(folder) / 'conditions.npz'}")
