"""Chromium without a window, driven over a pipe: pages are tested as a person uses them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-first-run")
_REPLY_S = 60.0


class Page:
    """One page of a browser: its protocol is JSON, each message ended by a zero byte."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._number, self._rest, self._session = write, read, 0, b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **params: Any) -> Any:
        """The result of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != self._number:
            pass
        assert "error" not in reply, reply
        return reply["result"]

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> None:
        """Until an expression in the page is true."""
        until = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < until, f"never true: {script}"
            time.sleep(0.05)

    def picture(self, path: Path) -> None:
        """A PNG of the page as it is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], _REPLY_S)[0], "the browser says nothing"
            part = os.read(self._read, 1 << 16)
            assert part, "the browser ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def opened(url: str) -> Iterator[Page]:
    """A page of a browser of its own, which ends with it."""
    commands, answers = os.pipe(), os.pipe()
    redirect = f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # processes of the browser may still write there
        arguments = ["bash", "-c", redirect, "browser", str(CHROMIUM), *_FLAGS, "--window-size=1000,1100", f"--user-data-dir={profile}"]
        browser = subprocess.Popen(arguments, pass_fds=(commands[0], answers[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(commands[0])
        os.close(answers[1])
        try:
            page = Page(commands[1], answers[0])
            page.call("Page.navigate", url=url)
            yield page
        finally:
            browser.kill()
            browser.wait()
            os.close(commands[1])
            os.close(answers[0])
