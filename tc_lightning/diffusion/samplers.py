"""Samplers as coefficient tables. Each function returns a `SamplerTable`; the last step of each lands on x_0."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from tc_lightning.diffusion.schedule import NoiseSchedule
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.sampler_table import SamplerStep, SamplerTable

FEW_STEPS = 15  # below it DPM-Solver++ lowers its order before the end, too


def ddim(schedule: NoiseSchedule, num_steps: int, spacing: str = "uniform") -> SamplerTable:
    """Deterministic DDIM, eta = 0 (Song et al., arXiv 2010.02502, eq. 12)."""
    times, alpha, sigma = _path(schedule, num_steps, spacing)
    steps = []
    for i, t in enumerate(times):
        ratio = alpha[i + 1] / alpha[i]
        steps.append(SamplerStep(t, m_x=0.0, m_eps=1.0, next_x=ratio, next_m=sigma[i + 1] - ratio * sigma[i]))
    return SamplerTable("ddim", spacing, tuple(steps))


def dpmpp_2m(schedule: NoiseSchedule, num_steps: int, spacing: str = "logsnr") -> SamplerTable:
    """DPM-Solver++ 2M in data prediction, first order at both ends (Lu et al., arXiv 2211.01095, algorithm 2)."""
    times, alpha, sigma = _path(schedule, num_steps, spacing)
    lam = (np.log(alpha[:-1]) - np.log(sigma[:-1])).tolist()
    steps = []
    for i, t in enumerate(times):
        m_x, m_eps = 1.0 / alpha[i], -sigma[i] / alpha[i]
        if i == len(times) - 1:  # sigma is 0 there, h infinite: the step is x_0 itself
            steps.append(SamplerStep(t, m_x, m_eps, next_x=0.0, next_m=1.0))
            continue
        h = lam[i + 1] - lam[i]
        gain = -alpha[i + 1] * math.expm1(-h)
        extrapolation = 0.5 * h / (lam[i] - lam[i - 1]) if i else 0.0
        steps.append(
            SamplerStep(
                t,
                m_x,
                m_eps,
                next_x=sigma[i + 1] / sigma[i],
                next_m=gain * (1.0 + extrapolation),
                next_m_prev=-gain * extrapolation,
            )
        )
    return SamplerTable("dpmpp_2m", spacing, tuple(steps))


def dpmpp_3m(schedule: NoiseSchedule, num_steps: int, spacing: str = "logsnr") -> SamplerTable:
    """DPM-Solver++ 3M in data prediction (Lu et al., arXiv 2211.01095, and the authors' code), of lower order at its ends.

    Orders 1 and 2 in the first two steps, 1 in the last, and 2 in the one before it where there are fewer than 15 steps.
    """
    times, alpha, sigma = _path(schedule, num_steps, spacing)
    table = list(dpmpp_2m(schedule, num_steps, spacing).steps)
    lam = (np.log(alpha[:-1]) - np.log(sigma[:-1])).tolist()
    for i in range(2, len(times) - 1 - (len(times) < FEW_STEPS)):
        h, r0, r1 = lam[i + 1] - lam[i], lam[i] - lam[i - 1], lam[i - 1] - lam[i - 2]
        r0, r1 = r0 / h, r1 / h
        gain, slope = -math.expm1(-h), math.expm1(-h) / h + 1.0
        curve = 0.5 - (math.expm1(-h) + h) / h**2
        # x' = sigma'/sigma x + alpha' (gain m_i + slope D1 + curve D2), the differences D1 and D2 written out in the m:
        first, second = 1.0 / r0, 1.0 / r1  # of m_i - m_{i-1} and of m_{i-1} - m_{i-2}
        inner, outer = slope * (1.0 + r0 / (r0 + r1)) + curve / (r0 + r1), slope * r0 / (r0 + r1) + curve / (r0 + r1)
        weights = gain + inner * first, -inner * first - outer * second, outer * second
        next_m, next_m_prev, next_m_prev2 = (alpha[i + 1] * weight for weight in weights)
        table[i] = dataclasses.replace(table[i], next_m=next_m, next_m_prev=next_m_prev, next_m_prev2=next_m_prev2)
    return SamplerTable("dpmpp_3m", spacing, tuple(table))


def ddpm(schedule: NoiseSchedule, num_steps: int, spacing: str = "uniform") -> SamplerTable:
    """Ancestral sampling with the posterior variance (Ho et al., arXiv 2006.11239, eq. 7). For validation: it cannot be exported."""
    times, alpha, sigma = _path(schedule, num_steps, spacing)
    steps = []
    for i, t in enumerate(times):
        kept = (alpha[i] / alpha[i + 1]) ** 2  # product of 1 - beta over the respaced step
        to_x0 = alpha[i + 1] * (1.0 - kept) / sigma[i] ** 2
        to_x = math.sqrt(kept) * sigma[i + 1] ** 2 / sigma[i] ** 2
        noise = sigma[i + 1] / sigma[i] * math.sqrt(1.0 - kept)
        steps.append(SamplerStep(t, 1.0 / alpha[i], -sigma[i] / alpha[i], next_x=to_x, next_m=to_x0, noise=noise))
    return SamplerTable("ddpm", spacing, tuple(steps))


SAMPLERS: dict[str, Callable[[NoiseSchedule, int, str], SamplerTable]] = {
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "ddpm": ddpm,
}


def make_sampler(name: str, num_steps: int, spacing: str = "uniform", schedule: NoiseSchedule | None = None) -> SamplerTable:
    """Build a sampler by name.

    Raises:
        TokenCacheError: if the name or the spacing is unknown, or the number of steps is out of range.
    """
    if name not in SAMPLERS:
        raise TokenCacheError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name](schedule or NoiseSchedule(), num_steps, spacing)


def _path(schedule: NoiseSchedule, num_steps: int, spacing: str) -> tuple[list[float], list[float], list[float]]:
    """Times, and alpha and sigma at them with the noiseless end appended."""
    times = schedule.timesteps(spacing, num_steps)
    alpha, sigma = schedule.alpha_sigma(times)
    return times.tolist(), [*alpha.tolist(), 1.0], [*sigma.tolist(), 0.0]
