"""What the worker of a server and its front tell each other while requests run, in memory that both processes see.

Every number has one writer, and is read as it is: nothing waits for a lock. Standard library only.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import deque
from typing import Any

COUNTS = ("images", "full_images", "steps", "cached_steps", "nan", "failed", "given_up")
_STEP, _STEPS, _GIVEN_UP, _WORDS = 0, 1, 2, 3  # of a slot; how many there are
_MOST_SAID = 1 << 18
_MOST_FAULT = 1 << 12


class Board:
    """Made before the processes are, and handed to each of them.

    Args:
        slots: requests that there may be at a time.
        max_batch: rows of the largest batch.
    """

    def __init__(self, slots: int, max_batch: int) -> None:
        memory = multiprocessing.get_context("spawn")
        self.slots = slots
        self._said = memory.RawArray("c", _MOST_SAID)
        self._fault, self._at_fault = memory.RawArray("c", _MOST_FAULT), memory.RawValue("b", 0)
        self._counts = memory.RawArray("q", len(COUNTS))
        self._sizes = memory.RawArray("q", max_batch + 1)
        self._slots = memory.RawArray("q", _WORDS * slots)

    def say(self, words: dict[str, Any]) -> None:
        """By the worker, once: what it is, or why it is not."""
        self._said.value = json.dumps(words).encode()

    @property
    def said(self) -> dict[str, Any]:
        """What the worker said; nothing before it did."""
        return json.loads(self._said.value or b"{}")

    def fail(self, words: str) -> None:
        """By the worker: why it can make no image any more, until the server is started again. The first reason stays."""
        if not self._at_fault.value:
            self._fault.value = words.encode(errors="backslashreplace")[: _MOST_FAULT - 1]
            self._at_fault.value = 1  # from now on the words are read

    @property
    def fault(self) -> str | None:
        """Why the worker can make no image any more; None if it can."""
        return self._fault.value.decode(errors="replace") if self._at_fault.value else None

    def count(self, name: str, more: int = 1) -> None:
        """By the worker: so many more of `COUNTS`."""
        self._counts[COUNTS.index(name)] += more

    def ran_together(self, rows: int) -> None:
        """By the worker: a batch of so many rows began."""
        self._sizes[rows] += 1

    @property
    def counts(self) -> dict[str, Any]:
        """What was counted, and how many batches there were of each size."""
        sizes = {str(rows): batches for rows, batches in enumerate(self._sizes) if batches}
        return dict(zip(COUNTS, self._counts, strict=True)) | {"batch_sizes": sizes}

    def clear(self, slot: int) -> None:
        """By the front, before a request takes a slot."""
        for word in range(_WORDS):
            self._slots[slot * _WORDS + word] = 0

    def give_up(self, slot: int) -> None:
        """By the front: nobody waits for the request any more."""
        self._slots[slot * _WORDS + _GIVEN_UP] = 1

    def given_up(self, slot: int) -> bool:
        """Whether nobody waits for it."""
        return bool(self._slots[slot * _WORDS + _GIVEN_UP])

    def step(self, slot: int, done: int, steps: int) -> None:
        """By the worker: how far a request is."""
        self._slots[slot * _WORDS + _STEPS] = steps
        self._slots[slot * _WORDS + _STEP] = done

    def progress(self, slot: int) -> tuple[int, int]:
        """Steps done, and steps in all; 0 of 0 while it waits."""
        return self._slots[slot * _WORDS + _STEP], self._slots[slot * _WORDS + _STEPS]


class Slots:
    """The slots of a board that are free; kept by the front alone."""

    def __init__(self, board: Board) -> None:
        self._board, self._free = board, deque(range(board.slots))

    @property
    def taken(self) -> int:
        """Requests that wait or run."""
        return self._board.slots - len(self._free)

    def take(self) -> int | None:
        """A slot, cleared; None if all are taken."""
        if not self._free:
            return None
        slot = self._free.popleft()
        self._board.clear(slot)
        return slot

    def free(self, slot: int) -> None:
        """Once the worker has answered, and writes there no more."""
        self._free.append(slot)
