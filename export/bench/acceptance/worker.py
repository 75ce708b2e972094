"""Runs one stage in this process, which is its own: what it does to itself, it does to no other stage.

    python -m export.bench.acceptance.worker '{"stage": 2, "provider": "cpu", "folder": "...", "scratch": "...", "seconds": 60}'

The driver (`export.bench.acceptance.driver`) starts it. `plant` makes the stage fail in one of the ways that a stage can, so that a
test sees what the others make of it.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from export.bench.acceptance.journal import Journal
from export.bench.acceptance.reporter import Reporter
from export.bench.acceptance.stages import STAGES

GRACE = 10  # seconds after its time at which a worker ends itself, should nobody be there any more to end it
WARNING = 1.0  # seconds before, at which it writes down where it stands


class Order(NamedTuple):
    """What a worker is to do.

    Args:
        stage: number of the stage.
        provider: `cpu` or `cuda`.
        folder: where the journal is.
        scratch: an empty folder for whatever it writes, which goes afterwards.
        seconds: how long it may take.
        plant: `raise`, `hang` or `kill` in place of the stage; empty for the stage itself.
    """

    stage: int
    provider: str
    folder: str
    scratch: str
    seconds: float
    plant: str = ""


def main(order: Order) -> None:
    """Run the stage."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(WARNING, order.seconds - WARNING))
    signal.alarm(round(order.seconds) + GRACE)
    if order.plant:
        PLANTS[order.plant]()
    stage = next(stage for stage in STAGES if stage.number == order.stage)
    reporter = Reporter(Journal(Path(order.folder)), stage, order.seconds)
    run = importlib.import_module(f"export.bench.acceptance.{stage.name}").run
    run(reporter, order.provider, Path(order.scratch))


def _raise() -> None:
    raise RuntimeError("planted")


def _hang() -> None:
    time.sleep(1e6)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


PLANTS: dict[str, Callable[[], None]] = {"raise": _raise, "hang": _hang, "kill": _kill}

if __name__ == "__main__":
    main(Order(**json.loads(sys.argv[1])))
