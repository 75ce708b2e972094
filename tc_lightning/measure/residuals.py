"""What a network's summed residual (what all its blocks add to the tokens) does along full-compute trajectories. Needs numpy, no torch.

Methods that cache whole steps decide by it: by its magnitude, by how far it moves in some steps, or by how well a weighted sum of
earlier ones gives a later one, which follows from inner products alone.

Shape suffixes: T sampling steps, G gaps (index g - 1 is a distance of g steps), S sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tc_lightning.errors import RunError

ARRAYS = ("products_TT", "ratio_T", "change_TG")


@dataclasses.dataclass(frozen=True, eq=False)
class Residuals:
    """Means over calibration trajectories, both halves of guidance among them; row i belongs to sampling step i.

    Args:
        products_TT: of the products of residuals at two steps, over tokens and channels: symmetric, mean squares on the diagonal.
        ratio_T: of |r_i| / |r_(i-1)|, the lengths of each token's residual: MagCache's magnitude ratio. 1 at step 0.
        change_TG: of the sum of |r_i - r_(i-g)| over that of |r_i|: relative L1 change. 0 where i < g.

    Raises:
        RunError: if shapes disagree, or a value is not what it can be.
    """

    products_TT: np.ndarray
    ratio_T: np.ndarray
    change_TG: np.ndarray

    def __post_init__(self) -> None:
        for name in ARRAYS:
            array = np.array(getattr(self, name), dtype=np.float64, order="C")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        _validate(self)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {name: getattr(self, name) for name in ARRAYS}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Residuals:
        """Inverse of `arrays`; others may be among them."""
        return cls(*(arrays[name] for name in ARRAYS))

    def least_squares(self, sources: Sequence[int], at: int, ridge: float = 0.0) -> np.ndarray:
        """Weights [S] of the least mean squared error; `ridge` is relative to the mean square of the sources."""
        S, P = list(sources), self.products_TT
        own_SS = P[np.ix_(S, S)] + ridge * float(np.diag(P)[S].mean()) * np.eye(len(S))
        return np.linalg.lstsq(own_SS, P[S, at], rcond=None)[0]


def forecast_error(products_TT: np.ndarray, sources: Sequence[int], weights: Sequence[float], at: int) -> float:
    """Mean squared error of sum_j weights[j] r_(sources[j]) as a forecast of r_at.

    Args:
        products_TT: see `Residuals`.
        sources: steps of the values that are weighed.
        weights: theirs.
        at: the step that is forecast.
    """
    S, w_S, P = list(sources), np.asarray(weights, dtype=np.float64), products_TT
    return float(max(0.0, P[at, at] - 2.0 * w_S @ P[S, at] + w_S @ P[np.ix_(S, S)] @ w_S))


def _validate(residuals: Residuals) -> None:
    products, ratio, change = residuals.arrays.values()
    steps = len(products)
    if products.shape != (steps, steps) or not steps or ratio.shape != (steps,) or change.ndim != 2 or len(change) != steps:
        raise RunError(
            f"residuals: products has the shape {products.shape}, ratio {ratio.shape} and change {change.shape}; "
            "[steps, steps], [steps] and [steps, gaps] were expected."
        )
    for name, array in residuals.arrays.items():
        signed = name == "products_TT"
        if not np.isfinite(array).all() or (not signed and (array < 0).any()) or (signed and not np.allclose(array, array.T)):
            what = "not finite or not symmetric" if signed else "negative or not finite"
            raise RunError(f"residuals: {name} is {what}: the teacher is damaged, or its trajectories diverge.")
