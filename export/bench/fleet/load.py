"""Rows that ask at random: a Poisson process of a mixture of kinds. Deterministic with a seed. Shape suffix: R rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from tc_lightning.errors import TokenCacheError


@dataclasses.dataclass(frozen=True)
class Kind:
    """Rows that may share a batch with each other, and with no others.

    Args:
        name: for messages.
        share: of all rows, in any unit: shares are taken relative to their sum.
        work: how many times as long its batches take as those that the server is described by.

    Raises:
        TokenCacheError: if a field is not possible.
    """

    name: str
    share: float = 1.0
    work: float = 1.0

    def __post_init__(self) -> None:
        for name in ("share", "work"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise TokenCacheError(f"the {name} of rows of the kind {self.name!r} is {value}: give a number above 0.")

    @classmethod
    def parse(cls, text: str) -> Kind:
        """Of `NAME`, `NAME:SHARE` or `NAME:SHARE:WORK`.

        Raises:
            TokenCacheError: if it is none of these.
        """
        name, *numbers = text.split(":")
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = [math.nan]
        if not name or len(values) > 2 or any(map(math.isnan, values)):
            raise TokenCacheError(f"a kind of rows cannot be {text!r}: write NAME:SHARE or NAME:SHARE:WORK, full:0.1:2.5 for example.")
        return cls(name, *values)


def require_mixture(kinds: Sequence[Kind]) -> None:
    """Check that kinds can be told apart.

    Raises:
        TokenCacheError: if there is none, or two have one name.
    """
    names = [kind.name for kind in kinds]
    if not names or len(set(names)) < len(names):
        raise TokenCacheError(f"the kinds of rows are {', '.join(names) or 'none'}: name one at least, and each but once.")


def mean_work(kinds: Sequence[Kind]) -> float:
    """Of a row, over the mixture."""
    return sum(kind.share * kind.work for kind in kinds) / sum(kind.share for kind in kinds)


def poisson(rate: float, kinds: Sequence[Kind], rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals and kinds of rows. Of one seed they are the same at every rate, but for how fast they follow each other.

    Args:
        rate: rows a second.
        kinds: the mixture.
        rows: how many.
        seed: of both.

    Returns:
        arrivals_R: seconds, ascending, float64.
        kinds_R: the number of each row's kind, int64.

    Raises:
        TokenCacheError: if rate, mixture or number of rows are not possible.
    """
    if not 0 < rate < math.inf:
        raise TokenCacheError(f"a rate of {rate} rows a second cannot be: give a number above 0.")
    if rows < 1 or seed < 0:
        raise TokenCacheError(f"{rows} rows with the seed {seed} cannot be: give 1 row or more, and a seed of 0 or more.")
    require_mixture(kinds)
    rng = np.random.default_rng(seed)
    shares = np.array([kind.share for kind in kinds])
    return np.cumsum(rng.exponential(size=rows)) / rate, rng.choice(len(kinds), size=rows, p=shares / shares.sum())
