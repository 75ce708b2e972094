"""The one process that holds the loaded artefact: LitServe's API and its loop of batches.

LitServe reads the annotations of `decode_request` and `encode_response` as objects, so that this file keeps annotations as they are.
"""

import base64
import io
import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, Queue
from typing import Annotated, Any, NamedTuple

import litserve as ls
import numpy as np
from fastapi import Depends, Response
from fastapi.responses import JSONResponse
from litserve.loops.base import _SENTINEL_VALUE, _StopLoopError
from litserve.loops.simple_loops import BatchedLoop

from export.grid import png_of
from export.runtime.manifest import ArtefactError
from export.runtime.sampler import CachedSampler
from export.serving.asked import Asked
from export.serving.board import Board
from export.serving.front import BAD_REQUEST, GIVEN_UP, encodable, taken
from export.serving.rows import Answer, BadRowError, RowError, answers
from export.serving.warm_up import some_conditions, warm_up
from tc_lightning.errors import TokenCacheError

BECAME_NAN, FAILED = 422, 500  # HTTP status of a row that is NaN, and of a run that failed
RECEIPT = "x-receipt"
_IDLE_S = 1.0


class GivenUpError(TokenCacheError):
    """Nobody waits for any row of a run: it stops at the next step."""


class Made(NamedTuple):
    """A request with its answer, on the way to be encoded."""

    asked: Asked
    answer: Answer | TokenCacheError


class WaitingLoop(BatchedLoop):
    """LitServe's loop of batches; it waits for the first request of a batch rather than asking for one all the time, and from then on
    for others, `batch_timeout` at most."""

    def get_batch_requests(self, lit_api: ls.LitAPI, request_queue: Queue, transport: Any) -> tuple[list, list]:
        """Requests of a batch, and those that waited longer than they may."""
        items: list[Any] = []
        until = time.monotonic() + _IDLE_S
        try:
            while len(items) < lit_api.max_batch_size:
                items.append(request_queue.get(timeout=max(0.0, until - time.monotonic())))
                if len(items) == 1:
                    until = time.monotonic() + lit_api.batch_timeout
        except Empty:
            pass
        except (KeyboardInterrupt, EOFError, OSError) as error:  # the server ends
            raise _StopLoopError from error
        if _SENTINEL_VALUE in items:
            raise _StopLoopError
        limit = lit_api.request_timeout or float("inf")
        late = [time.monotonic() - since > limit for _, _, since, _ in items]
        kept = [(queue, uid, x) for (queue, uid, _, x), is_late in zip(items, late, strict=True) if not is_late]
        return kept, [(queue, uid) for (queue, uid, _, _), is_late in zip(items, late, strict=True) if is_late]


