"""How a stage tells what it finds: part by part, each contained, so that one that fails leaves the others to be tried."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator
from typing import Any

from export.bench.acceptance.journal import FIGURES_ALONE, LIMIT, Journal, Line
from export.bench.acceptance.stages import Stage
from tc_lightning.errors import first_line


class NotHere(Exception):  # noqa: N818
    """This part cannot be looked at here; the message says why."""


class TooLate(Exception):  # noqa: N818
    """There is no time left for this part; the message says how much it takes."""


class Findings:
    """What a part finds: figures, and what did not hold."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self.short: list[str] = []
        self.looked = False

    def require(self, held: bool, otherwise: str) -> None:
        """Something that must hold, and what to say if it does not; the part goes on."""
        self.looked = True
        if not held:
            self.short.append(otherwise)

    def at_most(self, name: str, value: float, limit: float) -> None:
        """A figure that must not exceed a limit (NaN exceeds all)."""
        self.figures |= {name: value, f"{name}{LIMIT}": limit}
        self.require(value <= limit, f"{name} is {value:.3g}, above {limit:.3g}")

    def at_least(self, name: str, value: float, limit: float) -> None:
        """A figure that must reach a limit."""
        self.figures |= {name: value, f"{name}{LIMIT}": limit}
        self.require(value >= limit, f"{name} is {value:.3g}, below {limit:.3g}")


class Reporter:
    """What a stage is given.

    Args:
        journal: where its lines go.
        stage: which it is.
        seconds: how long it may take.
    """

    def __init__(self, journal: Journal, stage: Stage, seconds: float) -> None:
        self._journal, self._stage = journal, stage
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    def need(self, seconds: float, extra: bool = False) -> None:
        """Say that what follows takes so long.

        Raises:
            TooLate: if less is left.
            NotHere: likewise, if it is an extra, which nobody waits for.
        """
        if seconds > self.left:
            said = f"it would take about {seconds:.0f} s, and {max(self.left, 0):.0f} s were left"
            raise NotHere(said) if extra else TooLate(said)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Findings]:
        """A part of the stage: its line is written when the block ends, also if it raises.

        In the block, `NotHere` says why the part means nothing here, and `TooLate` that there is no time for it; any other exception
        is something that did not hold. A part that requires nothing tells figures alone, and its `held` is null.
        """
        found, started = Findings(), time.monotonic()
        held: bool | None = None
        cut, reason = False, ""
        try:
            yield found
            held = not found.short if found.looked else None
            reason = "; ".join(found.short) if found.looked else FIGURES_ALONE
        except NotHere as error:
            reason = str(error)
        except TooLate as error:
            cut, reason = True, str(error)
        except Exception as error:
            traceback.print_exc()
            held, reason = False, "; ".join([*found.short, f"{type(error).__name__}: {first_line(error)}"])
        seconds = time.monotonic() - started
        self._journal.add(Line(self._stage.number, self._stage.name, name, held, reason, found.figures, seconds, cut))
