"""One server that makes batches of rows, by simulation: which rows run when, and together with which. Deterministic.

Rows of one kind may share a batch: labels or prompts of one artefact, all by its plan or all at full compute. The server runs one
batch at a time. It starts one of a kind as soon as it is free and the kind has a full batch waiting, or a row that has waited as
long as rows may wait for others; of several such kinds the one whose first row came first. A batch is the first rows of its kind, as
many as there are and may be. Waiting counts from a row's arrival, as in Triton; LitServe counts from when the server is free. A row
that finds the queue full is refused, and does not come back. Shape suffix: R rows that ask.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tc_lightning.errors import TokenCacheError


@dataclasses.dataclass(frozen=True)
class Server:
    """How long batches take, and when they start.

    Args:
        fixed_s: seconds of a batch, however many rows it has.
        each_s: seconds that each of its rows adds.
        max_batch: rows of the largest batch; 1 is none.
        timeout_s: seconds that a row waits for others while the server is free.
        queue: rows that may wait, of all kinds together; None is any number.

    Raises:
        TokenCacheError: if a field is not possible.
    """

    fixed_s: float
    each_s: float
    max_batch: int = 1
    timeout_s: float = 0.0
    queue: int | None = None

    def __post_init__(self) -> None:
        for name in ("fixed_s", "each_s", "timeout_s"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise TokenCacheError(f"{name} is {value}: give seconds, 0 or more.")
        if self.fixed_s + self.each_s == 0:
            raise TokenCacheError("a batch takes no time at all: give fixed_s or each_s above 0.")
        if self.max_batch < 1:
            raise TokenCacheError(f"max_batch is {self.max_batch}: give 1 or more.")
        if self.queue is not None and self.queue < self.max_batch:
            raise TokenCacheError(
                f"a queue of {self.queue} rows never holds a batch of {self.max_batch}: let as many rows wait as the largest batch "
                "has, or make that smaller."
            )

    def seconds(self, rows: int, work: float = 1.0) -> float:
        """Seconds of a batch of so many rows, of a kind whose rows take `work` times as long as others."""
        return work * (self.fixed_s + rows * self.each_s)

    @property
    def capacity(self) -> float:
        """Rows a second, all of one kind of work 1, when there are always enough of them."""
        return self.max_batch / self.seconds(self.max_batch)


class Batch(NamedTuple):
    """A batch that ran.

    Args:
        kind: of its rows.
        start_s: when it started.
        end_s: when all its rows were done.
        rows: their numbers, in the order of arrival.
    """

    kind: int
    start_s: float
    end_s: float
    rows: tuple[int, ...]


class Served(NamedTuple):
    """All that ran, in order, and the numbers of the rows that were refused."""

    batches: list[Batch]
    refused: list[int]


def serve_rows(server: Server, arrivals_s: Sequence[float], kinds: Sequence[int], work: Sequence[float] = (1.0,)) -> Served:
    """Serve rows until none is left.

    Args:
        server: that serves them.
        arrivals_s: when each row asks, ascending, [R]. Rows that ask at the moment a batch starts are there before it does.
        kinds: number of each row's kind, [R].
        work: of each kind: how many times as long its batches take as `server` says.
    """
    queue = _Queue(server, list(arrivals_s), list(kinds), len(work))
    batches, free_s = list[Batch](), 0.0
    while (start := queue.next_start(free_s)) is not None:
        kind, start_s, rows = start
        free_s = start_s + server.seconds(len(rows), work[kind])
        batches.append(Batch(kind, start_s, free_s, rows))
    return Served(batches, queue.refused)


class _Queue:
    """Rows that wait, by kind, and those that are still to come."""

    def __init__(self, server: Server, arrivals_s: list[float], kinds: list[int], many: int) -> None:
        self._server, self._arrivals_s, self._kinds = server, arrivals_s, kinds
        self._waiting = [deque[int]() for _ in range(many)]
        self._come = self._held = 0
        self.refused = list[int]()

    def next_start(self, free_s: float) -> tuple[int, float, tuple[int, ...]] | None:
        """Kind, start and rows of the next batch of a server that is free from `free_s` on; None where no row is left."""
        now_s = free_s
        self._take_in(now_s)
        while (kind := self._ready(now_s)) is None:
            now_s = min(self._next_s, min(self._deadlines(), default=math.inf))
            if now_s == math.inf:
                return None
            self._take_in(now_s)
        size = min(self._server.max_batch, len(self._waiting[kind]))
        rows = tuple(self._waiting[kind].popleft() for _ in range(size))
        self._held -= size
        return kind, now_s, rows

    @property
    def _next_s(self) -> float:
        """When the next row comes."""
        return self._arrivals_s[self._come] if self._come < len(self._arrivals_s) else math.inf

    def _take_in(self, until_s: float) -> None:
        while self._next_s <= until_s:
            if self._server.queue is not None and self._held >= self._server.queue:
                self.refused.append(self._come)
            else:
                self._waiting[self._kinds[self._come]].append(self._come)
                self._held += 1
            self._come += 1

    def _ready(self, now_s: float) -> int | None:
        """The kind that a free server starts a batch of."""
        most, timeout_s = self._server.max_batch, self._server.timeout_s
        full_or_late = [
            (rows[0], kind)
            for kind, rows in enumerate(self._waiting)
            if rows and (len(rows) >= most or self._arrivals_s[rows[0]] + timeout_s <= now_s)
        ]
        return min(full_or_late)[1] if full_or_late else None

    def _deadlines(self) -> Iterator[float]:
        """When a row has waited long enough, of each kind that waits."""
        return (self._arrivals_s[rows[0]] + self._server.timeout_s for rows in self._waiting if rows)
