"""Whose fault it is: what the server itself does wrong is never told as a fault of the request. Needs no server process."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("litserve", reason="litserve is not installed: pip install -e '.[serve]'")

from fastapi.testclient import TestClient

from export.runtime.manifest import ArtefactError, read_manifest
from export.runtime.sampler import CachedSampler
from export.serving.app import Served, build_server
from export.serving.asked import Asked
from export.serving.board import Board
from export.serving.rows import BadRowError, Row, RowError
from export.serving.worker import Made, SamplerAPI
from tc_lightning.errors import TokenCacheError


@pytest.fixture
def own(artefact: Path, tmp_path: Path) -> Path:
    """An artefact that may be changed."""
    return Path(shutil.copytree(artefact, tmp_path / "own"))


def touch(artefact: Path) -> None:
    """Write into an artefact that is in use."""
    with (artefact / "weights.data").open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


def body_of(response: Any) -> Any:
    return json.loads(bytes(response.body))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RowError("latents became NaN"), 422),
        (BadRowError("label 9 is out of range"), 400),
        (TokenCacheError("the decoder ran out of memory"), 500),
        (ArtefactError("weights.data was changed"), 500),
    ],
)
def test_only_what_a_row_brought_about_is_a_fault_of_the_request(artefact: Path, error: TokenCacheError, status: int) -> None:
    api = SamplerAPI(artefact, Board(1, 1), 1, 0.0, "ready")
    response = api.encode_response(Made(Asked(Row({"label": 1}), "png"), error))
    assert (response.status_code, body_of(response)) == (status, {"detail": str(error)})


def test_an_artefact_that_is_changed_under_a_server_is_its_own_fault_and_its_health_says_so(own: Path) -> None:
    board = Board(2, 1)
    api = SamplerAPI(own, board, 1, 0.0, "ready", threads=1)
    api.setup("cpu")
    client = TestClient(build_server(Served(own), read_manifest(own, check_files=False), board).app)
    asked = [Asked(Row({"label": 1}), "png")]
    assert [api.encode_response(made).status_code for made in api.predict(asked)] == [200]
    assert (client.get("/health").status_code, client.get("/health").json()["status"], api.health()) == (200, "ready", True)
    touch(own)
    (response,) = [api.encode_response(made) for made in api.predict(asked)]
    assert response.status_code == 500
    assert "weights.data was changed while a sampler was using it" in body_of(response)["detail"]
    told = client.get("/health")
    assert (told.status_code, told.json()["status"], told.json()["detail"]) == (503, "failed", body_of(response)["detail"])
    assert not api.health()


def test_the_first_reason_of_a_fault_stays_and_has_room() -> None:
    board = Board(1, 1)
    assert board.fault is None
    board.fail("é" * 5000 + "\ud800")
    board.fail("another")
    assert board.fault is not None
    assert board.fault.startswith("é" * 2000)


class Tensor:
    """As Triton's, of a request and of a response."""

    def __init__(self, name: str, value: np.ndarray) -> None:
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._value


class TritonError:
    """As Triton's."""

    CANCELLED, INVALID_ARG, INTERNAL = "cancelled", "invalid", "internal"

    def __init__(self, words: str, code: str) -> None:
        self.words, self.code = words, code


class InferenceResponse:
    """As Triton's."""

    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.output_tensors, self.error = output_tensors, error


def test_triton_is_told_whose_fault_it_is(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = SimpleNamespace(Tensor=Tensor, TritonError=TritonError, InferenceResponse=InferenceResponse)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    monkeypatch.delitem(sys.modules, "export.serving.triton_model", raising=False)
    model = importlib.import_module("export.serving.triton_model").TritonPythonModel()
    monkeypatch.delitem(sys.modules, "export.serving.triton_model")
    model._sampler, model._batches = CachedSampler(own, threads=1), 0
    model._metrics = SimpleNamespace(count=lambda *_: None)

    def ask(*rows: tuple[int, float]) -> Any:
        label, guidance = np.array([[label] for label, _ in rows]), np.float32([[scale] for _, scale in rows])
        inputs = [Tensor("label", label), Tensor("seed", np.zeros_like(label)), Tensor("guidance", guidance)]
        request = SimpleNamespace(inputs=lambda: inputs, requested_output_names=lambda: ["latent"], is_cancelled=lambda: False)
        (response,) = model.execute([request])
        return response

    assert ask((1, 1.5)).error is None
    for rows, words in (
        ([(1, 1.5), (9, 1.5)], "row 1: label 9 is out of range"),
        ([(1, 1e38), (1, 1.5)], "row 0: latents became NaN"),
        ([(9, 1.5)], "label 9 is out of range"),
    ):
        error = ask(*rows).error
        assert (error.code, error.words.startswith(words)) == (TritonError.INVALID_ARG, True)
    touch(own)
    error = ask((1, 1.5), (2, 1.5)).error
    assert (error.code, "weights.data was changed" in error.words) == (TritonError.INTERNAL, True)
