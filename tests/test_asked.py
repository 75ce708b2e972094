"""Bodies of requests: what they may ask for, and in which words the others are refused. Needs no server."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.runtime.manifest import read_manifest
from export.serving.asked import body_limit, read_asked
from export.serving.board import Board, Slots
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import SAME, STORED, Condition

TEXT = (Condition("text", "fp32", (2, 3), STORED), Condition("heard", "int64", (2,), SAME, mask=True))
TEXT_MANIFEST: dict[str, Any] = {"model": {"conditions": [c.to_json() for c in TEXT]}, "guidance": {"scale": 2.0}}
GIVEN = {"text": np.arange(6.0, dtype=np.float32).reshape(2, 3), "heard": np.array([1, 0])}


@pytest.fixture(scope="module")
def manifest(artefact: Path) -> dict[str, Any]:
    return read_manifest(artefact, check_files=False)


def packed(save: Any = np.savez, **arrays: Any) -> str:
    file = io.BytesIO()
    save(file, **arrays)
    return base64.b64encode(file.getvalue()).decode()


def asked(body: Any, manifest: dict[str, Any], examples: Any = None) -> Any:
    return read_asked(body if isinstance(body, bytes) else json.dumps(body).encode(), manifest, examples)


def test_a_label_and_what_goes_with_it(manifest: dict[str, Any]) -> None:
    found = asked({"label": 3, "seed": 2**63 - 1, "index": 5, "guidance": 2, "full": True, "format": "npy"}, manifest)
    assert (found.row.conditions["label"], found.row.seed, found.row.index) == (3, 2**63 - 1, 5)
    assert (found.row.guidance, found.row.full, found.form) == (2.0, True, "npy")
    plain = asked({"conditions": {"label": 3}, "guidance": None}, manifest)
    assert (plain.row.conditions["label"], plain.row.seed, plain.row.guidance, plain.form) == (3, 0, 1.5, "png")


@pytest.mark.parametrize(
    "body",
    [
        {"conditions": {name: value.tolist() for name, value in GIVEN.items()}},
        {"npz": packed(**{name: value[None] for name, value in GIVEN.items()})},
        {
            "npz": packed(
                np.savez_compressed,
                **{name: value[None].astype(np.float64 if name == "text" else int) for name, value in GIVEN.items()},
            )
        },
        {"example": 1},
    ],
)
def test_conditions_in_every_way_are_the_same(body: Any) -> None:
    examples = {name: np.stack([np.zeros_like(value), value]) for name, value in GIVEN.items()}
    row = asked(body, TEXT_MANIFEST, examples).row
    for name, value in GIVEN.items():
        assert np.array_equal(row.conditions[name], value)
    assert (row.conditions["text"].dtype, row.conditions["heard"].dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"label=3&seed=7", "the body is not JSON"),
        (b"\xff\xfe\x00", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body is not JSON"),
        ([3], "the body is JSON, but no object"),
        ({}, "the image's conditions are missing: give one of label, conditions, npz, example; the model takes label .classes 0 to 4"),
        ({"label": 3, "labels": 4, "Seed": 1}, "unknown field 'labels', 'Seed': a request has label, conditions"),
        ({"label": 3, "conditions": {"label": 3}}, "label and conditions were given: give one of"),
        ({"label": 3, "format": "jpeg"}, "unknown format 'jpeg': choose one of png, npy, json"),
        ({"label": 3, "format": ["png"]}, "unknown format"),
        ({"label": 5}, "label 5 is out of range"),
        ({"label": None}, "label has the type object"),
        ({"label": {"a": 1}}, "label has the type object"),
        ({"label": 3, "seed": None}, "seed None is out of range"),
        ({"label": 3, "seed": [1, 2]}, "seed .1, 2. is out of range"),
        ({"label": 3, "full": "no"}, "full 'no' is neither true nor false"),
        (b'{"label": 3, "guidance": NaN}', "guidance nan is not a number"),
        (b'{"label": 3, "guidance": 1e999}', "guidance inf is not a number"),
        ({"conditions": [3]}, "conditions is no object"),
        ({"conditions": {"text": 3}}, "the condition label is missing"),
        ({"example": 0}, "this server has none: start it with --conditions"),
        ({"npz": 3}, "npz is no text"),
        ({"npz": "%%%"}, "npz cannot be read"),
        ({"npz": base64.b64encode(b"PK nothing").decode()}, "npz cannot be read"),
        ({"npz": packed(label=np.array([1, 2]))}, r"npz: label has the shape \[2\]: give one row"),
        ({"npz": packed(label=np.array(1))}, r"npz: label has the shape \[\]: give one row"),
        ({"npz": packed(label=np.array([{"a": 1}], dtype=object))}, "npz cannot be read"),
        ({"npz": packed(np.savez_compressed, label=np.zeros((1, 10**6)))}, "npz unpacks to 8,000,128 bytes"),
    ],
)
def test_bodies_that_are_refused(manifest: dict[str, Any], body: Any, message: str) -> None:
    with pytest.raises(TokenCacheError, match=message):
        asked(body, manifest)


@pytest.mark.parametrize("number", [2, -1, 1.0, True, "1", None])
def test_examples_that_are_not_there(number: Any) -> None:
    with pytest.raises(TokenCacheError, match="is none of this server's: it has 0 to 1"):
        asked({"example": number}, TEXT_MANIFEST, {name: np.stack([value, value]) for name, value in GIVEN.items()})


def test_a_label_for_a_model_that_takes_none() -> None:
    with pytest.raises(TokenCacheError, match="labels are for models whose one condition is a class; this model's conditions are text"):
        asked({"label": 1}, TEXT_MANIFEST)


def test_damage_inside_of_an_archive(manifest: dict[str, Any]) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("label.npy", b"\x93NUMPY\x01\x00 what is this")
    with pytest.raises(TokenCacheError, match="npz"):
        asked({"npz": base64.b64encode(file.getvalue()).decode()}, manifest)


@pytest.mark.parametrize(("descr", "shape"), [("|V0", (1, 10**12)), ("|S0", (1, 10**12)), ("<U0", (1, 10**12)), ("|V8", (1,))])
def test_arrays_of_no_numbers_are_refused_before_they_are_looked_at(manifest: dict[str, Any], descr: str, shape: Any) -> None:
    """An element without bytes passes every limit of size: whoever walks the array never returns."""
    member, file = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("label.npy", member.getvalue() + bytes(8 if descr == "|V8" else 0))
    with pytest.raises(TokenCacheError, match=r"npz: label has the type .*: give numbers, label .classes 0 to 4"):
        asked({"npz": base64.b64encode(file.getvalue()).decode()}, manifest)


NULLS = {"text": np.full((1, 2, 3), 0.5, np.float32)}


def test_an_npz_may_bring_the_artefacts_own_null_values_and_no_others() -> None:
    """`export/encode.py` writes them into every file."""
    row, wide = {name: value[None] for name, value in GIVEN.items()}, (Condition("text", "fp32", (2, 3), 0.5), TEXT[1])
    numbered = {**TEXT_MANIFEST, "model": {"conditions": [c.to_json() for c in wide]}}
    for manifest, held in ((TEXT_MANIFEST, NULLS), (numbered, {})):
        body = {"npz": packed(**row, **{"null.text": NULLS["text"].astype(np.float64)})}
        found = read_asked(json.dumps(body).encode(), manifest, None, held).row.conditions
        assert {*found} == {*GIVEN}
        assert np.array_equal(found["text"], GIVEN["text"])
        for value, message in (
            (NULLS["text"] + 1, "null.text is another null value than the artefact's own"),
            (NULLS["text"][:, :1], r"the null value: text has the shape \[1, 1, 3\]"),
        ):
            with pytest.raises(TokenCacheError, match=message):
                read_asked(json.dumps({"npz": packed(**row, **{"null.text": value})}).encode(), manifest, None, held)
        with pytest.raises(TokenCacheError, match="negative names heard, of which the model has no null value"):
            read_asked(json.dumps({"npz": packed(**row, **{"null.heard": row["heard"]})}).encode(), manifest, None, held)


def test_null_values_that_nothing_is_led_away_from_are_let_be() -> None:
    unguided = {**TEXT_MANIFEST, "guidance": {"scale": 1.0}}
    body = {"npz": packed(**{name: value[None] for name, value in GIVEN.items()}, **{"null.text": NULLS["text"]})}
    assert np.array_equal(asked(body, unguided).row.conditions["text"], GIVEN["text"])


def test_an_npz_with_null_values_fits_into_a_body() -> None:
    large = (Condition("text", "fp32", (300, 4096), STORED),)
    value = np.ones((1, 300, 4096))
    body = json.dumps({"npz": packed(**{"text": value, "null.text": value})}).encode()
    assert len(body) < body_limit(large)
    manifest = {"model": {"conditions": [c.to_json() for c in large]}, "guidance": {"scale": 2.0}}
    assert read_asked(body, manifest, None, {"text": value.astype(np.float32)}).row.conditions["text"].shape == (300, 4096)


def test_any_row_of_a_model_fits_into_a_body() -> None:
    widest = {"text": np.full((2, 3), -1.2345678901234567e-300).tolist(), "heard": [1, 1]}
    assert len(json.dumps({"conditions": widest})) < body_limit(TEXT)
    large = (Condition("text", "fp32", (300, 4096), STORED),)
    assert 300 * 4096 * len("-1.2345678901234567e-300, ") < body_limit(large)


def test_slots_bound_what_waits_and_are_clean_when_taken_again() -> None:
    board = Board(2, 4)
    slots = Slots(board)
    first, second = slots.take(), slots.take()
    assert first is not None
    assert second is not None
    assert (slots.take(), slots.taken) == (None, 2)
    board.give_up(first)
    board.step(first, 3, 8)
    assert (board.given_up(first), board.given_up(second), board.progress(first)) == (True, False, (3, 8))
    slots.free(first)
    assert slots.take() == first
    assert (board.given_up(first), board.progress(first)) == (False, (0, 0))


def test_what_is_said_and_counted_on_a_board() -> None:
    board = Board(1, 4)
    assert board.said == {}
    board.say({"provider": "cpu", "words": "é"})
    board.count("images")
    board.count("steps", 8)
    board.ran_together(4)
    board.ran_together(4)
    assert board.said == {"provider": "cpu", "words": "é"}
    counts = board.counts
    assert (counts["images"], counts["steps"], counts["nan"], counts["batch_sizes"]) == (1, 8, 0, {"4": 2})
