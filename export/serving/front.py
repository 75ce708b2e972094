"""The process that speaks HTTP: reads requests, refuses what cannot run, and tells how far a request is.

FastAPI reads annotations as objects, so that this file keeps them as they are.
"""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from export.serving.asked import Asked, body_limit, read_asked
from export.serving.board import Board, Slots
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import conditions_from_json
from tc_lightning.plan.given import Arrays

BAD_REQUEST, TOO_SLOW, TOO_LARGE, GIVEN_UP, BUSY = 400, 408, 413, 499, 503
BODY_S = 30.0  # seconds in which the body of a request must have come: it holds a slot meanwhile
_POLL_S, _PING_S, _MOST_WORDS = 0.03, 10.0, 500

Handle = Callable[[Asked], Awaitable[Response]]


class Desk:
    """Takes requests in, within the limits of the server.

    Args:
        manifest: the artefact's.
        board: what the worker and the front tell each other; its slots bound the requests that wait or run.
        examples: rows of conditions that requests may name by number.
        max_body: bytes that the body of a request may have; None: as many as the artefact's conditions need.
        nulls: null values that the artefact stores.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        board: Board,
        examples: Arrays | None = None,
        max_body: int | None = None,
        nulls: Arrays | None = None,
    ) -> None:
        self.manifest, self.board, self.examples, self.nulls = manifest, board, examples, nulls
        self.max_body = max_body or body_limit(conditions_from_json(manifest["model"]["conditions"], "conditions"))
        self._slots, self._refused = Slots(board), Counter[str]()
        self._running: set[asyncio.Task[Response]] = set()

    async def take(self, request: Request) -> Asked:
        """The request as a row with a slot of its own, which `free` gives back.

        The slot is taken before anything of the body is read, so that no more bodies than slots are held at a time; it is parsed in a
        thread, so that others are heard meanwhile.

        Raises:
            HTTPException: 503 if too many wait already, 413 for a body that is too large, 408 for one that does not come, 499 if the
                client goes away before it has, 400 for one that cannot be used.
        """
        slot = self._slot()
        try:
            body = await self._body(request)
            asked = await asyncio.to_thread(read_asked, body, self.manifest, self.examples, self.nulls)
        except BaseException as error:
            self.free(slot)
            if not isinstance(error, TokenCacheError):
                raise
            self._refused["bad"] += 1
            raise HTTPException(BAD_REQUEST, _short(encodable(str(error)))) from error
        return Asked(asked.row, asked.form, slot)

    def _slot(self) -> int:
        slot = self._slots.take()
        if slot is None:
            self._refused["busy"] += 1
            words = f"{self.board.slots} requests wait or run already, as many as this server takes (--queue): try again later."
            raise HTTPException(BUSY, words, {"Retry-After": "1"})
        return slot

    async def _body(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(BODY_S):
                return await self._parts(request)
        except TimeoutError as error:
            self._refused["too_slow"] += 1
            words = f"the body did not come within {BODY_S:g} seconds: send it again."
            raise HTTPException(TOO_SLOW, words, {"Connection": "close"}) from error
        except ClientDisconnect as error:
            self._refused["gone"] += 1
            raise HTTPException(GIVEN_UP, "the client went away before its request had come.") from error

    async def _parts(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.max_body:
                self._refused["too_large"] += 1
                words = f"the body has more than {self.max_body:,} bytes, as many as this server reads (--max-body)."
                raise HTTPException(TOO_LARGE, words, {"Connection": "close"})
            parts.append(part)
        return b"".join(parts)

    def free(self, slot: int) -> None:
        """Once the worker has answered."""
        self._slots.free(slot)

    async def watch(self, request: Request, slot: int) -> None:
        """Give a request up when its client goes away."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.board.give_up(slot)

    def started(self, asked: Asked, handle: Handle) -> asyncio.Task[Response]:
        """A request that runs by itself, and gives its slot back at the end, whoever waits for it."""

        async def run() -> Response:
            return await handle(asked)

        task = asyncio.create_task(run())
        self._running.add(task)

        def ended(task: asyncio.Task[Response]) -> None:
            self._running.discard(task)
            self.free(asked.slot)
            if not task.cancelled():
                task.exception()  # looked at, so that nobody complains

        task.add_done_callback(ended)
        return task

    async def told(self, task: asyncio.Task[Response], slot: int) -> AsyncIterator[str]:
        """Server-sent events: `step` whenever steps were done, then `image` or `error`."""
        said, quiet = (0, 0), 0.0
        while not task.done():
            await asyncio.wait({task}, timeout=_POLL_S)
            if not task.done() and (now := self.board.progress(slot)) != said:
                said, quiet = now, 0.0
                yield _event("step", {"step": said[0], "steps": said[1]})
            elif (quiet := quiet + _POLL_S) >= _PING_S:
                quiet = 0.0
                yield ": waiting\n\n"
        yield _last_event(task)

    def health(self) -> dict[str, Any]:
        """What is served, and where it really runs; once no image can be made any more its status is `failed`, with a detail."""
        model, said = self.manifest["model"], self.board.said
        fault = self.board.fault
        return {
            **({"status": "ready"} if fault is None else {"status": "failed", "detail": fault}),
            **said,
            "plan_digest": self.manifest["plan_digest"],
            "plan": self.manifest["plan_summary"],
            "precision": self.manifest["precision"],
            "teacher": self.manifest["teacher"],
            "steps": self.manifest["steps"],
            "full_steps": self.manifest["full_steps"],
            "guidance": self.manifest["guidance"]["scale"],
            "conditions": model["conditions"],
            "examples": min(map(len, (self.examples or {}).values()), default=0),
            "max_body": self.max_body,
            "queue": self.board.slots,
        }

    def metrics(self) -> dict[str, Any]:
        """What was counted since the server began."""
        refused = {name: self._refused[name] for name in ("bad", "too_large", "too_slow", "gone", "busy")}
        return self.board.counts | {"refused": refused, "waiting_or_running": self._slots.taken}


async def taken(request: Request) -> AsyncIterator[Asked]:
    """The dependency by which LitServe's own route gets its requests: read, checked, and given up if the client goes away."""
    desk: Desk = request.app.state.desk
    asked = await desk.take(request)
    watching = asyncio.create_task(desk.watch(request, asked.slot))
    try:
        yield asked
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        desk.free(asked.slot)


class Events(StreamingResponse):
    """Events of a request that is given up when nobody reads them any more."""

    def __init__(self, desk: Desk, task: asyncio.Task[Response], slot: int) -> None:
        super().__init__(desk.told(task, slot), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._desk, self._task, self._slot = desk, task, slot

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._task.done():
                self._desk.board.give_up(self._slot)


def encodable(words: str) -> str:
    """The words as text that every answer can hold: half a pair of surrogates, which JSON can bring in, is written as its escape."""
    return words.encode(errors="backslashreplace").decode()


def _short(words: str) -> str:
    """Without the digits of a number that has thousands of them."""
    return words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]} ..."


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _last_event(task: asyncio.Task[Response]) -> str:
    if task.cancelled():
        return _event("error", {"status": BUSY, "detail": "the server ends."})
    if isinstance(error := task.exception(), HTTPException):
        return _event("error", {"status": error.status_code, "detail": error.detail})
    response = task.result()
    data = json.loads(bytes(response.body))
    return _event("image", data) if response.status_code < BAD_REQUEST else _event("error", {"status": response.status_code, **data})
