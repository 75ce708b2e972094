"""Noise that keeps the variance, with betas that rise linearly: the forward process of DiT and PixArt (Ho et al., arXiv 2006.11239)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import TokenCacheError


@dataclasses.dataclass(frozen=True)
class LinearBetas(Schedule):
    """Linear beta schedule. Times are training steps, from the last one (noise) to 0; fractions are allowed.

    Args:
        num_train_steps: diffusion steps in training.
        beta_start: first beta.
        beta_end: last beta.
        predicts: eps, or v = alpha eps - sigma x_0 (Salimans and Ho, arXiv 2202.00512).

    Raises:
        TokenCacheError: if there are no such steps or betas, or no such prediction.
    """

    num_train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    predicts: Literal["eps", "v"] = "eps"

    spacings = ("uniform", "leading", "trailing", "quadratic", "logsnr")

    def __post_init__(self) -> None:
        if self.num_train_steps < 2 or not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise TokenCacheError(
                f"{self.num_train_steps} betas from {self.beta_start} to {self.beta_end} are no noise schedule: there are at least 2, "
                "above 0 and below 1, and they do not fall."
            )
        if self.predicts not in ("eps", "v"):
            raise TokenCacheError(f"a network of linear betas predicts {self.predicts!r}: eps or v was expected.")

    @property
    def span(self) -> tuple[float, float]:
        """See `Schedule`."""
        return float(self.num_train_steps - 1), 0.0

    @property
    def most_steps(self) -> int:
        """See `Schedule`."""
        return self.num_train_steps

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Product of 1 - beta, [num_train_steps], float64."""
        return np.cumprod(1.0 - np.linspace(self.beta_start, self.beta_end, self.num_train_steps, dtype=np.float64))

    @functools.cached_property
    def _log_ratios(self) -> np.ndarray:
        """log(sigma / alpha) at each training step."""
        return 0.5 * (np.log1p(-self.alphas_cumprod) - np.log(self.alphas_cumprod))

    def log_ratio(self, t: np.ndarray | float) -> np.ndarray:
        """See `Schedule`; linear between training steps."""
        return np.interp(t, np.arange(self.num_train_steps), self._log_ratios)

    def alpha_sigma(self, t: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """See `Schedule`."""
        ratio = np.exp(self.log_ratio(t))
        alpha = 1.0 / np.sqrt(1.0 + ratio**2)
        return alpha, ratio * alpha

    def smooth(self, t: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """See `Schedule`: x / alpha in log(sigma / alpha)."""
        return self.log_ratio(t), self.alpha_sigma(t)[0]

    def clock(self, t: float) -> float:
        """See `Schedule`."""
        return t

    def mixture(self, alpha: float, sigma: float) -> tuple[float, float]:
        """See `Schedule`."""
        return (0.0, 1.0) if self.predicts == "eps" else (-sigma, alpha)

    def _spaced(self, spacing: str, num_steps: int) -> np.ndarray:
        """uniform: evenly from the last training step to 0, rounded (respacing of the DiT release). leading, trailing: stride
        num_train / num_steps, as in diffusers; linspace: as its solvers have it, evenly from the last training step to one more time
        than there are steps, which is 0 and left out. quadratic: evenly in sqrt(t). logsnr: evenly in log-SNR (Lu et al., arXiv
        2206.00927).
        """
        last = self.num_train_steps - 1
        match spacing:
            case "uniform":
                return np.linspace(0, last, num_steps).round()[::-1].copy() if num_steps > 1 else np.array([float(last)])
            case "leading":
                return (np.arange(num_steps) * (self.num_train_steps // num_steps))[::-1].astype(np.float64)
            case "trailing":
                # Not arange with a fractional stride: its rounding adds a step at t = -1 for some num_steps.
                return np.round(self.num_train_steps - np.arange(num_steps) * self.num_train_steps / num_steps) - 1.0
            case "linspace":
                return np.linspace(0, last, num_steps + 1).round()[:0:-1].copy()
            case "quadratic":
                return np.linspace(np.sqrt(last), 0.0, num_steps) ** 2
            case "logsnr":
                targets = np.linspace(self._log_ratios[-1], self._log_ratios[0], num_steps)
                return np.interp(targets, self._log_ratios, np.arange(self.num_train_steps))
        raise self._unknown(spacing)

    @property
    def _with_numbers(self) -> str:
        return f"linspace (of diffusers' solvers), {super()._with_numbers}"
