"""Straight paths from noise to data, whose velocity the network predicts (Lipman et al., arXiv 2210.02747; Liu et al., 2209.03003)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import TokenCacheError

SHIFT, SHIFT_TWICE = "shift:", "sd3:"  # then a number: how much longer a run stays in the noise
LOG_RATIO_END = 5.0  # log(sigma / alpha) between which `logsnr` spaces, as wide as linear betas of 1,000 steps have it
MOST_STEPS = 10_000
CLOCK = 1000.0


@dataclasses.dataclass(frozen=True)
class Flow(Schedule):
    """Linear path: sigma goes from 1 to 0 as time goes from `noise_at` to `data_at`, and alpha = 1 - sigma.

    Two conventions are common. SiT counts from noise at 0 to data at 1, and its network gives x_0 - eps; SD3 and Flux count from noise
    at 1,000 to data at 0, and theirs give eps - x_0. Both are how far x_t would move over the whole path while time *grows*, and
    that is what the network is taken to predict, whichever end the data are at.

    Args:
        noise_at: time, in the network's own units, at which x_t is noise.
        data_at: time at which it is data.
    """

    noise_at: float = 0.0
    data_at: float = 1.0

    predicts = "velocity"
    spacings = ("uniform", "quadratic", "logsnr", f"{SHIFT}3")

    def __post_init__(self) -> None:
        if not (np.isfinite([self.noise_at, self.data_at]).all() and self.noise_at != self.data_at):
            raise TokenCacheError(
                f"a flow from noise at {self.noise_at} to data at {self.data_at} has no length: set two finite times."
            )

    @property
    def span(self) -> tuple[float, float]:
        """See `Schedule`."""
        return self.noise_at, self.data_at

    @property
    def most_steps(self) -> int:
        """See `Schedule`."""
        return MOST_STEPS

    def alpha_sigma(self, t: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """See `Schedule`."""
        length = self.data_at - self.noise_at
        return (np.asarray(t, float) - self.noise_at) / length, (self.data_at - np.asarray(t, float)) / length

    def smooth(self, t: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """See `Schedule`: x itself in sigma; log(sigma / alpha) is infinite at the noisy end, and alpha 0."""
        _, sigma = self.alpha_sigma(t)
        return sigma, np.ones_like(sigma)

    def clock(self, t: float) -> float:
        """See `Schedule`."""
        return CLOCK * (self.data_at - t) / (self.data_at - self.noise_at)

    def mixture(self, alpha: float, sigma: float) -> tuple[float, float]:
        """See `Schedule`."""
        return (1.0, -1.0) if self.data_at > self.noise_at else (-1.0, 1.0)

    def _spaced(self, spacing: str, num_steps: int) -> np.ndarray:
        sigma = self._sigmas(spacing, num_steps)
        return self.data_at + sigma * (self.noise_at - self.data_at)

    def _sigmas(self, spacing: str, num_steps: int) -> np.ndarray:
        """Every spacing starts at noise, sigma = 1.

        uniform: evenly, to a step from data. quadratic: evenly in sqrt(sigma). logsnr: evenly in log-SNR between finite ends, of which
        the first is moved to noise. shift:S: uniform, then sigma S / (1 + (S - 1) sigma)
        (Esser et al., arXiv 2403.03206, eq. 23; 3 for SD3). sd3:S: what diffusers' scheduler makes of a number of steps, which is how
        its pipeline of SD3 asks it: evenly from noise to the last of 1,000 training steps, itself shifted; then all are shifted.
        """
        even = 1.0 - np.arange(num_steps) / num_steps
        match spacing:
            case "uniform":
                return even
            case "quadratic":
                return even**2
            case "logsnr":
                sigma = 1.0 / (1.0 + np.exp(-np.linspace(LOG_RATIO_END, -LOG_RATIO_END, num_steps)))
                sigma[0] = 1.0
                return sigma
        prefix = next((p for p in (SHIFT, SHIFT_TWICE) if spacing.startswith(p)), None)
        if prefix is None or not (shift := self._number(spacing, prefix)) > 0.0:
            raise self._unknown(spacing)
        if prefix == SHIFT_TWICE:
            even = np.linspace(1.0, _shifted(1.0 / CLOCK, shift), num_steps)
        return _shifted(even, shift)

    @property
    def _with_numbers(self) -> str:
        return f"{super()._with_numbers}, or {SHIFT}S or {SHIFT_TWICE}S with S above 0"


def _shifted(sigma: Any, shift: float) -> Any:
    """Noise levels, moved towards noise."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)
