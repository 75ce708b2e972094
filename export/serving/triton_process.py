"""A Triton server as a process that this one watches: started, ready, measured, killed, stopped. Standard library only (Linux)."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from export.serving.triton_server import CHECKOUT, Ports, ServerError


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that runs.

    Args:
        launcher: the process that has started it, and that clears up behind it.
        ports: where it listens.
        log: file of what it says.
        options: further ones of tritonserver that it was given.
    """

    launcher: subprocess.Popen[bytes]
    ports: Ports
    log: Path
    options: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """Host and port of HTTP."""
        return f"{self.ports.address}:{self.ports.http}"

    @property
    def metrics(self) -> str:
        """Host and port of metrics."""
        return f"{self.ports.address}:{self.ports.metrics}"

    def processes(self) -> list[int]:
        """The server and the processes of its models, by number."""
        return sorted(pid for pid in _group(self.launcher.pid) if pid != self.launcher.pid)

    def memory(self) -> int:
        """Resident bytes of the server and the processes of its models, together."""
        return sum(_resident(pid) for pid in self.processes())

    def kill(self) -> None:
        """End it as a crash would, without a word to anybody."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    def wait_until_ready(self, seconds: float = 120.0) -> None:
        """Wait until all models can be asked.

        Raises:
            ServerError: if the server ends, or is not ready in so many seconds.
        """
        until = time.monotonic() + seconds
        while not is_ready(self.address):
            if self.launcher.poll() is not None:
                raise ServerError(f"the server has ended with status {self.launcher.returncode}: {self._last()}")
            if time.monotonic() > until:
                raise ServerError(f"the server was not ready in {seconds:g} s: {self._last()}")
            time.sleep(0.05)

    def _last(self) -> str:
        """What it says of errors; lines of Triton's begin with E and the date."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " / ".join([line for line in lines if re.match(r"E\d{4} |error: ", line)] or lines[-1:])


def is_ready(address: str) -> bool:
    """Whether a server answers that all its models can be asked."""
    connection = http.client.HTTPConnection(address, timeout=5.0)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def free_ports() -> Ports:
    """Ports of this machine that nobody listens on."""
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        return Ports(http=first.getsockname()[1], metrics=second.getsockname()[1])


@contextlib.contextmanager
def started(
    repository: Path, python: str = sys.executable, ports: Ports | None = None, more: Sequence[str] = (), ready: bool = True
) -> Iterator[Running]:
    """A server on a model repository, stopped at the end if it still runs.

    Args:
        repository: the repository.
        python: the Python that has the server and numpy, onnxruntime.
        ports: where it listens; None: where nobody does.
        more: further options of tritonserver.
        ready: wait until all models can be asked.

    Raises:
        ServerError: if it does not start.
    """
    ports = ports or free_ports()
    script = CHECKOUT / "export" / "triton_server.py"
    command = [python, str(script), str(repository), f"--port={ports.http}", f"--metrics-port={ports.metrics}", *more]
    with tempfile.TemporaryDirectory(prefix="tc-lightning-log-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as file:
            found = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])  # where it is not installed
            environment = {**os.environ, "PYTHONPATH": found}
            launcher = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        running = Running(launcher, ports, log, tuple(more))
        try:
            if ready:
                running.wait_until_ready()
            yield running
        finally:
            launcher.send_signal(signal.SIGTERM)
            try:
                launcher.wait(30.0)
            except subprocess.TimeoutExpired:
                running.kill()


def _group(leader: int) -> list[int]:
    """The processes of a process group, by number."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                group = (path / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[2]
                found += [int(path.name)] if int(group) == leader else []
    return found


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
