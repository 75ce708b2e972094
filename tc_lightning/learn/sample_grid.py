"""A picture of what a teacher in training makes, at the end of every validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torchvision.utils import save_image

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.models.conditions import Given, drawn_given
from tc_lightning.models.network import Network
from tc_lightning.plan.guidance import Guidance
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample


class SampleGrid(Callback):
    """Writes `samples/step-NNNNNN.png` in the run's folder: one row a class or example of conditions, from the same noise every time.

    Args:
        images_per_row: columns of the grid.
        max_rows: rows of the grid.
        num_steps: DDIM steps.
        guidance_scale: guidance on all channels; 1 is taken of a model without null values.
    """

    def __init__(self, images_per_row: int = 8, max_rows: int = 10, num_steps: int = 25, guidance_scale: float = 1.5) -> None:
        self.images_per_row, self.max_rows = images_per_row, max_rows
        self.num_steps, self.guidance_scale = num_steps, guidance_scale

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After the last batch, while averaged weights (EMA) are still in place: they are swapped out before the epoch's end."""
        last = batch_idx + 1 == trainer.num_val_batches[dataloader_idx]
        if last and trainer.is_global_zero and trainer.log_dir and not trainer.sanity_checking:
            folder = Path(trainer.log_dir) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            images = self._sample(cast(Network, pl_module.model), pl_module.device)
            save_image(images, folder / f"step-{trainer.global_step:06d}.png", nrow=self.images_per_row, pad_value=1.0)

    def _sample(self, model: Network, device: torch.device) -> torch.Tensor:
        """Images in [0, 1]; of a latent model, the first three channels."""
        c = model.config
        given = self._rows(model, device)
        signature = model_signature(model, "in training")
        guided = all(condition.null is not None for condition in model.conditions)
        guidance = Guidance(self.guidance_scale if guided else 1.0, c.in_channels)
        plan = full_plan(signature, make_sampler(model.schedule, "ddim", self.num_steps), guidance)
        x = sample(model, plan, noise_for(0, range(given.images), model, device), given)
        return (x[:, : 1 if c.in_channels == 1 else 3].clamp(-1, 1) + 1).div(2).cpu()

    def _rows(self, model: Network, device: torch.device) -> Given:
        """Conditions of all images: the first classes, or examples."""
        table = model.examples or {c.name: np.arange(c.classes) for c in model.conditions if c.classes}
        most = min([self.max_rows, *map(len, table.values())])
        rows = np.arange(most).repeat(self.images_per_row)
        return drawn_given(model.conditions, 0, rows.tolist(), table, device)
