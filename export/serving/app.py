"""LitServe around an artefact: one worker that holds it, one front, a page to try it, and a command that runs them."""

import dataclasses
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import litserve as ls
from fastapi import Depends, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from litserve.server import RegularRequestHandler, api_key_auth

from export.runtime.manifest import NAME, read_manifest, sha256_of
from export.runtime.negatives import stored_nulls
from export.serving.asked import Asked, require_own_nulls
from export.serving.board import Board
from export.serving.front import Desk, Events
from export.serving.worker import SamplerAPI, end_with_parent
from tc_lightning.errors import TokenCacheError, first_line
from tc_lightning.plan.conditions import Conditions, conditions_from_json
from tc_lightning.plan.given import Arrays
from tc_lightning.plan.rows_file import read_rows

PAGE = Path(__file__).with_name("page.html")
LIT_READY = "/ready"  # LitServe's own, in one word
# The page is one file; nothing else may be loaded, or framed.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"


@dataclasses.dataclass(frozen=True)
class Served:
    """What is served, and how.

    Args:
        artefact: its folder.
        host: address to listen at.
        port: port to listen at.
        max_batch: rows of the largest batch.
        batch_timeout: seconds that the first row of a batch waits for others.
        queue: requests that may wait or run at a time.
        timeout: seconds that a request may wait before it runs.
        max_body: bytes of the body of a request; None: as many as the conditions need.
        conditions: a `.npz` file of rows that requests may name by number.
        runtime: further arguments of `CachedSampler`.
    """

    artefact: Path
    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 8
    batch_timeout: float = 0.005
    queue: int = 64
    timeout: float = 600.0
    max_body: int | None = None
    conditions: Path | None = None
    runtime: dict[str, Any] = dataclasses.field(default_factory=dict)


def serve(served: Served) -> None:
    """Serve until interrupted.

    Raises:
        TokenCacheError: if the artefact, its provider or the port cannot be used, or the worker ends.
    """
    manifest = read_manifest(served.artefact, check_files=False)
    _require_free(served.host, served.port)
    board = Board(served.queue, served.max_batch)
    server = build_server(served, manifest, board)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C: LitServe then ends its processes
    os.register_at_fork(after_in_child=end_with_parent)
    print(f"loading {served.artefact} ({manifest['plan_summary']}), and running batches of 1 to {served.max_batch}", flush=True)
    try:
        server.run(served.host, served.port, num_api_servers=1, log_level="warning", generate_client_file=False)
    except (RuntimeError, EOFError, OSError) as error:
        words = board.said.get("error") or f"the server ended ({first_line(error)}): its worker died. Start it again."
        raise TokenCacheError(words) from error


def build_server(served: Served, manifest: dict[str, Any], board: Board) -> ls.LitServer:
    """LitServe with the routes of this package.

    Raises:
        TokenCacheError: if the file of conditions, or what the artefact stores of them, cannot be used.
    """
    address = f"http://{served.host}:{served.port}/"
    ready = f"ready: {address} is a page to try it, POST {address}predict is for programs; Ctrl+C ends it"
    api = SamplerAPI(served.artefact, board, served.max_batch, served.batch_timeout, ready, **served.runtime)
    server = ls.LitServer(
        api,
        accelerator="cpu",  # LitServe's word for one worker; where the artefact runs is the runtime's affair
        timeout=served.timeout,
        healthcheck_path=LIT_READY,
        model_metadata={"plan_digest": manifest["plan_digest"], "plan": manifest["plan_summary"]},
        disable_openapi_url=True,
    )
    what = {
        "artefact": served.artefact.resolve().name,
        "manifest_sha256": sha256_of(served.artefact / NAME),
        "max_batch": served.max_batch,
        "api_key": server.setup_auth() is api_key_auth,  # whether requests must bring one
    }
    conditions = conditions_from_json(manifest["model"]["conditions"], "conditions")
    nulls = stored_nulls(served.artefact, manifest, conditions)
    desk = Desk(manifest, board, _examples(served, manifest, conditions, nulls), served.max_body, nulls)
    server.app.state.desk = desk
    handler = RegularRequestHandler(api, server)

    async def handle(asked: Asked) -> Response:
        return await handler.handle_request(asked, Asked)

    async def events(request: Request) -> Response:
        asked = await desk.take(request)
        return Events(desk, desk.started(dataclasses.replace(asked, form="json"), handle), asked.slot)

    async def health() -> Response:
        return JSONResponse({**what, **desk.health()}, HTTPStatus.OK if board.fault is None else HTTPStatus.SERVICE_UNAVAILABLE)

    async def metrics() -> Response:
        return JSONResponse(desk.metrics())

    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    routes = server.app.router.routes
    routes[:] = [route for route in routes if getattr(route, "path", "") != "/"]  # LitServe's own says that it runs
    _add(server, "/", "GET", page, is_open=True)
    _add(server, "/health", "GET", health, is_open=True)
    _add(server, "/metrics", "GET", metrics)
    _add(server, "/events", "POST", events)
    return server


def _add(server: ls.LitServer, path: str, method: str, route: Callable[..., Awaitable[Response]], is_open: bool = False) -> None:
    """A route, which asks for the server's key where there is one; an open one does not."""
    needed = [] if is_open else [Depends(server.setup_auth())]
    server.app.add_api_route(path, route, methods=[method], dependencies=needed, response_model=None)


def _examples(served: Served, manifest: dict[str, Any], conditions: Conditions, nulls: Arrays) -> dict[str, Any] | None:
    """Rows of the file of conditions, whose null values must be the artefact's.

    Raises:
        TokenCacheError: if they are others, or the file cannot be used.
    """
    if served.conditions is None:
        return None
    rows = read_rows(served.conditions, conditions)
    try:
        require_own_nulls(manifest, conditions, rows.nulls, nulls)
    except TokenCacheError as error:
        raise TokenCacheError(f"{served.conditions}: {error}") from error
    return rows.examples


def _require_free(host: str, port: int) -> None:
    """Raises TokenCacheError if the port cannot be listened at."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
            trial.listen()
        except OSError as error:
            raise TokenCacheError(f"cannot listen at {host}, port {port} ({error.strerror}): choose another with --port.") from error
