"""The forward process: x_t = alpha_t x_0 + sigma_t eps, with the linear beta schedule of DiT (Ho et al., arXiv 2006.11239)."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from tc_lightning.errors import TokenCacheError

SPACINGS = ("uniform", "leading", "trailing", "quadratic", "logsnr")
MIX = "mix:"  # then a number: between logsnr (0) and quadratic (1)


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Linear beta schedule.

    Args:
        num_train_steps: diffusion steps in training.
        beta_start: first beta.
        beta_end: last beta.
    """

    num_train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Product of 1 - beta, [num_train_steps], float64."""
        return np.cumprod(1.0 - np.linspace(self.beta_start, self.beta_end, self.num_train_steps, dtype=np.float64))

    @functools.cached_property
    def log_ratio(self) -> np.ndarray:
        """log(sigma / alpha) at each training step; minus half the log-SNR."""
        return 0.5 * (np.log1p(-self.alphas_cumprod) - np.log(self.alphas_cumprod))

    def alpha_sigma(self, t: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma at (fractional) times; log(sigma / alpha) is interpolated linearly between training steps."""
        ratio = np.exp(np.interp(t, np.arange(self.num_train_steps), self.log_ratio))
        alpha = 1.0 / np.sqrt(1.0 + ratio**2)
        return alpha, ratio * alpha

    def timesteps(self, spacing: str, num_steps: int) -> np.ndarray:
        """Sampling times, noisiest first, [num_steps] float64.

        uniform: evenly from the last training step to 0, rounded (respacing of the DiT release). leading, trailing: stride
        num_train / num_steps, as in diffusers. quadratic: evenly in sqrt(t). logsnr: evenly in log-SNR (Lu et al., arXiv 2206.00927).
        mix:W, for example mix:0.5: W quadratic and 1 - W logsnr, time by time.

        Raises:
            TokenCacheError: if the spacing is unknown or the number of steps is out of range.
        """
        last = self.num_train_steps - 1
        if not 1 <= num_steps <= self.num_train_steps:
            raise TokenCacheError(f"{num_steps} sampling steps asked for: choose 1 to {self.num_train_steps}.")
        if spacing.startswith(MIX):
            share = _share(spacing)
            return share * self.timesteps("quadratic", num_steps) + (1 - share) * self.timesteps("logsnr", num_steps)
        match spacing:
            case "uniform":
                return np.linspace(0, last, num_steps).round()[::-1].copy() if num_steps > 1 else np.array([float(last)])
            case "leading":
                return (np.arange(num_steps) * (self.num_train_steps // num_steps))[::-1].astype(np.float64)
            case "trailing":
                # Not arange with a fractional stride: its rounding adds a step at t = -1 for some num_steps.
                return np.round(self.num_train_steps - np.arange(num_steps) * self.num_train_steps / num_steps) - 1.0
            case "quadratic":
                return np.linspace(np.sqrt(last), 0.0, num_steps) ** 2
            case "logsnr":
                targets = np.linspace(self.log_ratio[-1], self.log_ratio[0], num_steps)
                return np.interp(targets, self.log_ratio, np.arange(self.num_train_steps))
        raise _unknown(spacing)


def _share(spacing: str) -> float:
    """The number in `mix:W`."""
    try:
        share = float(spacing.removeprefix(MIX))
    except ValueError:
        raise _unknown(spacing) from None
    if not 0.0 <= share <= 1.0:
        raise _unknown(spacing)
    return share


def _unknown(spacing: str) -> TokenCacheError:
    return TokenCacheError(f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}, or {MIX}W with W from 0 to 1.")