class SamplerAPI(ls.LitAPI):
    """An artefact behind LitServe: a batch is rows of several requests, each with its own answer.

    Args:
        artefact: its folder.
        board: what the worker and the front tell each other.
        max_batch: rows of the largest batch.
        batch_timeout: seconds that the first row of a batch waits for others.
        ready: what the worker prints when it is.
        given: further arguments of `CachedSampler`.
    """

    def __init__(self, artefact: Path, board: Board, max_batch: int, batch_timeout: float, ready: str, **given: Any) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=batch_timeout, loop=WaitingLoop())
        self._artefact, self._board, self._given, self._ready = artefact, board, given, ready

    def setup(self, device: str) -> None:
        """In the worker: load the artefact, and run every size of batch once."""
        if multiprocessing.parent_process() is not None:
            end_with_parent()
        try:
            self._sampler = CachedSampler(self._artefact, max_batch=self.max_batch_size, **self._given)
            self._board.say(self._warmed_up())
        except TokenCacheError as error:
            self._board.say({"error": str(error)})
            logging.getLogger("litserve").disabled = True  # the paragraph is enough
            logging.getLogger("litserve.loops.loops").disabled = True
            raise
        print(self._ready, flush=True)

    def _warmed_up(self) -> dict[str, Any]:
        """What the sampler really runs on, once every size of batch has run."""
        sampler = self._sampler
        warm_up(sampler)
        given = some_conditions(sampler.conditions, 1)
        ran = [sampler.sample(conditions=given, full=full, strict=False).receipt["nodes_per_provider"] for full in (False, True)]
        nodes = {name: found for one in ran for name, found in one.items()}
        return {"provider": sampler.provider, "device": sampler.device, "nodes_per_provider": nodes, "process": os.getpid()}

    def health(self) -> bool:
        """What LitServe's own `/ready` asks: whether images can be made still."""
        return self._board.fault is None

    def decode_request(self, request: Annotated[Asked, Depends(taken)]) -> Asked:
        """What the front read, as it is."""
        return request

    def predict(self, x: Sequence[Asked]) -> list[Made]:
        """Answers of a batch; rows that nobody waits for any more are left out of it."""
        wanted = [asked for asked in x if not self._board.given_up(asked.slot)]

        def on_step(places: Sequence[int], done: int, steps: int) -> None:
            if done == 1:
                self._board.ran_together(len(places))
            for place in places:
                self._board.step(wanted[place].slot, done, steps)
            if all(self._board.given_up(wanted[place].slot) for place in places):
                raise GivenUpError("nobody waits for it any more.")

        found = dict(
            zip((asked.slot for asked in wanted), answers(self._sampler, [asked.row for asked in wanted], on_step), strict=True)
        )
        made = [Made(asked, found.get(asked.slot, GivenUpError("nobody waits for it any more."))) for asked in x]
        for one in made:
            self._note(one.answer)
        return made

    def _note(self, answer: Answer | TokenCacheError) -> None:
        match answer:
            case GivenUpError():
                self._board.count("given_up")
            case RowError():
                self._board.count("nan")
            case TokenCacheError():
                self._board.count("failed")
                if isinstance(answer, ArtefactError):  # it stays so
                    self._board.fail(str(answer))
            case _:
                receipt = answer.receipt
                self._board.count("full_images" if receipt["full_compute"] else "images")
                self._board.count("cached_steps", receipt["steps_reading_cache"] // receipt["parts"])
                self._board.count("steps", sum(receipt["steps_per_program"].values()) // receipt["parts"])

    def encode_response(self, output: Made) -> Response:
        """PNG or NPY with the receipt in a header, JSON with all three, or an error of this row alone."""
        asked, answer = output
        if isinstance(answer, TokenCacheError):
            return JSONResponse({"detail": encodable(str(answer))}, status_of(answer))
        return encoded(answer, asked.form)


def status_of(error: TokenCacheError) -> int:
    """HTTP status of a row that has no image: only what the row itself brought about is a fault of the request."""
    match error:
        case GivenUpError():
            return GIVEN_UP
        case BadRowError():
            return BAD_REQUEST
        case RowError():
            return BECAME_NAN
        case _:
            return FAILED


def encoded(answer: Answer, form: str) -> Response:
    """An answer as a client wants it: pixels where the artefact makes some, else its latents; the PNG shows their first channels."""
    seen_CHW = answer.latent if answer.image is None else answer.image
    kind = "latent" if answer.image is None else "pixels"
    receipt = {RECEIPT: json.dumps(answer.receipt), "x-shows": kind}
    match form:
        case "png":
            return Response(png_of(seen_CHW), media_type="image/png", headers=receipt)
        case "npy":
            return Response(_npy(seen_CHW), media_type="application/x-npy", headers=receipt)
        case _:
            images = {name: base64.b64encode(data).decode() for name, data in (("png", png_of(seen_CHW)), ("npy", _npy(seen_CHW)))}
            return JSONResponse({**images, "shows": kind, "receipt": answer.receipt})


def end_with_parent() -> None:
    """End this process when the one that started it is gone, however it went: an orphan would hold on to the port."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_IDLE_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def _npy(seen_CHW: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, seen_CHW)
    return file.getvalue()
