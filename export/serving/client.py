"""A server of one's own, and requests to it: what measurements and tests of serving share. Standard library only."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tc_lightning.errors import TokenCacheError

SCRIPT = Path(__file__).resolve().parents[1] / "serve.py"
HOST = "127.0.0.1"
_STOP_S, _MOST = 30.0, 2000  # characters of what it said


class Reply(NamedTuple):
    """What a server said: HTTP status, headers by their names in small letters, and the body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)


class Running(NamedTuple):
    """A server of one's own, on this machine."""

    port: int
    process: subprocess.Popen[bytes]

    def ask(self, path: str, body: dict[str, Any] | bytes | None = None, timeout: float = 120.0) -> Reply:
        """POST a body, JSON or bytes, or GET where there is none."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request("GET" if data is None else "POST", path, data)
            response = connection.getresponse()
            return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        finally:
            connection.close()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def running(artefact: Path, *arguments: object, port: int | None = None, patience: float = 120.0) -> Iterator[Running]:
    """`python export/serve.py ARTEFACT ...`, ready; ended afterwards as Ctrl+C would.

    Args:
        artefact: its folder.
        arguments: further ones.
        port: to listen at; None: any that is free.
        patience: seconds until it must be ready.

    Raises:
        TokenCacheError: if it does not become ready, with what it said.
    """
    port = port or free_port()
    command = [sys.executable, SCRIPT, artefact, "--port", port, *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT)
        server = Running(port, process)
        try:
            _wait(server, time.monotonic() + patience, log)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()  # its own processes end with it
                process.wait()


def _wait(server: Running, until: float, log: Any) -> None:
    while server.process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
        with contextlib.suppress(OSError, http.client.HTTPException):
            if server.ask("/health", timeout=5.0).status == http.HTTPStatus.OK:
                return
            break
    log.seek(0)
    raise TokenCacheError(f"the server did not become ready: {log.read().decode(errors='replace').strip()[-_MOST:]}")
