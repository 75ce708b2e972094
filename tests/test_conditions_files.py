"""Files of conditions: which rows are for what, and images of all of them by command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from exporting import worst_error
from plans import make_plan
from test_pixart_export import PIXART, SIGNATURE
from toy import make_toy

from export import sample as command
from export.compiler.compile import export_artefact
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.network import Network
from tc_lightning.plan.given import PLANNING, REPORTING, TRAINING, part_for
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, skip
from tc_lightning.planner.image_choice import images
from tc_lightning.rollout.sampling import given_for, model_signature

PLAN = make_plan(SIGNATURE, ((compute(0, 4),), (compute(0, 2), skip(2, 4, 1))), Guidance(2.0, 4))


def numbered(rows: int) -> Network:
    """A toy whose examples tell which row they are."""
    toy = make_toy()
    toy.examples = {"mood": np.arange(rows, dtype=np.float32)[:, None, None] * np.ones((rows, 2, 3), np.float32)}
    return toy


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("files") / "artefact"
    export_artefact(PIXART, PLAN, out, "fp32", "cpu", 2, lambda _: None)
    return out


def test_no_row_serves_two_uses() -> None:
    parts = {use: part_for({"a": np.arange(11)}, use) or {} for use in (TRAINING, PLANNING, REPORTING)}
    assert {use: part["a"].tolist() for use, part in parts.items()} == {
        TRAINING: [0, 1, 4, 5, 8, 9],
        PLANNING: [2, 6, 10],
        REPORTING: [3, 7],
    }
    assert part_for(None, PLANNING) is None
    with pytest.raises(TokenCacheError, match=r"have 3 rows: .* give 4 of each condition at least"):
        part_for({"a": np.arange(3)}, TRAINING)


def test_planning_and_proofs_take_rows_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, seen = numbered(8), []
    assert {*images(toy, [0, 1, 2, 3])[1]["mood"].flatten().tolist()} == {2.0, 6.0}
    sample = CachedSampler.sample

    def watched(self: CachedSampler, **asked: object) -> object:
        seen.append({*np.asarray(asked["conditions"]["mood"]).flatten().tolist()})  # type: ignore[index]
        return sample(self, **asked)  # type: ignore[arg-type]

    monkeypatch.setattr(CachedSampler, "sample", watched)
    plan = make_plan(model_signature(toy), ((compute(0, 3),), (skip(0, 3, 1),)), Guidance(1.5, 3))
    export_artefact(toy, plan, tmp_path / "toy", "fp32", "cpu", 2, lambda _: None)
    assert seen
    assert set().union(*seen) == {3.0, 7.0}


def run_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
    command.main()


def test_every_row_of_a_file_becomes_an_image(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: value.numpy() for name, value in given_for(3, range(3), PIXART).items()}
    null = {"text": np.full((1, 5, 6), 0.5, np.float32), "text_mask": np.array([[1, 0, 0, 0, 0]])}
    np.savez(tmp_path / "rows.npz", **given, **{f"null.{name}": value for name, value in null.items()})  # type: ignore[arg-type]
    found = []
    sample = CachedSampler.sample
    monkeypatch.setattr(CachedSampler, "sample", lambda self, *a, **k: found.append(sample(self, *a, **k)) or found[-1])  # type: ignore
    words = (artefact, "--conditions", tmp_path / "rows.npz", "--seed", 5, "--out", tmp_path / "grid.png")
    run_command(monkeypatch, *words, "--receipt", tmp_path / "receipt.json")
    sampler = CachedSampler(artefact)
    assert worst_error(found[0].latents, sample(sampler, conditions=given, seed=5, negative=null).latents) < 1e-6
    assert worst_error(found[0].latents, sample(sampler, conditions=given, seed=5).latents) > 1e-3
    receipt = json.loads((tmp_path / "receipt.json").read_text(encoding="utf-8"))
    assert receipt["images"] == 3
    assert receipt["negative"] == {"text": [1, 5, 6], "text_mask": [1, 5]}
    run_command(monkeypatch, *words, "--guidance", 1.0)  # without guidance the file's null values have no use
    assert worst_error(found[1].latents, sample(sampler, conditions=given, seed=5, guidance=1.0).latents) < 1e-6


def test_a_file_that_the_artefact_cannot_take_is_refused(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "rows.npz", text=np.zeros((2, 5, 7), np.float32))
    with pytest.raises(TokenCacheError, match=r"rows\.npz: the condition text_mask, resolution, aspect_ratio is missing"):
        run_command(monkeypatch, artefact, "--conditions", tmp_path / "rows.npz", "--out", tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()
