"""The page of a server, as a person uses it: in Chromium where there is one, and what it may load in any case."""

from __future__ import annotations

import base64
import io
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, opened
from test_pixart_export import PIXART, PLANS

pytest.importorskip("litserve", reason="litserve is not installed: pip install -e '.[serve]'")

from export.compiler.compile import export_artefact
from export.grid import png_of
from export.runtime.sampler import CachedSampler
from export.serving.app import PAGE
from export.serving.client import HOST, Running, running
from tc_lightning.rollout.sampling import given_for

README = Path(__file__).parents[1] / "README.md"
SEED = 9_007_199_254_740_993  # no number of JavaScript
NO_BROWSER = "no chromium on this machine: apt-get install chromium"


@pytest.fixture(scope="module")
def server(artefact: Path) -> Iterator[Running]:
    with running(artefact, "--threads", 1, "--max-batch", 2) as started:
        yield started


@pytest.fixture(scope="module")
def texts() -> dict[str, np.ndarray]:
    """Rows of conditions, as a file of them has."""
    return {name: value.numpy() for name, value in given_for(3, range(3), PIXART).items()}


@pytest.fixture(scope="module")
def text_artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pixart") / "artefact"
    export_artefact(PIXART, PLANS["by hand"](), out, "fp32", "cpu", 2, lambda _: None)
    return out


@pytest.fixture(scope="module")
def text_server(text_artefact: Path, texts: dict[str, Any]) -> Iterator[Running]:
    """A model whose conditions are a text and its mask, and examples of them."""
    np.savez(text_artefact.with_name("texts.npz"), **texts)
    with running(text_artefact, "--threads", 1, "--max-batch", 2, "--conditions", text_artefact.with_name("texts.npz")) as started:
        yield started


def test_a_text_is_an_example_a_file_or_lists(text_server: Running, text_artefact: Path, texts: dict[str, Any]) -> None:
    file, row = io.BytesIO(), {name: value[1:2] for name, value in texts.items()}
    np.savez(file, **row)
    lists = {name: value[0].tolist() for name, value in row.items()}
    expected = CachedSampler(text_artefact, threads=1).sample(seed=4, conditions=row).latents[0]
    assert text_server.ask("/health").json()["examples"] == 3
    for way in ({"example": 1}, {"npz": base64.b64encode(file.getvalue()).decode()}, {"conditions": lists}):
        reply = text_server.ask("/predict", {**way, "seed": 4, "format": "npy"})
        assert reply.status == 200, reply.body
        assert np.load(io.BytesIO(reply.body)).tobytes() == expected.tobytes()
    assert text_server.ask("/predict", {"example": 3}).status == 400


@pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
def test_an_example_of_a_text_in_a_browser(text_server: Running, text_artefact: Path, texts: dict[str, Any]) -> None:
    expected = CachedSampler(text_artefact, threads=1).sample(seed=7, conditions={name: value[2:] for name, value in texts.items()})
    with opened(f"http://{HOST}:{text_server.port}/") as page:
        page.wait("document.getElementById('example') !== null && document.getElementById('npz') !== null")
        page.run("document.getElementById('example').value = '2'; document.getElementById('make').click()")
        page.wait("[...document.querySelectorAll('img')].every((one) => !one.hidden)")
        shown = page.run("document.querySelector('#cached img').src").removeprefix("data:image/png;base64,")
    assert base64.b64decode(shown) == png_of(expected.latents[0])


def test_the_page_is_one_file(server: Running) -> None:
    reply = server.ask("/")
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert reply.body == PAGE.read_bytes()
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"""(src|href)=|@import|url\(|https?://""", reply.body.decode())


def test_the_lines_of_the_readme(server: Running) -> None:
    """As curl sends them: a form, by its content type."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    start, asked, told = next(block for block in blocks if "export/serve.py" in block).strip().splitlines()
    assert start == "pip install -e '.[serve]' && python export/serve.py artefacts/digits"
    found = re.fullmatch(r"curl -d '(.*)' http://127.0.0.1:8000(/\S+) --output \S+\.png", asked)
    assert found
    body, path = found.groups()
    with urllib.request.urlopen(f"http://{HOST}:{server.port}{path}", body.encode()) as reply:
        assert reply.headers["content-type"] == "image/png"
        assert json.loads(reply.headers["x-receipt"])["labels"] == [json.loads(body)["label"]]
    assert server.ask(told.removeprefix("curl http://127.0.0.1:8000")).json()["provider"] == "cpu"


@pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
def test_cached_beside_full_compute_in_a_browser(server: Running, artefact: Path, tmp_path: Path) -> None:
    sampler = CachedSampler(artefact, threads=1)
    with opened(f"http://{HOST}:{server.port}/") as page:
        page.wait("document.getElementById('label') !== null")
        assert page.run("document.getElementById('title').textContent").startswith(f"tiny: {sampler.manifest['plan_summary']}")
        page.run(f"document.getElementById('label').value = '3'; document.getElementById('seed').value = '{SEED}'")
        page.run("document.getElementById('make').click()")
        page.wait("[...document.querySelectorAll('img')].every((one) => !one.hidden && one.naturalWidth === 8)")
        for name, full in (("cached", False), ("full", True)):
            shown = page.run(f"document.querySelector('#{name} img').src").removeprefix("data:image/png;base64,")
            latent = sampler.sample([3], seed=SEED, full=full).latents
            assert base64.b64decode(shown) == png_of(latent[0])
            receipt = page.run(f"document.querySelector('#{name} pre').textContent")
            assert f'"seed": {SEED},' in receipt
            assert f'"full_compute": {str(full).lower()}' in receipt
            assert "steps read the cache" in page.run(f"document.querySelector('#{name} .said').textContent")
        page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        page.picture(tmp_path / "page.png")
        assert np.frombuffer((tmp_path / "page.png").read_bytes()[:4], "S4")[0] == b"\x89PNG"


@pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
def test_a_key_in_a_browser(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_SERVER_API_KEY", "opens")
    with running(artefact, "--threads", 1, "--max-batch", 1) as keyed, opened(f"http://{HOST}:{keyed.port}/") as page:
        page.wait("document.getElementById('label') !== null && document.getElementById('key').offsetParent !== null")
        page.run("document.getElementById('key').value = 'closes'; document.getElementById('make').click()")
        page.wait("document.querySelector('#full .said').classList.contains('error')")
        assert "Invalid API Key" in page.run("document.querySelector('#full .said').textContent")
        page.run("document.getElementById('key').value = 'opens'; document.getElementById('make').click()")
        page.wait("[...document.querySelectorAll('img')].every((one) => !one.hidden)")


@pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
def test_errors_and_cancelling_in_a_browser(server: Running) -> None:
    with opened(f"http://{HOST}:{server.port}/") as page:
        page.wait("document.getElementById('label') !== null")
        assert page.run("document.getElementById('key').offsetParent === null")
        page.run("document.getElementById('guidance').value = '1e38'; document.getElementById('make').click()")
        page.wait("document.querySelector('#full .said').classList.contains('error')")
        assert "NaN or infinite" in page.run("document.querySelector('#cached .said').textContent")
        page.run("document.getElementById('guidance').value = ''; document.getElementById('seed').value = '-1'")
        page.run("document.getElementById('form').noValidate = true; document.getElementById('make').click()")
        page.wait("/whole number/.test(document.querySelector('#full .said').textContent)")
        page.run("document.getElementById('seed').value = '1'")
        page.run("document.getElementById('make').click(); document.getElementById('cancel').click()")
        page.wait("document.querySelector('#cached .said').textContent === 'cancelled'")
        assert not page.run("document.getElementById('make').disabled")
