"""How far a plan's images are from those of full compute, on noise that was not trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.models.companions import NO_COMPANIONS, Companions
from tc_lightning.models.conditions import Asked, given_of, require_given
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.rollout.sampling import device_of, sample_steps

BATCH = 16  # images a forward; guidance doubles them

OnStep = Callable[[int], object]


def final_latents(
    model: Network,
    plan: CachePlan,
    x_T: Tensor,
    asked: Asked,
    companions: Companions = NO_COMPANIONS,
    batch: int = BATCH,
    on_step: OnStep = lambda _: None,
) -> Tensor:
    """Final latents of a plan, [B, C, H, W] where the noise is, so many images at a time on the model's device.

    Args:
        model: the teacher.
        plan: a plan whose sampler adds no noise.
        x_T: initial noise [B, C, H, W].
        asked: conditions of each image; of a class-conditional model its labels [B] will do.
        companions: the networks that the plan names, on the model's device.
        batch: images at a time.
        on_step: called after each step with the number of images that went through it.

    Raises:
        TokenCacheError: if a condition cannot be what it is, or the latents become NaN.
        PlanError: if the plan is for another model, or names a network that is not among the companions.
    """
    device, parts = device_of(model), []
    for x, y in zip(x_T.split(batch), given_of(model.conditions, asked).split(batch), strict=True):
        made = x.to(device)
        for state in sample_steps(model, plan, made, y.to(device), companions=companions):
            made = state.x_next
            on_step(len(x))
        parts.append(made.to(x_T.device))
    return torch.cat(parts)


class RolloutEvaluator:
    """Error of a plan's final latents against given ones, over whole trajectories from noise.

    Images may be on another device than the model: each batch goes to the model's, and errors come back to theirs.

    Args:
        model: the teacher.
        x_T: initial noise [B, C, H, W].
        asked: conditions of each image; of a class-conditional model its labels [B] will do.
        x_0: final latents of full compute from that noise [B, C, H, W].
        companions: the networks that plans may name, on the model's device.

    Raises:
        TokenCacheError: if the numbers of images differ or are zero, a label is out of range, or `x_0` is not finite.
    """

    def __init__(self, model: Network, x_T: Tensor, asked: Asked, x_0: Tensor, companions: Companions = NO_COMPANIONS) -> None:
        given = given_of(model.conditions, asked)
        if not len(x_T) or x_T.shape != x_0.shape or given.images != len(x_T):
            raise TokenCacheError(
                f"cannot evaluate: noise {tuple(x_T.shape)}, conditions of {given.images} images and final latents "
                f"{tuple(x_0.shape)} must belong to the same images, at least one."
            )
        if not torch.isfinite(x_0).all():
            raise TokenCacheError("cannot evaluate: the final latents of full compute hold NaN or infinite values.")
        require_given(model.conditions, given)
        self.model, self.x_T, self.given, self.x_0, self.companions = model, x_T, given, x_0, companions

    def __call__(self, plan: CachePlan, num_images: int | None = None) -> float:
        """Mean squared error over the first images (None, or more than there are: all); infinite if the plan diverges."""
        num_images = None if num_images is not None and num_images > len(self.x_T) else num_images
        return float(self.mse_per_image(plan, num_images).mean())

    def mse_per_image(self, plan: CachePlan, num_images: int | None = None) -> Tensor:
        """Mean squared error of each of the first images, [B]; all infinite if the latents of any become NaN or infinite.

        Raises:
            TokenCacheError: if the number of images is out of range, or the sampler is stochastic.
            PlanError: if the plan is for another model, or names a network that is not among the companions.
        """
        count = len(self.x_T) if num_images is None else num_images
        if not 1 <= count <= len(self.x_T):
            raise TokenCacheError(f"cannot evaluate on {count} images: choose 1 to {len(self.x_T)}, what was recorded.")
        if plan.sampler.stochastic:
            raise TokenCacheError(f"cannot compare trajectories of {plan.sampler.name}: it adds noise, use a deterministic sampler.")
        batches = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
        try:
            return torch.cat([self._batch(plan, batch) for batch in batches])
        except PlanError:
            raise
        except TokenCacheError:  # inputs were checked above: what is left is a trajectory that diverged
            return torch.full((count,), torch.inf)

    def _batch(self, plan: CachePlan, images: range) -> Tensor:
        part = slice(images.start, images.stop)
        x = final_latents(self.model, plan, self.x_T[part], self.given.part(part), self.companions).to(self.x_0.device)
        return (x - self.x_0[part]).square().flatten(1).mean(1)
