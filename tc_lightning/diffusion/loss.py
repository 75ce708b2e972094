"""Training losses, one for each kind of schedule: the network's output against what it is to predict, at random times.

Shape suffixes: B batch, C channels, H W image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tc_lightning.diffusion.flow import Flow
from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import TokenCacheError

Times = Literal["uniform", "logit_normal"]


class DiffusionLoss(ABC):
    """Mean squared error of what a network predicts, in its first C channels, at given times."""

    @abstractmethod
    def draw(self, count: int, device: torch.device) -> Tensor:
        """Random times [count] to train at, in the network's units."""

    @abstractmethod
    def spread(self, count: int, device: torch.device) -> Tensor:
        """Evenly spread times [count] to validate at."""

    @abstractmethod
    def __call__(self, model: nn.Module, x0_BCHW: Tensor, given: Any, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Mean loss of a batch, whose conditions are `given` as the network takes them."""


def training_loss(schedule: Schedule, times: Times = "uniform") -> DiffusionLoss:
    """The loss that belongs to a schedule.

    Args:
        schedule: the network's.
        times: how times are drawn; `logit_normal` is for flows.

    Raises:
        TokenCacheError: if there is no such loss.
    """
    if isinstance(schedule, Flow):
        return VelocityLoss(schedule, times)
    if isinstance(schedule, LinearBetas) and times == "uniform":
        return StepLoss(schedule)
    raise TokenCacheError(f"no loss draws {times} times for {schedule}: set `times` to uniform.")


class VelocityLoss(DiffusionLoss):
    """Flow matching: velocity at times between noise and data (Lipman et al., arXiv 2210.02747; "linear" and "velocity" of SiT).

    Args:
        schedule: a flow.
        times: uniform, or logit-normal: a sigmoid of a standard normal (Esser et al., arXiv 2403.03206).

    Raises:
        TokenCacheError: if there are no such times.
    """

    def __init__(self, schedule: Flow, times: Times = "uniform") -> None:
        if times not in ("uniform", "logit_normal"):
            raise TokenCacheError(f"unknown times {times!r}: choose uniform or logit_normal.")
        self.schedule, self.times = schedule, times

    def draw(self, count: int, device: torch.device) -> Tensor:
        """See `DiffusionLoss`."""
        uniform = self.times == "uniform"
        return self._at(torch.rand(count, device=device) if uniform else torch.randn(count, device=device).sigmoid())

    def spread(self, count: int, device: torch.device) -> Tensor:
        """See `DiffusionLoss`: the middles of as many parts."""
        return self._at((torch.arange(count, device=device) + 0.5) / count)

    def __call__(self, model: nn.Module, x0_BCHW: Tensor, given: Any, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """See `DiffusionLoss`."""
        noise_at, data_at = self.schedule.span
        sigma = ((data_at - t_B) / (data_at - noise_at)).view(-1, 1, 1, 1)
        of_x0, of_noise = self.schedule.mixture(0.5, 0.5)  # the same at all times
        out = model((1 - sigma) * x0_BCHW + sigma * noise_BCHW, t_B, given)
        return (out[:, : x0_BCHW.shape[1]] - (of_x0 * x0_BCHW + of_noise * noise_BCHW)).square().mean()

    def _at(self, share_B: Tensor) -> Tensor:
        """Times after these shares of the way from noise to data."""
        noise_at, data_at = self.schedule.span
        return noise_at + share_B * (data_at - noise_at)


class StepLoss(DiffusionLoss):
    """Noise prediction (or v) at integer training steps, with the variational term in bits when the variance is learned.

    Nichol and Dhariwal, arXiv 2102.09672: L_simple + L_vlb, the latter through the variance alone (the mean is detached).
    """

    def __init__(self, schedule: LinearBetas) -> None:
        self.schedule = schedule
        cumprod = torch.from_numpy(schedule.alphas_cumprod)
        previous = torch.cat([torch.ones(1, dtype=cumprod.dtype), cumprod[:-1]])
        beta = 1 - cumprod / previous
        posterior = beta * (1 - previous) / (1 - cumprod)
        # The posterior variance is 0 at t = 0; its log is clipped to that of t = 1, as in the reference code.
        self.log_posterior = torch.cat([posterior[1:2], posterior[1:]]).log().float()
        self.log_beta = beta.log().float()
        self.to_x0 = (previous.sqrt() * beta / (1 - cumprod)).float()
        self.to_xt = ((1 - beta).sqrt() * (1 - previous) / (1 - cumprod)).float()
        self.alpha, self.sigma = cumprod.sqrt().float(), (1 - cumprod).sqrt().float()

    def draw(self, count: int, device: torch.device) -> Tensor:
        """See `DiffusionLoss`."""
        return torch.randint(0, self.schedule.num_train_steps, (count,), device=device)

    def spread(self, count: int, device: torch.device) -> Tensor:
        """See `DiffusionLoss`."""
        return torch.linspace(0, self.schedule.num_train_steps - 1, count).long().to(device)

    def __call__(self, model: nn.Module, x0_BCHW: Tensor, given: Any, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """See `DiffusionLoss`; times are integers."""
        alpha, sigma = self._at(self.alpha, t_B, x0_BCHW), self._at(self.sigma, t_B, x0_BCHW)
        xt_BCHW = alpha * x0_BCHW + sigma * noise_BCHW
        out = model(xt_BCHW, t_B, given)
        C = x0_BCHW.shape[1]
        told = out[:, :C]
        wanted = noise_BCHW if self.schedule.predicts == "eps" else alpha * noise_BCHW - sigma * x0_BCHW
        loss = (told - wanted).square().mean()
        if out.shape[1] == 2 * C:
            eps = told if self.schedule.predicts == "eps" else sigma * xt_BCHW + alpha * told
            loss = loss + self._variational(out[:, C:], eps.detach(), x0_BCHW, xt_BCHW, t_B).mean()
        return loss

    def _variational(self, v: Tensor, eps: Tensor, x0: Tensor, xt: Tensor, t_B: Tensor) -> Tensor:
        """KL of the true posterior from the model's (t > 0), or the decoder's NLL (t = 0), in bits per dimension, [B, C, H, W]."""
        low, high = self._at(self.log_posterior, t_B, x0), self._at(self.log_beta, t_B, x0)
        log_var = low + (v + 1) / 2 * (high - low)
        to_x0, to_xt = self._at(self.to_x0, t_B, x0), self._at(self.to_xt, t_B, x0)
        x0_hat = (xt - self._at(self.sigma, t_B, x0) * eps) / self._at(self.alpha, t_B, x0)
        gap = to_x0 * (x0 - x0_hat)  # both means carry the same multiple of x_t
        kl = 0.5 * (log_var - low + torch.exp(low - log_var) + gap.square() * torch.exp(-log_var) - 1.0)
        nll = _discretised_gaussian_nll(x0, to_x0 * x0_hat + to_xt * xt, 0.5 * log_var)
        return torch.where(t_B.view(-1, 1, 1, 1) == 0, nll, kl) / math.log(2.0)

    @staticmethod
    def _at(table: Tensor, t_B: Tensor, like: Tensor) -> Tensor:
        return table.to(like.device)[t_B].view(-1, 1, 1, 1)


def _discretised_gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log-likelihood of images in [-1, 1] quantised to 256 levels."""
    inverse = torch.exp(-log_scale)
    upper = torch.special.ndtr((x - mean + 1 / 255) * inverse)
    lower = torch.special.ndtr((x - mean - 1 / 255) * inverse)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -mass.clamp(min=1e-12).log()
