"""Null values that files of conditions bring to a server: the artefact's own, or the server says no. Needs no server process."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_nulls import PLAN
from test_pixart_export import PIXART

pytest.importorskip("litserve", reason="litserve is not installed: pip install -e '.[serve]'")

from fastapi import HTTPException, Request

from export.compiler.compile import export_artefact
from export.runtime.manifest import read_manifest
from export.serving.app import Served, build_server
from export.serving.board import Board
from export.serving.front import Desk
from tc_lightning.errors import TokenCacheError
from tc_lightning.rollout.sampling import given_for

ROWS = {name: value.numpy() for name, value in given_for(3, range(1), PIXART).items()}


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of a model of texts, with guidance."""
    out = tmp_path_factory.mktemp("texts") / "artefact"
    export_artefact(PIXART, PLAN, out, "fp32", "cpu", 2, lambda _: None)
    return out


@pytest.fixture
def own() -> dict[str, np.ndarray]:
    """The null values of the artefact, as `export/encode.py` would write them."""
    assert PIXART.nulls is not None
    return {f"null.{name}": value for name, value in PIXART.nulls.items()}


def desk_of(artefact: Path, conditions: Path | None) -> Desk:
    served = Served(artefact, conditions=conditions)
    found: Desk = build_server(served, read_manifest(artefact, check_files=False), Board(1, 1)).app.state.desk
    return found


def others(own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return own | {"null.text": own["null.text"] + 1}


def test_a_file_of_conditions_with_other_null_values_is_refused_at_the_start(guided: Path, own: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "texts.npz"
    np.savez(file, **ROWS, **own)
    assert desk_of(guided, file).health()["examples"] == 1
    np.savez(file, **ROWS, **others(own))
    with pytest.raises(
        TokenCacheError, match=r"texts.npz: null.text is another null value than the artefact's own.*: leave null.text out"
    ):
        desk_of(guided, file)


def test_a_file_that_is_posted_with_other_null_values_is_refused(guided: Path, own: dict[str, Any]) -> None:
    desk = desk_of(guided, None)

    def take(**arrays: Any) -> Any:
        file = io.BytesIO()
        np.savez(file, **ROWS, **arrays)
        body = json.dumps({"npz": base64.b64encode(file.getvalue()).decode()}).encode()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        return asyncio.run(desk.take(Request({"type": "http", "method": "POST", "headers": []}, receive)))

    with pytest.raises(HTTPException, match=r"null.text is another null value than the artefact's own") as refused:
        take(**others(own))
    assert refused.value.status_code == 400
    asked = take(**own)
    assert {*asked.row.conditions} == {*ROWS}
    assert all(np.array_equal(asked.row.conditions[name], value[0]) for name, value in ROWS.items())
