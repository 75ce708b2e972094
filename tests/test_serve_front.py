"""How requests are taken in: slots, limits of time and size, and words that can be sent. Needs no server process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("litserve", reason="litserve is not installed: pip install -e '.[serve]'")

from fastapi import HTTPException, Request
from fastapi.testclient import TestClient

from export.runtime.manifest import read_manifest
from export.serving import front
from export.serving.app import Served, build_server
from export.serving.asked import Asked
from export.serving.board import Board
from export.serving.front import Desk

Receive = Callable[[], Awaitable[dict[str, Any]]]
GOOD = b'{"label": 1}'


@pytest.fixture
def desk(artefact: Path) -> Desk:
    """With one slot, and room for 100 bytes."""
    return Desk(read_manifest(artefact, check_files=False), Board(1, 1), max_body=100)


async def take(desk: Desk, receive: Receive) -> Asked:
    return await desk.take(Request({"type": "http", "method": "POST", "headers": []}, receive))


def of(*messages: dict[str, Any]) -> Receive:
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return receive


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_slot_is_taken_before_the_body_is_read(desk: Desk) -> None:
    async def unread() -> dict[str, Any]:
        raise AssertionError("the body was read, and there is no slot")

    first = asyncio.run(take(desk, of(part(GOOD))))
    with pytest.raises(HTTPException, match="wait or run already") as refused:
        asyncio.run(take(desk, unread))
    assert refused.value.status_code == 503
    desk.free(first.slot)
    assert asyncio.run(take(desk, of(part(GOOD)))).slot == first.slot


@pytest.mark.parametrize(
    ("messages", "status", "reason"),
    [
        ([part(b"no JSON")], 400, "bad"),
        ([part(b"x" * 60, more=True), part(b"x" * 60)], 413, "too_large"),
        ([part(b'{"label"', more=True)], 408, "too_slow"),
        ([part(b'{"label"', more=True), {"type": "http.disconnect"}], 499, "gone"),
    ],
)
def test_a_request_that_is_refused_gives_its_slot_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, messages: list[dict[str, Any]], status: int, reason: str
) -> None:
    if reason == "too_slow":
        monkeypatch.setattr(front, "BODY_S", 0.05)
    with pytest.raises(HTTPException) as refused:
        asyncio.run(asyncio.wait_for(take(desk, of(*messages)), 20))
    counts = desk.metrics()
    assert (refused.value.status_code, counts["refused"][reason], counts["waiting_or_running"]) == (status, 1, 0)
    assert asyncio.run(take(desk, of(part(GOOD)))).row.conditions["label"] == 1


def test_a_body_is_parsed_where_others_need_not_wait_for_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    read_asked = front.read_asked

    def noted(*arguments: Any) -> Asked:
        threads.append(threading.get_ident())
        return read_asked(*arguments)

    monkeypatch.setattr(front, "read_asked", noted)
    asyncio.run(take(desk, of(part(GOOD))))
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


@pytest.mark.parametrize("path", ["/predict", "/events"])
@pytest.mark.parametrize("body", [rb'{"conditions": {"label": 1, "\ud800": 1}}', rb'{"label": "\ud800"}'])
def test_words_of_half_a_surrogate_pair_can_be_sent(artefact: Path, path: str, body: bytes) -> None:
    board = Board(1, 1)
    client = TestClient(build_server(Served(artefact), read_manifest(artefact, check_files=False), board).app)
    reply = client.post(path, content=body)
    assert (reply.status_code, {*reply.json()}) == (400, {"detail"})


def test_a_key_is_asked_of_requests_and_not_of_the_page_and_health(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def client() -> TestClient:
        return TestClient(build_server(Served(artefact), read_manifest(artefact, check_files=False), Board(1, 1)).app)

    without, key = client(), {"X-API-Key": "opens"}
    assert (without.get("/health").json()["api_key"], without.get("/metrics").status_code) == (False, 200)
    monkeypatch.setattr("litserve.server.LIT_SERVER_API_KEY", "opens")
    keyed = client()
    assert (keyed.get("/").status_code, keyed.get("/health").status_code, keyed.get("/health").json()["api_key"]) == (200, 200, True)
    for path in ("/predict", "/events"):
        assert {keyed.post(path, content=b"no JSON", headers=wrong).status_code for wrong in ({}, {"X-API-Key": "x"})} <= {401, 403}
        assert keyed.post(path, content=b"no JSON", headers=key).status_code == 400
    assert keyed.get("/metrics").status_code in (401, 403)
    assert keyed.get("/metrics", headers=key).status_code == 200


def test_what_can_be_sent_stays_as_it_is() -> None:
    assert front.encodable("é 🙂 \ud800") == "é 🙂 \\ud800"
