"""Training loss of a DiT: noise prediction, with the variational term when the variance is learned.

Nichol and Dhariwal, arXiv 2102.09672: L_simple + L_vlb, the latter through the variance alone (the mean is detached).
Shape suffixes: B batch, C channels, H W image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tc_lightning.diffusion.schedule import NoiseSchedule
from tc_lightning.models.network import Network


class DiffusionLoss:
    """Mean squared error of eps at a given time, plus the variational bound in bits when the model learns its variance."""

    def __init__(self, schedule: NoiseSchedule) -> None:
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

    def __call__(self, model: Network, x0_BCHW: Tensor, y_B: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Mean loss of a batch; `t_B` are integer training steps."""
        alpha, sigma = self._at(self.alpha, t_B, x0_BCHW), self._at(self.sigma, t_B, x0_BCHW)
        xt_BCHW = alpha * x0_BCHW + sigma * noise_BCHW
        out = model(xt_BCHW, t_B, y_B)
        C = x0_BCHW.shape[1]
        eps_BCHW = out[:, :C]
        loss = (eps_BCHW - noise_BCHW).square().mean()
        if out.shape[1] == 2 * C:
            loss = loss + self._variational(out[:, C:], eps_BCHW.detach(), x0_BCHW, xt_BCHW, t_B).mean()
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
