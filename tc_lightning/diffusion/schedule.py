"""What a network's diffusion is: how noise and data are mixed at a time, how time is counted, and what the network's output says.

    x_t = alpha_t x_0 + sigma_t eps          out = p_t x_0 + q_t eps

Noise with betas that rise linearly is in `tc_lightning.diffusion.linear_betas`, straight paths are in `tc_lightning.diffusion.flow`.
Times are the network's own: whatever a schedule says of a time, and all that a sampler table holds, is in the units that the network
is given, and may fall or rise along a run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import numpy as np

from tc_lightning.errors import TokenCacheError

MIX = "mix:"  # then a number: between logsnr (0) and quadratic (1)

# noise; alpha eps - sigma x_0; how x_t moves along a straight path
Prediction = Literal["eps", "v", "velocity"]


class Linear(NamedTuple):
    """Weights of the latents and of the network's output in a sum of both."""

    of_x: float
    of_output: float


class Schedule(ABC):
    """Forward process of a network. A run goes from its noisiest time to data, whichever way time is counted."""

    predicts: Prediction
    spacings: tuple[str, ...]  # those that need no number

    @property
    @abstractmethod
    def span(self) -> tuple[float, float]:
        """First and last time that the network knows, noisiest first."""

    @property
    @abstractmethod
    def most_steps(self) -> int:
        """The longest run that there are times for."""

    @abstractmethod
    def alpha_sigma(self, t: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma at times."""

    @abstractmethod
    def smooth(self, t: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """A coordinate of times that falls along a run, and a scale: latents over the scale are smooth in the coordinate.

        Both are finite at every time of `span`.
        """

    @abstractmethod
    def mixture(self, alpha: float, sigma: float) -> tuple[float, float]:
        """p and q of the module's equations."""

    @abstractmethod
    def clock(self, t: float) -> float:
        """A time as predictors of importance see it: in training steps, or as if there were 1,000 of them, with data at 0.

        Their embedding of time is DiT's, which would hardly tell times between 0 and 1 apart.
        """

    def log_ratio(self, t: np.ndarray | float) -> np.ndarray:
        """log(sigma / alpha), minus half the log-SNR: it falls along a run, from infinity where there is no data in x_t."""
        alpha, sigma = self.alpha_sigma(t)
        with np.errstate(divide="ignore"):
            return np.log(sigma) - np.log(alpha)

    def x0(self, alpha: float, sigma: float) -> Linear:
        """The data that latents and output tell of."""
        p, q = self.mixture(alpha, sigma)
        determinant = alpha * q - sigma * p
        return Linear(q / determinant, -sigma / determinant)

    def eps(self, alpha: float, sigma: float) -> Linear:
        """The noise that latents and output tell of."""
        p, q = self.mixture(alpha, sigma)
        determinant = alpha * q - sigma * p
        return Linear((0.0 - p) / determinant, alpha / determinant)

    def timesteps(self, spacing: str, num_steps: int) -> np.ndarray:
        """Sampling times, noisiest first, [num_steps] float64.

        mix:W, for example mix:0.5, is W quadratic and 1 - W logsnr, time by time; other spacings are the schedule's own.

        Raises:
            TokenCacheError: if the spacing is unknown or the number of steps is out of range.
        """
        if not 1 <= num_steps <= self.most_steps:
            raise TokenCacheError(f"{num_steps} sampling steps asked for: choose 1 to {self.most_steps}.")
        if spacing.startswith(MIX):
            share = self._number(spacing, MIX)
            if not 0.0 <= share <= 1.0:
                raise self._unknown(spacing)
            return share * self.timesteps("quadratic", num_steps) + (1 - share) * self.timesteps("logsnr", num_steps)
        return self._spaced(spacing, num_steps)

    @abstractmethod
    def _spaced(self, spacing: str, num_steps: int) -> np.ndarray:
        """`timesteps` of the schedule's own spacings."""

    def _number(self, spacing: str, prefix: str) -> float:
        """The number after a spacing's name."""
        try:
            number = float(spacing.removeprefix(prefix))
        except ValueError:
            raise self._unknown(spacing) from None
        if not math.isfinite(number):
            raise self._unknown(spacing)
        return number

    def _unknown(self, spacing: str) -> TokenCacheError:
        return TokenCacheError(f"unknown spacing {spacing!r}: choose one of {', '.join(self.spacings)}, or {self._with_numbers}.")

    @property
    def _with_numbers(self) -> str:
        """Spacings that need a number, for a message."""
        return f"{MIX}W with W from 0 to 1"
