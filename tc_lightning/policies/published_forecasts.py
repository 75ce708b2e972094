"""Published forecasts as weights of past values: every one of them is linear in the values of the last full steps.

Papers have full steps at equal distances; plans have not. Each function says what it does with unequal ones. All take the full steps
before a step, latest first, and give a weight for each of them that is looked at, latest first; with too few full steps for the
method they do what it does then. Where a method forecasts a constant series exactly, its weights sum to 1; `spectrum_weights` is the
one that does not. PrediT's Adams-Bashforth predictor (arXiv 2602.18093) is not here: how it takes the derivatives of features could not
be established.

Shape suffixes: S full steps, P polynomials.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Weights = tuple[float, ...]


def taylor_weights(sources: Sequence[int], at: int, order: int) -> Weights:
    """TaylorSeer's series (Liu et al., arXiv 2503.06923), as its code and DPCache's have it: F + sum_i D_i / i! k^i, k steps on.

    D_i is the i-th difference of the last full steps, each divided by the distance of the two that it is the difference at, whatever
    those before were: a line is exact at any distances, a parabola at none.

    Args:
        sources: full steps, latest first.
        at: the step that is forecast.
        order: of the highest difference, where there are full steps for it.
    """
    return _series(sources, order, lambda i: float(at - sources[0]) ** i)


def hermite_weights(sources: Sequence[int], at: int, order: int, sigma: float = 0.5) -> Weights:
    """HiCache's scaled Hermite series (Feng et al., arXiv 2508.16984): F + sum_i D_i / i! sigma^i H_i(sigma k), k steps on.

    H_i are the physicists' Hermite polynomials (H_1(x) = 2x, H_2(x) = 4x^2 - 2), D_i the differences of `taylor_weights`. The slope
    of a linear series is multiplied by 2 sigma^2: it is exact at sigma = sqrt(1/2) alone, and half of it at 0.5.

    Args:
        sources: full steps, latest first.
        at: the step that is forecast.
        order: of the highest difference, where there are full steps for it.
        sigma: contraction, between 0 and 1.
    """
    return _series(sources, order, lambda i: sigma**i * _hermite(i, sigma * (at - sources[0])))


def _series(sources: Sequence[int], order: int, basis: Callable[[int], float]) -> Weights:
    """Differences of the last full steps times what stands for the powers of the distance."""
    S = min(order + 1, len(sources))
    differences = list(np.eye(S))  # of order i, at each full step that has one
    weights = differences[0].copy()
    for i in range(1, S):
        pairs = itertools.pairwise(differences)
        differences = [(new - old) / (sources[j] - sources[j + 1]) for j, (new, old) in enumerate(pairs)]
        weights += differences[0] / math.factorial(i) * basis(i)
    return tuple(map(float, weights))


def _hermite(i: int, x: float) -> float:
    """The physicists' Hermite polynomial of degree i."""
    before, now = 0.0, 1.0
    for n in range(i):
        before, now = now, 2.0 * x * now - 2.0 * n * before
    return now


def foca_weights(sources: Sequence[int], at: int) -> Weights:
    """FoCa: a BDF2 forecast, calibrated by Heun's rule, step after step (Zheng et al., arXiv 2508.16211, equations 6 to 8).

    With F_k the last value, computed or forecast, and h = 1: forecast 4/3 F_k - 1/3 F_(k-1) + 2/3 F'_k, whose slope at the new step
    is (3 forecast - 4 F_k + F_(k-1)) / 2; then F_k + 1/2 (slope of the last full step + this slope). How slopes are taken is our
    reading: F'_k is the difference of the last two values; the slope of a full step that of the last two full ones, over their
    distance, which is how unequal distances come in. The recursion runs over all steps since the third-last full step, forecast ones
    among them, and a linear series stays exact.

    Args:
        sources: full steps, latest first; up to four are looked at.
        at: the step that is forecast.
    """
    used = list(sources[:4])
    if len(used) == 1:
        return (1.0,)
    values = dict(zip(used, np.eye(len(used)), strict=True))
    start = used[min(2, len(used) - 2)]  # the first full step before which there is another
    slope = _slope(values, used, start)
    last, now = values[start] - slope, values[start]
    for step in range(start + 1, at + 1):
        if step in values:
            last, now, slope = now, values[step], _slope(values, used, step)
            continue
        forecast = 4 / 3 * now - 1 / 3 * last + 2 / 3 * (now - last)
        last, now = now, now + 0.5 * (slope + (3 * forecast - 4 * now + last) / 2)
    return tuple(map(float, now))


def _slope(values: dict[int, np.ndarray], full: list[int], step: int) -> np.ndarray:
    """Difference of a full step and the one before it, over their distance."""
    before = full[full.index(step) + 1]
    return (values[step] - values[before]) / (step - before)


def spectrum_weights(sources: Sequence[int], at: int, num_steps: int, degree: int = 4, ridge: float = 0.1) -> Weights:
    """Spectrum: a ridge regression on Chebyshev polynomials of time (Han et al., arXiv 2603.01623).

    Times 0 to `num_steps` are [-1, 1], as in the authors' code, so that unequal distances are no matter. Coefficients are shrunk, the
    constant among them: weights sum to less than 1, the more so the greater the ridge and the fewer the full steps.

    Args:
        sources: full steps, latest first; all are looked at.
        at: the step that is forecast.
        num_steps: sampling steps.
        degree: of the highest polynomial.
        ridge: penalty on squared coefficients (the paper's lambda).
    """
    X_SP, x_P = (_chebyshev(np.array(steps), num_steps, degree) for steps in (sources, [at]))
    weights = x_P @ np.linalg.solve(X_SP.T @ X_SP + ridge * np.eye(degree + 1), X_SP.T)
    return tuple(map(float, weights[0]))


def _chebyshev(steps: np.ndarray, num_steps: int, degree: int) -> np.ndarray:
    """Chebyshev polynomials T_0 to T_degree at some steps, [steps, P]."""
    return np.polynomial.chebyshev.chebvander(2.0 * steps / num_steps - 1.0, degree)
