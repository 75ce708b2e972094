"""Runs stages one after the other, each in a process of its own and within its share of the time. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from export.bench.acceptance.journal import FIGURES_ALONE, Journal, Line
from export.bench.acceptance.stages import PROVIDER, STAGES, Stage
from export.bench.acceptance.worker import Order

LEAST = 2.0  # seconds, without which a stage need not begin
LOADING = 45.0
POLL = 0.1

Say = Callable[[str], None]


class Driver:
    """One run.

    Args:
        folder: where the journal and the logs of the stages go.
        provider: `cpu` or `cuda`.
        minutes: how long all stages together may take.
        stages: those to run.
        plants: how stages are to fail, by number; see `export.bench.acceptance.worker`.
        say: told how it goes, a line at a time.
    """

    def __init__(
        self, folder: Path, provider: str, minutes: float, stages: Sequence[Stage], plants: dict[int, str], say: Say = print
    ) -> None:
        self._folder, self._provider, self._stages, self._plants, self._say = folder.resolve(), provider, stages, plants, say
        self._minutes, self._end = minutes, time.monotonic() + 60 * minutes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self._folder)
        self._told = 0

    def run(self) -> None:
        """Run them all. What is not got to has its line too, also after an interrupt or SIGTERM."""
        numbers = [stage.number for stage in self._stages]
        self._journal.begin({"provider": self._provider, "minutes": self._minutes, "stages": numbers, "host": _host()})
        stopped = ""
        with _interrupts():
            for place, stage in enumerate(self._stages):
                try:
                    line = self._not_run(stage, stopped) or self._run(stage, self._limit(place))
                except KeyboardInterrupt:
                    stopped = "the run was interrupted"
                    line = Line(stage.number, stage.name, "", None, stopped, cut=True)
                self._journal.add(line)
                self._say(f"  {line.verdict}{f': {line.reason}' if line.reason else ''} ({line.seconds:.1f} s)")

    def _limit(self, place: int) -> float:
        """Seconds of a stage: its share of what is left, and no less than it takes to load libraries that were never loaded here."""
        shares, left = [stage.share for stage in self._stages[place:]], self._end - time.monotonic()
        return max(left * shares[0] / sum(shares), min(LOADING, left / 3))

    def _not_run(self, stage: Stage, stopped: str) -> Line | None:
        """The line of a stage that need not begin; None if it may."""
        self._say(f"stage {stage.number} of {len(STAGES)}, {stage.name}: {stage.title}")
        unusable = [line for line in self._journal.read().parts(1) if line.part == PROVIDER and line.held is False]
        if unusable:
            return Line(stage.number, stage.name, "", None, "not run: the provider cannot be used here, see stage 1")
        if stopped or self._end - time.monotonic() < LEAST:
            return Line(stage.number, stage.name, "", None, stopped or "no time was left for it", cut=True)
        return None

    def _run(self, stage: Stage, seconds: float) -> Line:
        scratch, log = self._folder / f"scratch-{stage.number}", self._folder / f"{stage.number}_{stage.name}.log"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        order = Order(stage.number, self._provider, str(self._folder), str(scratch), seconds, self._plants.get(stage.number, ""))
        started = time.monotonic()
        try:
            status = self._wait(order, log)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return self._line(stage, status, log, time.monotonic() - started)

    def _wait(self, order: Order, log: Path) -> int | None:
        """The exit status of the stage's process; None if its time was over, and it was ended. Nothing of it is left running."""
        command = [sys.executable, "-m", "export.bench.acceptance.worker", json.dumps(order._asdict())]
        end = time.monotonic() + order.seconds
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True, env=self._environment()
            )
            try:
                while process.poll() is None and time.monotonic() < end:
                    time.sleep(POLL)
                    self._tell_parts()
                return process.poll()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started itself
                process.wait()
                self._tell_parts()

    def _environment(self) -> dict[str, str]:
        """In the rehearsal PyTorch has one thread: two that wait for each other would take longer over shapes so small."""
        return ({"OMP_NUM_THREADS": "1"} if self._provider == "cpu" else {}) | os.environ

    def _tell_parts(self) -> None:
        lines = self._journal.read().lines
        for line in lines[self._told :]:
            if line.part:
                self._say(
                    f"    {line.part}: {line.verdict}{f', {line.reason}' if line.reason != FIGURES_ALONE and line.reason else ''}"
                )
        self._told = len(lines)

    def _line(self, stage: Stage, status: int | None, log: Path, seconds: float) -> Line:
        """What became of a stage: what its parts say, and how its process ended."""
        parts = self._journal.read().parts(stage.number)
        looked, short = [p for p in parts if p.held is not None], [p.part for p in parts if p.held is False]
        late = [p.part for p in parts if p.cut]
        reasons = [f"{len(short)} of {len(parts)} parts: {', '.join(short)}"] if short else []
        if late:
            reasons.append(f"no time for {', '.join(late)}")
        if status is None:
            reasons.append(f"its time was over; where it stood is in {log.name}")
        elif status:
            ended = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {_last_line(log)!r}"
            reasons.append(f"its process {ended}; see {log.name}")
        elif not looked and not late:
            reasons.append("nothing of it can be looked at here")
        cut, failed = status is None or bool(late), bool(short or status)
        held = False if failed else None if cut or not looked else True
        return Line(stage.number, stage.name, "", held, "; ".join(reasons), {}, seconds, cut)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no message"


def _host() -> dict[str, Any]:
    return {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """SIGTERM counts as an interrupt meanwhile, and so does SIGINT, which a shell lets the processes ignore that it starts in the
    background."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
