"""The processes that plan together: each computes its share of the images, and all see the same sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from tc_lightning.errors import TokenCacheError

Result = TypeVar("Result")


def _alone(values: Tensor) -> Tensor:
    return values


@dataclasses.dataclass(frozen=True)
class Ranks:
    """One of several processes.

    Args:
        rank: which one this is.
        world: how many there are.
        total: sum of a tensor over all of them, the same everywhere: what is decided on it is decided alike.
    """

    rank: int = 0
    world: int = 1
    total: Callable[[Tensor], Tensor] = _alone

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def of_first(self, value: float, device: torch.device) -> float:
        """The first process's value, on all of them: what each would measure or read for itself could differ."""
        return self.total(torch.tensor(value if self.first else 0.0, dtype=torch.float64, device=device)).item()

    def together(self, work: Callable[[], Result], device: torch.device) -> Result:
        """What each process makes of its share, if all of them can: one that stopped alone would leave the others waiting for its sums.

        Raises:
            TokenCacheError: in all processes, if `work` raises one in any of them.
        """
        try:
            found, failure = [work()], None
        except TokenCacheError as error:
            found, failure = [], error
        if self.total(torch.tensor(float(failure is not None), dtype=torch.float64, device=device)).item() > 0:
            raise failure or TokenCacheError("another process failed: what it printed says why.")
        return found[0]

    def values_of_first(self, values: list[float] | None, count: int, device: torch.device) -> Tensor:
        """The first process's numbers, of which all know how many they are, on all of them; the others' own are not looked at."""
        own = torch.zeros(count, dtype=torch.float64)
        if self.first and values is not None:
            own = torch.tensor(values, dtype=torch.float64)
        return self.total(own.to(device))

    def gathered(self, values_BF: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks, on all of them."""
        counts = self._counts(len(values_BF), values_BF.device)
        padded = torch.zeros(self.world, max(counts), *values_BF.shape[1:], dtype=values_BF.dtype, device=values_BF.device)
        padded[self.rank, : len(values_BF)] = values_BF
        return torch.cat([rows[:count] for rows, count in zip(self.total(padded), counts, strict=True)])

    def before(self, count: int, device: torch.device) -> int:
        """How many rows the processes before this one have, of which each says how many it has itself."""
        return sum(self._counts(count, device)[: self.rank])

    def _counts(self, count: int, device: torch.device) -> list[int]:
        own = torch.zeros(self.world, dtype=torch.float64, device=device)
        own[self.rank] = count
        return [round(number) for number in self.total(own).tolist()]

    def share(self, count: int) -> slice:
        """This process's part of `count` images; parts differ by one image at most."""
        bounds = [r * count // self.world for r in (self.rank, self.rank + 1)]
        return slice(*bounds)


ALONE = Ranks()
