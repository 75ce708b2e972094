"""Rows of several requests in one batch: each gets what it would get alone, or an error of its own."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pixart_export import PIXART, PLANS

from export.compiler.compile import export_artefact
from export.runtime.sampler import CachedSampler
from export.serving.rows import Answer, BadRowError, Row, RowError, answers, checked
from tc_lightning.errors import TokenCacheError
from tc_lightning.rollout.sampling import given_for

BAD = [
    (Row({"label": 5}), "label 5 is out of range: the model has classes 0 to 4"),
    (Row({"label": -1}), "label -1 is out of range"),
    (Row({"label": 1.0}), "label has the type float64"),
    (Row({"label": True}), "label has the type bool"),
    (Row({"label": "3"}), "label has the type"),
    (Row({"label": 10**30}), "label has the type object"),
    (Row({"label": [1, 2]}), r"label has the shape \[1, 2\]"),
    (Row({"label": [[1], [2, 3]]}), "label cannot be read as numbers"),
    (Row({}), "the condition label is missing"),
    (Row({"label": 1, "text": 2}), "the model has no condition text"),
    (Row({"label": 1}, seed=-1), "seed -1 is out of range"),
    (Row({"label": 1}, seed=2**63), "seed 9223372036854775808 is out of range"),
    (Row({"label": 1}, seed=1.5), "seed 1.5 is out of range"),
    (Row({"label": 1}, seed=True), "seed True is out of range"),
    (Row({"label": 1}, index=True), "index True is out of range"),
    (Row({"label": 1}, index=[1, 2]), r"index \[1, 2\] is out of range"),
    (Row({"label": 1}, index=None), "index None is out of range"),
    (Row({"label": 1}, guidance=float("nan")), "guidance nan is not a number"),
    (Row({"label": 1}, guidance=10**400), "is not a number that can be used"),
    (Row({"label": 1}, guidance="2"), "guidance '2' is not a number"),
    (Row({"label": 1}, guidance=True), "guidance True is not a number"),
    (Row({"label": 1}, guidance=[1.0]), r"guidance \[1.0\] is not a number"),
    (Row({"label": 1}, full=1), "full 1 is neither true nor false"),
    (Row({"label": 1}, full="yes"), "full 'yes' is neither true nor false"),
]


@pytest.fixture(scope="module")
def one_thread(artefact: Path) -> CachedSampler:
    return CachedSampler(artefact, threads=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> CachedSampler:
    """An artefact whose conditions are a text and its mask."""
    out = tmp_path_factory.mktemp("pixart") / "artefact"
    export_artefact(PIXART, PLANS["by hand"](), out, "fp32", "cpu", 2, lambda _: None)
    return CachedSampler(out, threads=1)


def alone(sampler: CachedSampler, row: Row) -> np.ndarray:
    conditions = {name: np.asarray(value)[None] for name, value in row.conditions.items()}
    return sampler.sample(None, row.seed, row.guidance, row.index, row.full, conditions=conditions).latents[0]


def drawn(count: int, seed: int) -> list[Row]:
    rng = random.Random(seed)
    scales = (None, 0.0, 1.0, 1.5, 4.25)
    return [
        Row({"label": rng.randrange(5)}, rng.randrange(2**63), rng.randrange(2**63), rng.choice(scales), rng.random() < 0.3)
        for _ in range(count)
    ]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_fails_alone_before_it_joins_a_batch(one_thread: CachedSampler, row: Row, message: str) -> None:
    with pytest.raises(TokenCacheError, match=message):
        checked(one_thread.manifest, row)


def test_bad_rows_among_good_ones(one_thread: CachedSampler) -> None:
    good = drawn(4, 1)
    mixed = [row for pair in zip(good, [BAD[0][0], BAD[10][0], BAD[17][0], BAD[-1][0]], strict=True) for row in pair]
    found = answers(one_thread, mixed)
    for row, answer in zip(good, found[::2], strict=True):
        assert isinstance(answer, Answer)
        assert np.array_equal(answer.latent, alone(one_thread, row))
    assert [type(answer) for answer in found[1::2]] == [BadRowError] * 4


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_every_row_gets_the_bytes_that_it_gets_alone(one_thread: CachedSampler, count: int) -> None:
    rows = drawn(count, count)
    for row, answer in zip(rows, answers(one_thread, rows), strict=True):
        assert isinstance(answer, Answer)
        assert answer.latent.tobytes() == alone(one_thread, row).tobytes()


def test_texts_of_a_batch_are_their_own(text: CachedSampler) -> None:
    given = {name: value.numpy() for name, value in given_for(3, range(5), PIXART).items()}
    rows = [Row({name: value[k] for name, value in given.items()}, seed=k, guidance=1.0 + k, full=k == 2) for k in range(5)]
    for row, answer in zip(rows, answers(text, rows), strict=True):
        assert isinstance(answer, Answer)
        assert answer.latent.tobytes() == alone(text, row).tobytes()
        assert answer.receipt["conditions"] == {name: [1, *value.shape[1:]] for name, value in given.items()}
    name = next(name for name, value in given.items() if value.dtype == np.float32)
    bad = dataclasses.replace(rows[0], conditions=rows[0].conditions | {name: np.full_like(given[name][0], np.nan)})
    with pytest.raises(TokenCacheError, match=f"{name} holds NaN"):
        checked(text.manifest, bad)


def test_a_row_that_became_nan_fails_alone(one_thread: CachedSampler) -> None:
    rows = [Row({"label": 0}, 7), Row({"label": 3}, 7, 1, guidance=1e38), Row({"label": 1}, 7, 2)]
    first, failed, last = answers(one_thread, rows)
    assert isinstance(failed, RowError)
    assert "latents became NaN or infinite at step" in str(failed)
    for row, answer in ((rows[0], first), (rows[2], last)):
        assert isinstance(answer, Answer)
        assert answer.latent.tobytes() == alone(one_thread, row).tobytes()


def test_the_receipt_of_a_row_holds_nothing_of_its_neighbours(one_thread: CachedSampler) -> None:
    rows = [Row({"label": 0}, 7, 3, 2.5), Row({"label": 3}, 8, 4, full=True), Row({"label": 1}, 9, 5)]
    first, full, last = (answer.receipt for answer in answers(one_thread, rows) if isinstance(answer, Answer))
    for receipt, row, place in ((first, rows[0], 0), (full, rows[1], 0), (last, rows[2], 1)):
        assert (receipt["seed"], receipt["index"], receipt["place"]) == (row.seed, row.index, place)
        assert receipt["labels"] == [row.conditions["label"]]
        assert receipt["guidance"]["scale"] == (row.guidance or 1.5)
        assert receipt["guidance"]["as_planned"] == (row.guidance is None)
        assert "indices" not in receipt
        assert "first_index" not in receipt
    assert (first["images"], full["images"], last["images"]) == (2, 1, 2)
    assert (first["full_compute"], full["full_compute"]) == (False, True)


def test_steps_are_told_to_the_rows_that_run_and_a_run_can_be_given_up(one_thread: CachedSampler) -> None:
    rows = [Row({"label": 0}, full=True), Row({"label": 1}), Row({"label": 2}), Row({"label": 9})]
    seen: list[tuple[tuple[int, ...], int, int]] = []
    steps, every = one_thread.manifest["steps"], one_thread.manifest["full_steps"]
    answers(one_thread, rows, lambda places, done, total: seen.append((tuple(places), done, total)))
    assert seen == [((1, 2), k, steps) for k in range(1, steps + 1)] + [((0,), k, every) for k in range(1, every + 1)]

    def give_up(places: Any, done: int, total: int) -> None:
        if 1 in places and done == 2:
            raise TokenCacheError("nobody waits for it")

    reference, *others = answers(one_thread, rows, give_up)
    assert isinstance(reference, Answer)
    assert [str(other) for other in others[:2]] == ["nobody waits for it"] * 2
    assert reference.latent.tobytes() == alone(one_thread, rows[0]).tobytes()
    (again,) = answers(one_thread, rows[1:2])
    assert isinstance(again, Answer)
    assert again.latent.tobytes() == alone(one_thread, rows[1]).tobytes()


def test_rows_need_the_runtime_alone() -> None:
    absent = ("torch", "lightning", "onnx", "safetensors", "PIL", "litserve", "fastapi", "tqdm")
    script = (
        f"import sys; sys.modules |= dict.fromkeys({absent}); import export.serving.rows, export.serving.asked, export.serving.client"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


def test_a_run_that_is_refused_is_refused_to_each_of_its_rows(artefact: Path) -> None:
    sampler = CachedSampler(artefact, threads=1)
    sampler.max_bytes = 1
    found = answers(sampler, drawn(3, 5))
    assert all("an image takes" in str(answer) for answer in found)
