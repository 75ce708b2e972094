"""Samplers as coefficient tables. Each function returns a `SamplerTable`; the last step of each lands on x_0.

They are written in alpha and sigma of a schedule, and in its x_0 and eps as sums of latents and output: what the network predicts
is folded into `m_x` and `m_eps`. One call of the network a step, and sums alone: Heun's second call, and steps whose length depends
on what was computed, have no place in a table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.plan.sampler_table import SamplerStep, SamplerTable

FEW_STEPS = 15  # below it DPM-Solver++ lowers its order before the end, too


def ddim(schedule: Schedule, num_steps: int, spacing: str = "uniform") -> SamplerTable:
    """Deterministic DDIM, eta = 0 (Song et al., arXiv 2010.02502, eq. 12)."""
    times, alpha, sigma = _path(schedule, num_steps, spacing)
    steps = []
    for i, t in enumerate(times):
        if schedule.predicts == "eps":
            ratio = alpha[i + 1] / alpha[i]
            steps.append(SamplerStep(t, *schedule.eps(alpha[i], sigma[i]), next_x=ratio, next_m=sigma[i + 1] - ratio * sigma[i]))
        else:  # the same in x_0: alpha may be 0 at the noisy end
            ratio = sigma[i + 1] / sigma[i]
            steps.append(SamplerStep(t, *schedule.x0(alpha[i], sigma[i]), next_x=ratio, next_m=alpha[i + 1] - ratio * alpha[i]))
    return SamplerTable("ddim", spacing, tuple(steps))


def euler(schedule: Schedule, num_steps: int, spacing: str = "uniform") -> SamplerTable:
    """Euler steps along the velocity of a flow (what `ddim` is there, but for what m stands for).

    Raises:
        TokenCacheError: if the network predicts no velocity.
    """
    if schedule.predicts != "velocity":
        raise TokenCacheError(f"euler follows the velocity of a flow, and this network predicts {schedule.predicts}: choose ddim.")
    times, alpha, sigma = _path(schedule, num_steps, spacing)
    steps = []
    for i, t in enumerate(times):
        _, noise = schedule.mixture(alpha[i], sigma[i])
        steps.append(SamplerStep(t, m_x=0.0, m_eps=1.0, next_x=1.0, next_m=noise * (sigma[i + 1] - sigma[i])))
    return SamplerTable("euler", spacing, tuple(steps))


def dpmpp_2m(schedule: Schedule, num_steps: int, spacing: str = "logsnr") -> SamplerTable:
    """DPM-Solver++ 2M in data prediction, first order at both ends (Lu et al., arXiv 2211.01095, algorithm 2)."""
    times, alpha, sigma = _path(schedule, num_steps, spacing)
    lam = _half_log_snr(alpha, sigma)
    steps = []
    for i, t in enumerate(times):
        m_x, m_eps = schedule.x0(alpha[i], sigma[i])
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


def dpmpp_3m(schedule: Schedule, num_steps: int, spacing: str = "logsnr") -> SamplerTable:
    """DPM-Solver++ 3M in data prediction (Lu et al., arXiv 2211.01095, and the authors' code), of lower order at its ends.

    Orders 1 and 2 in the first two steps, 1 in the last, and 2 in the one before it where there are fewer than 15 steps.
    """
    times, alpha, sigma = _path(schedule, num_steps, spacing)
    table = list(dpmpp_2m(schedule, num_steps, spacing).steps)
    lam = _half_log_snr(alpha, sigma)
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


def unipc(schedule: Schedule, num_steps: int, spacing: str = "logsnr") -> SamplerTable:
    """UniPC of order 2 in data prediction, B(h) = e^h - 1, of order 1 at both ends (Zhao et al., arXiv 2302.04867, algorithms 1 and 2).

    The corrector moves x_i by past outputs and the one at x_i itself, and that is folded into the step that follows: no call is added.
    Order 3 is left out: its corrector looks three steps back.
    """
    times, alpha, sigma = _path(schedule, num_steps, spacing)
    lam, last = _half_log_snr(alpha, sigma), len(times) - 1
    steps = []
    for i, t in enumerate(times):
        m_x, m_eps = schedule.x0(alpha[i], sigma[i])
        if i == last:
            steps.append(SamplerStep(t, m_x, m_eps, next_x=0.0, next_m=1.0))
            continue
        ratio, gain = sigma[i + 1] / sigma[i], -alpha[i + 1] * math.expm1(lam[i] - lam[i + 1])
        slope = 0.5 * (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) if i else 0.0  # of m_i - m_{i-1}
        corrected = _correction(alpha[i], lam[max(i - 2, 0) : i + 1])
        weights = (gain * (1.0 + slope) + ratio * corrected[0], ratio * corrected[1] - gain * slope, ratio * corrected[2])
        steps.append(SamplerStep(t, m_x, m_eps, ratio, *weights))
    return SamplerTable("unipc", spacing, tuple(steps))


def _correction(alpha: float, lam: list[float]) -> tuple[float, float, float]:
    """UniPC's corrector minus its predictor: weights of m_i, m_{i-1} and m_{i-2}, of half log-SNRs up to that of step i."""
    if len(lam) == 1:
        return 0.0, 0.0, 0.0
    h = lam[-1] - lam[-2]
    gain = -alpha * math.expm1(-h)
    if len(lam) == 2:
        return 0.5 * gain, -0.5 * gain, 0.0
    r = (lam[0] - lam[1]) / h  # below 0
    shrunk = math.expm1(-h)
    b1 = (shrunk / -h - 1.0) / shrunk
    b2 = 2.0 * ((shrunk / -h - 1.0) / -h - 0.5) / shrunk
    rho = (b2 - b1) / (r - 1.0)
    own, earlier = gain * (b1 - rho), gain * (rho - 0.5) / r  # of m_i - m_{i-1} and of m_{i-2} - m_{i-1}
    return own, -own - earlier, earlier


def ddpm(schedule: Schedule, num_steps: int, spacing: str = "uniform") -> SamplerTable:
    """Ancestral sampling with the posterior variance (Ho et al., arXiv 2006.11239, eq. 7). For validation: it cannot be exported.

    Raises:
        TokenCacheError: if the schedule does not keep the variance.
    """
    if not isinstance(schedule, LinearBetas):
        raise TokenCacheError("ddpm adds the noise of a process that keeps the variance, and a flow has none: choose euler or ddim.")
    times, alpha, sigma = _path(schedule, num_steps, spacing)
    steps = []
    for i, t in enumerate(times):
        kept = (alpha[i] / alpha[i + 1]) ** 2  # product of 1 - beta over the respaced step
        to_x0 = alpha[i + 1] * (1.0 - kept) / sigma[i] ** 2
        to_x = math.sqrt(kept) * sigma[i + 1] ** 2 / sigma[i] ** 2
        noise = sigma[i + 1] / sigma[i] * math.sqrt(1.0 - kept)
        steps.append(SamplerStep(t, *schedule.x0(alpha[i], sigma[i]), next_x=to_x, next_m=to_x0, noise=noise))
    return SamplerTable("ddpm", spacing, tuple(steps))


SAMPLERS: dict[str, Callable[[Schedule, int, str], SamplerTable]] = {
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "unipc": unipc,
    "euler": euler,
    "ddpm": ddpm,
}


SOLVERS = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc")  # each a way of its own to follow the ODE, of any schedule


def require_solver(name: str) -> None:
    """Refuse samplers that are not there, or that add noise.

    Raises:
        TokenCacheError: if there is no such sampler.
        PlanError: if it adds noise.
    """
    if name not in SAMPLERS:
        raise TokenCacheError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}.")
    if SAMPLERS[name] is ddpm:
        raise PlanError(f"{name} adds noise, and its trajectories cannot be compared: choose another sampler.")


def make_sampler(schedule: Schedule, name: str, num_steps: int, spacing: str = "uniform") -> SamplerTable:
    """Build a sampler by name.

    Args:
        schedule: the network's.
        name: one of `SAMPLERS`.
        num_steps: calls of the network.
        spacing: one that the schedule has.

    Raises:
        TokenCacheError: if the name or the spacing is unknown or not one of the schedule's, or the number of steps is out of range.
    """
    if name not in SAMPLERS:
        raise TokenCacheError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name](schedule, num_steps, spacing)


def _path(schedule: Schedule, num_steps: int, spacing: str) -> tuple[list[float], list[float], list[float]]:
    """Times, and alpha and sigma at them with the noiseless end appended."""
    times = schedule.timesteps(spacing, num_steps)
    alpha, sigma = schedule.alpha_sigma(times)
    return times.tolist(), [*alpha.tolist(), 1.0], [*sigma.tolist(), 0.0]


def _half_log_snr(alpha: list[float], sigma: list[float]) -> list[float]:
    """log(alpha / sigma) of the times of a path; minus infinity at a flow's noisy end, from where orders above 1 have no weight."""
    with np.errstate(divide="ignore"):
        return (np.log(alpha[:-1]) - np.log(sigma[:-1])).tolist()
