"""A mean of errors that a few images cannot make on their own.

Near a fork of its path an image may end elsewhere, a thousand times farther off than the others, after the least of changes. Such an
image counts, but by the logarithm of its error: how far off it is says little.

    mean(e) = c sum_B w log(1 + e / c) / sum_B w        c = 20 times the weighted median of e

which is Cauchy's loss (Black and Anandan, 1996) with a scale taken from the errors themselves, so that errors that are all twice as
large have twice the mean.

Shape suffixes: B images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tc_lightning.rollout.ranks import Ranks

TAIL = 20.0  # medians


def weighted_median(values_B: Tensor, weights_B: Tensor) -> Tensor:
    """The least value that, with all below it, has half of the weight."""
    order_B = values_B.argsort()
    reached_B = weights_B[order_B].cumsum(0)
    return values_B[order_B][int((reached_B < 0.5 * reached_B[-1]).sum())]


def robust_mean(errors_B: Tensor, weights_B: Tensor) -> Tensor:
    """The module's mean of errors, none of them negative; infinite if one of them is not finite."""
    if not torch.isfinite(errors_B).all():
        return torch.tensor(torch.inf)
    start = _tail_start(errors_B, weights_B)
    return (weights_B * start * (errors_B / start).log1p()).sum() / weights_B.sum()


def robust_mean_of_all(errors_B: Tensor, weights_B: Tensor, ranks: Ranks) -> float:
    """The same over the images of all processes."""
    all_B = ranks.gathered(torch.stack([errors_B.double(), weights_B.double()], 1))
    return float(robust_mean(*all_B.unbind(1)))


def robust_weights(errors_B: Tensor, weights_B: Tensor) -> Tensor:
    """What each error counts for in the mean's derivative at fixed c, for iteratively reweighted least squares; at most 1 in all."""
    return weights_B / weights_B.sum() / (1 + errors_B / _tail_start(errors_B, weights_B))


def _tail_start(errors_B: Tensor, weights_B: Tensor) -> Tensor:
    least = 1e-6 * errors_B.max()  # where half of the images have no error at all
    return torch.maximum(TAIL * weighted_median(errors_B, weights_B), least).clamp_min(torch.finfo(errors_B.dtype).tiny)
