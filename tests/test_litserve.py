"""A server process on this machine, and clients: every row gets the bytes that it would get alone, or an error of its own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("litserve", reason="litserve is not installed: pip install -e '.[serve]'")

from fastapi import HTTPException, Request

from export.grid import png_of
from export.runtime.manifest import NAME, sha256_of
from export.runtime.sampler import CachedSampler
from export.serve_load import bodies, line, measured
from export.serving.asked import Asked
from export.serving.board import Board
from export.serving.client import HOST, SCRIPT, Reply, Running, free_port, running
from export.serving.front import Desk
from export.serving.rows import Answer, Row
from export.serving.worker import GivenUpError, SamplerAPI
from tc_lightning.errors import TokenCacheError

MAX_BODY, QUEUE = 4096, 16
BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"label": 9}, 400, "label 9 is out of range: the model has classes 0 to 4"),
    ({"label": 1, "seed": -1}, 400, "seed -1 is out of range"),
    ({"label": 1, "guidance": "high"}, 400, "guidance 'high' is not a number"),
    ({"label": 1, "guidance": 1e38}, 422, "latents became NaN or infinite at step"),
    ({"label": 1, "colour": "red"}, 400, "unknown field 'colour'"),
]


@pytest.fixture(scope="module")
def alone(artefact: Path) -> CachedSampler:
    """What a row gets when nobody else asks."""
    return CachedSampler(artefact, threads=1)


@pytest.fixture(scope="module")
def server(artefact: Path) -> Iterator[Running]:
    limits = ("--threads", 1, "--max-batch", 4, "--batch-timeout", 100, "--queue", QUEUE, "--max-body", MAX_BODY)
    with running(artefact, *limits) as started:
        yield started


def latent_alone(sampler: CachedSampler, body: dict[str, Any]) -> np.ndarray:
    full = body.get("full", False)
    return sampler.sample([body["label"]], body.get("seed", 0), body.get("guidance"), body.get("index", 0), full).latents[0]


def latent_in(reply: Reply) -> np.ndarray:
    data = reply.body if "npy" in reply.headers["content-type"] else base64.b64decode(reply.json()["npy"])
    return np.load(io.BytesIO(data))


def test_200_requests_of_8_clients(server: Running, alone: CachedSampler) -> None:
    rng = random.Random(0)
    bodies: list[dict[str, Any]] = [
        {
            "label": rng.randrange(5),
            "seed": rng.randrange(2**63),
            "index": rng.randrange(9),
            "guidance": rng.choice((None, 0, 1.5, 4.0)),
        }
        | {"full": rng.random() < 0.25, "format": rng.choice(("png", "npy", "json"))}
        for _ in range(190)
    ] + [body for body, _, _ in BAD] * 2
    rng.shuffle(bodies)
    before, replies = server.ask("/metrics").json(), dict[int, Reply]()
    left, lock = iter(range(len(bodies))), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                place = next(left, None)
            if place is None:
                return
            replies[place] = server.ask("/predict", bodies[place])

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    wrong = {json.dumps(body): (status, words) for body, status, words in BAD}
    for place, body in enumerate(bodies):
        reply = replies[place]
        if json.dumps(body) in wrong:
            status, words = wrong[json.dumps(body)]
            assert (reply.status, words in reply.json()["detail"]) == (status, True)
            continue
        assert reply.status == 200, reply.body
        expected = latent_alone(alone, body)
        if body["format"] == "png":
            assert reply.body == png_of(expected)
        else:
            assert latent_in(reply).tobytes() == expected.tobytes()
        receipt = reply.json()["receipt"] if body["format"] == "json" else json.loads(reply.headers["x-receipt"])
        asked = {"labels": [body["label"]], "seed": body["seed"], "index": body["index"], "full_compute": body["full"]}
        assert {name: receipt[name] for name in asked} == asked
        assert receipt["guidance"]["scale"] == (1.5 if body["guidance"] is None else body["guidance"])

    now = server.ask("/metrics").json()
    full = sum(body.get("full", False) for body in bodies)
    assert now["full_images"] - before["full_images"] == full
    assert now["images"] - before["images"] == 190 - full
    assert now["nan"] - before["nan"] == 2
    assert now["refused"]["bad"] - before["refused"]["bad"] == 8
    assert now["waiting_or_running"] == 0
    assert sum(int(size) * count for size, count in now["batch_sizes"].items()) >= 192
    assert {"2", "3", "4"} & now["batch_sizes"].keys()


def test_steps_as_events(server: Running, alone: CachedSampler) -> None:
    body = {"label": 2, "seed": 5, "full": True}
    reply = server.ask("/events", body)
    assert (reply.status, reply.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    *steps, (last, image) = events_in(reply)
    assert {event for event, _ in steps} <= {"step"}
    counted = [data["step"] for _, data in steps]
    assert counted == sorted(set(counted))
    assert last == "image"
    latent = np.load(io.BytesIO(base64.b64decode(image["npy"])))
    assert latent.tobytes() == latent_alone(alone, body).tobytes()
    assert image["receipt"]["seed"] == 5
    ((event, data),) = [one for one in events_in(server.ask("/events", BAD[3][0])) if one[0] != "step"]
    assert (event, data["status"]) == ("error", 422)
    assert "NaN or infinite" in data["detail"]
    assert server.ask("/events", BAD[0][0]).status == 400


def events_in(reply: Reply) -> list[tuple[str, Any]]:
    blocks = [block.split("\n") for block in reply.body.decode().split("\n\n") if block.startswith("event: ")]
    return [(event.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for event, data in blocks]


def test_health_tells_what_really_runs(server: Running, artefact: Path, alone: CachedSampler) -> None:
    told = server.ask("/health").json()
    assert (told["status"], told["provider"], told["artefact"]) == ("ready", "cpu", "tiny")
    assert told["manifest_sha256"] == sha256_of(artefact / NAME)
    assert told["plan_digest"] == alone.manifest["plan_digest"]
    assert {*told["nodes_per_provider"]["condition"]} == {"CPUExecutionProvider"}
    assert told["process"] not in (os.getpid(), server.process.pid)
    assert server.ask("/ready").body == b"ok"
    assert server.ask("/nothing").status == 404
    assert server.ask("/predict").status == 405


@pytest.mark.parametrize("body", [b"", b"\x00\xff", b"[" * 3000, b"null", b'{"label": 1, "seed": 1e400}'])
def test_a_bad_body_is_told_and_the_server_stays(server: Running, body: bytes) -> None:
    reply = server.ask("/predict", body)
    assert (reply.status, {*reply.json()}) == (400, {"detail"})
    assert server.ask("/predict", {"label": 1}).status == 200


def test_a_body_that_is_too_large(server: Running) -> None:
    reply = server.ask("/predict", b'{"label": 1, "npz": "' + b"A" * MAX_BODY + b'"}')
    assert reply.status == 413
    assert f"more than {MAX_BODY:,} bytes" in reply.json()["detail"]


@pytest.mark.parametrize("path", ["/predict", "/events"])
def test_a_client_that_goes_away(server: Running, path: str) -> None:
    """The first row of a batch waits for others: meanwhile its client leaves, and it is not made."""
    before, body = server.ask("/metrics").json()["given_up"], b'{"label": 1, "full": true}'
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(50):
        with socket.create_connection((HOST, server.port)) as client:
            client.sendall(head + body)
            time.sleep(0.02)
        time.sleep(0.2)
        if server.ask("/metrics").json()["given_up"] > before:
            break
    else:
        pytest.fail("no request was given up")
    assert server.ask("/predict", {"label": 1}).status == 200


def test_more_requests_than_the_queue_takes(server: Running) -> None:
    """Those that are one too many are told to try again; the others get their images."""
    replies: list[Reply] = []
    threads = [threading.Thread(target=lambda: replies.append(server.ask("/predict", {"label": 1}))) for _ in range(4 * QUEUE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [reply for reply in replies if reply.status != 200]
    assert {reply.status for reply in refused} <= {503}
    assert all(reply.headers["retry-after"] == "1" for reply in refused)
    assert server.ask("/metrics").json()["refused"]["busy"] == len(refused)
    assert len(replies) - len(refused) >= QUEUE


def test_a_run_that_nobody_waits_for_stops_at_the_next_step(artefact: Path) -> None:
    board = Board(2, 2)
    api = SamplerAPI(artefact, board, 2, 0.0, "ready", threads=1)
    api.setup("cpu")
    asked = [Asked(Row({"label": 1}), "npy", 0), Asked(Row({"label": 2}, full=True), "npy", 1)]
    seen: list[int] = []
    note = board.step

    def step(slot: int, done: int, steps: int) -> None:
        note(slot, done, steps)
        if slot == 0:
            seen.append(done)
            if done == 3:
                board.give_up(0)

    board.step = step  # type: ignore[method-assign]
    first, second = api.predict(asked)
    assert isinstance(first.answer, GivenUpError)
    assert isinstance(second.answer, Answer)
    assert seen == [1, 2, 3]
    assert (api.encode_response(first).status_code, api.encode_response(second).status_code) == (499, 200)
    (again,) = api.predict(asked[:1])
    assert isinstance(again.answer, GivenUpError)
    assert seen == [1, 2, 3]  # it did not join a batch
    counts = board.counts
    assert (counts["given_up"], counts["images"], counts["full_images"]) == (2, 0, 1)


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=120)


def test_what_cannot_be_served_is_one_paragraph(artefact: Path, tmp_path: Path, server: Running) -> None:
    damaged = Path(shutil.copytree(artefact, tmp_path / "damaged"))
    weights = bytearray((damaged / "weights.data").read_bytes())
    weights[0] ^= 1
    (damaged / "weights.data").write_bytes(weights)
    for arguments, message in (
        ((tmp_path / "nothing",), "nothing"),
        ((artefact, "--port", server.port), f"cannot listen at 127.0.0.1, port {server.port}"),
        ((damaged, "--port", free_port()), "weights.data"),
    ):
        done = call(*arguments)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert done.stderr.startswith("error: ")
        assert message in done.stderr


def test_a_server_that_is_killed_and_started_again(artefact: Path, alone: CachedSampler) -> None:
    body = {"label": 3, "seed": 11, "format": "npy"}
    with running(artefact, "--threads", 1, "--max-batch", 1) as first:
        assert latent_in(first.ask("/predict", body)).tobytes() == latent_alone(alone, body).tobytes()
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
        until = time.monotonic() + 20
        while time.monotonic() < until:  # its own processes end too, and leave the port
            with contextlib.suppress(OSError), socket.create_connection((HOST, first.port)):
                time.sleep(0.1)
                continue
            break
    with running(artefact, "--threads", 1, "--max-batch", 1, port=first.port) as second:
        assert latent_in(second.ask("/predict", body)).tobytes() == latent_alone(alone, body).tobytes()


def test_what_does_not_become_ready_is_told(tmp_path: Path) -> None:
    with pytest.raises(TokenCacheError, match="did not become ready: error: "), running(tmp_path / "nothing"):
        pass


def test_a_desk_without_a_free_slot_refuses(alone: CachedSampler) -> None:
    async def take(desk: Desk, body: bytes) -> Asked:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return messages.pop()

        return await desk.take(Request({"type": "http", "method": "POST", "headers": []}, receive))

    desk = Desk(alone.manifest, Board(1, 4))
    first = asyncio.run(take(desk, b'{"label": 1}'))
    with pytest.raises(HTTPException, match="1 requests wait or run already") as refused:
        asyncio.run(take(desk, b'{"label": 1}'))
    assert (refused.value.status_code, desk.metrics()["refused"]["busy"]) == (503, 1)
    desk.free(first.slot)
    assert asyncio.run(take(desk, b'{"label": 1}')).slot == first.slot


def test_a_load_is_measured(server: Running) -> None:
    asked = bodies(server, 12, seed=0)
    assert asked == bodies(server, 12, seed=0)
    load = measured(server, asked, clients=4)
    assert len(load.ms) == 12
    assert sum(int(size) * count for size, count in load.batches.items()) == 12
    cells = line(4, 4, load).strip("| ").split(" | ")
    assert cells[:3] == ["4", "4", "12"]
    assert float(cells[3]) <= float(cells[4])
    with pytest.raises(TokenCacheError, match=r"a request failed: .*label 9 is out of range"):
        measured(server, [{"label": 9}], clients=1)
