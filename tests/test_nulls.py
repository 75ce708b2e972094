"""Null values that are no numbers: stored rows, a request's own, and those that both halves share; in torch and in artefacts."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import worst_error
from plans import make_plan
from test_pixart_export import PIXART, SIGNATURE, make_pixart

from export.compiler.compile import export_artefact
from export.runtime.manifest import ArtefactError
from export.runtime.sampler import CachedSampler
from export.verify import rebuild_teacher
from tc_lightning.errors import PlanError, TeacherError, TokenCacheError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, save_teacher, teacher_digest
from tc_lightning.models.conditions import Given
from tc_lightning.models.pixart import PixArtConfig
from tc_lightning.plan.conditions import Condition
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.nulls import checked_stored, with_nulls
from tc_lightning.plan.rows_file import read_nulls, read_rows, write_arrays
from tc_lightning.plan.segments import compute, skip
from tc_lightning.rollout.sampling import given_for, model_signature, noise_for, sample

CONDITIONS = (
    Condition("text", "fp32", (2,), "stored"),
    Condition("mask", "int64", (2,), "stored"),
    Condition("size", "fp32", (1,), "same"),
    Condition("kind", "int64", (), 4, 4),
)
GIVEN = {
    "text": np.float32([[1, 2], [3, 4]]),
    "mask": np.array([[1, 1], [1, 0]]),
    "size": np.float32([[7], [8]]),
    "kind": np.array([0, 3]),
}
NULLS = {"text": np.float32([[-1, -2]]), "mask": np.array([[1, 0]])}
PLAN = make_plan(SIGNATURE, ((compute(0, 4),), (compute(0, 2), skip(2, 4, 1))), Guidance(2.0, 4))
NEGATIVE = {"text": np.random.default_rng(3).normal(size=(2, 5, 6)).astype(np.float32), "text_mask": np.array([[1, 1, 1, 0, 0]] * 2)}


def torch_latents(given: Given) -> np.ndarray:
    return sample(PIXART, PLAN, noise_for(5, range(given.images), PIXART), given).numpy()


def arrays(given: Given) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in given.items()}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nulls") / "artefact"
    export_artefact(PIXART, PLAN, out, "fp32", "cpu", 2, lambda _: None)
    return out


def test_a_guided_step_computes_the_rows_given_and_then_the_null_ones() -> None:
    rows = with_nulls(CONDITIONS, GIVEN, NULLS)
    assert rows["text"].tolist() == [[1, 2], [3, 4], [-1, -2], [-1, -2]]
    assert rows["mask"].tolist() == [[1, 1], [1, 0], [1, 0], [1, 0]]
    assert rows["size"].tolist() == [[7], [8], [7], [8]]
    assert rows["kind"].tolist() == [0, 3, 4, 4]
    own = with_nulls(CONDITIONS, GIVEN, NULLS | {"text": np.float32([[5, 5], [6, 6]]), "kind": np.array([2])})
    assert own["text"].tolist() == [[1, 2], [3, 4], [5, 5], [6, 6]]
    assert own["kind"].tolist() == [0, 3, 2, 2]


@pytest.mark.parametrize("negative", [{}, {"text": np.float32([[5, 5], [6, 6]])}])
def test_torch_doubles_as_numpy_does(negative: dict[str, np.ndarray]) -> None:
    tensors = ({name: torch.from_numpy(value) for name, value in part.items()} for part in (GIVEN, negative))
    rows, expected = Given(*tensors).with_nulls(CONDITIONS, NULLS), with_nulls(CONDITIONS, GIVEN, NULLS | negative)
    assert {name: value.numpy().tolist() for name, value in rows.items()} == {n: v.tolist() for n, v in expected.items()}
    assert all(rows[c.name].numpy().dtype == expected[c.name].dtype for c in CONDITIONS)


def test_a_plan_holds_the_word_and_refuses_others() -> None:
    for condition in CONDITIONS:
        assert Condition.from_json(condition.to_json(), "c") == condition
    with pytest.raises(PlanError, match="neither a number nor one of stored, same"):
        Condition("text", "fp32", (2,), "store")
    with pytest.raises(PlanError, match="expected a number, stored, same or null, found"):
        Condition.from_json(CONDITIONS[0].to_json() | {"null": "store"}, "c")


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ({"size": np.float32([[1]])}, "a null value of size was given; the model stores those of text, mask"),
        ({"text": np.float32([[1, 2], [3, 4]])}, "the null value of text has 2 rows: give one"),
        ({"text": np.float32([[1, 2, 3]])}, r"the null value: text has the shape \[1, 3\]"),
        ({"text": np.float32([[1, np.nan]])}, "the null value: text holds NaN"),
    ],
)
def test_stored_values_that_no_network_can_have_are_refused(rows: dict[str, np.ndarray], fault: str) -> None:
    with pytest.raises(TokenCacheError, match=fault):
        checked_stored(CONDITIONS, rows)


def test_a_teachers_file_keeps_its_null_values_and_they_name_it(tmp_path: Path) -> None:
    save_teacher(PIXART, tmp_path / "pixart.safetensors")
    loaded = load_teacher(TeacherSpec(str(tmp_path / "pixart.safetensors")))
    assert loaded.nulls is not None
    assert PIXART.nulls is not None
    assert {n: (v.dtype, v.tolist()) for n, v in loaded.nulls.items()} == {n: (v.dtype, v.tolist()) for n, v in PIXART.nulls.items()}
    assert teacher_digest(loaded) == teacher_digest(PIXART)
    loaded.nulls = {**loaded.nulls, "text": loaded.nulls["text"] + 1}
    assert teacher_digest(loaded) != teacher_digest(PIXART)
    loaded.nulls = None
    save_teacher(loaded, tmp_path / "without.safetensors")
    assert load_teacher(TeacherSpec(str(tmp_path / "without.safetensors"))).nulls is None


def test_null_rows_of_a_conditions_file_are_the_teachers(tmp_path: Path) -> None:
    save_teacher(PIXART, tmp_path / "pixart.safetensors")
    assert PIXART.examples is not None
    null = {"null.text": np.ones((1, 5, 6), np.float32), "null.text_mask": np.array([[1, 0, 1, 0, 0]])}
    np.savez(tmp_path / "texts.npz", **PIXART.examples, **null)  # type: ignore[arg-type]
    spec = TeacherSpec(str(tmp_path / "pixart.safetensors"), conditions=str(tmp_path / "texts.npz"))
    loaded = load_teacher(spec)
    assert loaded.nulls is not None
    assert np.array_equal(loaded.nulls["text"], null["null.text"])
    assert np.array_equal(loaded.nulls["text_mask"], null["null.text_mask"])
    np.savez(tmp_path / "texts.npz", **PIXART.examples, **{"null.resolution": np.ones((1, 2), np.float32)})  # type: ignore[arg-type]
    with pytest.raises(TokenCacheError, match="resolution, of which the model has no null value: it has those of text, text_mask"):
        load_teacher(spec)


def test_guidance_without_a_stored_value_is_refused_in_words(tmp_path: Path) -> None:
    model = make_pixart()
    model.nulls = {"text": np.zeros((1, 5, 6), np.float32)}
    with pytest.raises(TeacherError, match=r"needs a null value of text_mask, and none .* a row of it, named null\.text_mask"):
        export_artefact(
            model, make_plan(model_signature(model), PLAN.steps, PLAN.guidance), tmp_path / "a", "fp32", "cpu", 2, lambda _: None
        )
    assert not (tmp_path / "a").exists()


def test_an_artefact_leads_away_from_what_is_stored_or_from_what_a_request_brings(artefact: Path) -> None:
    sampler, given = CachedSampler(artefact), given_for(3, range(2), PIXART)
    plain, against = torch_latents(given), Given(given, {name: torch.from_numpy(value) for name, value in NEGATIVE.items()})
    assert worst_error(sampler.sample(conditions=arrays(given), seed=5).latents, plain) < 1e-4
    result = sampler.sample(conditions=arrays(given), seed=5, negative=NEGATIVE)
    assert worst_error(result.latents, torch_latents(against)) < 1e-4
    assert worst_error(result.latents, plain) > 1e-2
    assert result.receipt["negative"] == {"text": [2, 5, 6], "text_mask": [2, 5]}
    stored = {name: value.tolist() for name, value in sampler.nulls.items()}
    same = sampler.sample(conditions=arrays(given), seed=5, negative=stored).latents
    assert np.array_equal(same, sampler.sample(conditions=arrays(given), seed=5).latents)


def test_negatives_stay_with_their_images_where_a_request_is_split(artefact: Path) -> None:
    given = arrays(given_for(3, range(3), PIXART))
    negative = {name: np.concatenate([value, value[:1] * 0 + 1]) for name, value in NEGATIVE.items()}
    whole = CachedSampler(artefact).sample(conditions=given, seed=5, negative=negative).latents
    split = CachedSampler(artefact, max_batch=1)
    assert worst_error(split.sample(conditions=given, seed=5, negative=negative).latents, whole) < 1e-5
    one = {name: value[:1] for name, value in negative.items()}
    shared = CachedSampler(artefact).sample(conditions=given, seed=5, negative=one).latents
    assert worst_error(split.sample(conditions=given, seed=5, negative=one).latents, shared) < 1e-5


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        ({"guidance": 1.0, "negative": NEGATIVE}, "negative was given, and guidance is 1"),
        ({"negative": {"resolution": np.float32([[1, 1]])}}, "negative names resolution, of which the model has no null value"),
        ({"negative": {"text": NEGATIVE["text"][:, :4]}}, r"the null value: text has the shape \[2, 4, 6\]"),
        ({"negative": {"text": np.zeros((3, 5, 6))}}, "has 3 rows: give one for all, or one for each of the 2 images"),
    ],
)
def test_requests_that_cannot_have_a_negative_are_refused(artefact: Path, asked: dict[str, Any], fault: str) -> None:
    with pytest.raises(TokenCacheError, match=fault):
        CachedSampler(artefact, preload=False).sample(conditions=arrays(given_for(3, range(2), PIXART)), **asked)


def test_torch_refuses_them_alike() -> None:
    given = given_for(3, range(2), PIXART)
    tensors = {name: torch.from_numpy(value) for name, value in NEGATIVE.items()}
    unguided = dataclasses.replace(PLAN, guidance=Guidance(1.0, 4))
    with pytest.raises(TokenCacheError, match=r"negative \(text, text_mask\) was given, and guidance is 1"):
        sample(PIXART, unguided, noise_for(5, range(2), PIXART), Given(given, tensors))
    with pytest.raises(TokenCacheError, match="negative names resolution"):
        torch_latents(Given(given, {"resolution": given["resolution"]}))
    with pytest.raises(TokenCacheError, match="negative has 1 row of text for 2 images"):
        torch_latents(Given(given, {"text": tensors["text"][:1]}))


def test_an_artefact_whose_null_values_are_gone_or_changed_is_refused(artefact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))
    write_arrays(copy / "nulls.npz", {name: value + 1 for name, value in read_nulls(copy / "nulls.npz", PIXART.conditions).items()})
    with pytest.raises(ArtefactError, match=r"nulls\.npz is damaged: its sha256"):
        CachedSampler(copy)
    (copy / "nulls.npz").unlink()
    with pytest.raises(ArtefactError, match=r"nulls\.npz is missing"):
        CachedSampler(copy)


def test_a_text_to_lead_away_from_has_to_bring_its_mask(artefact: Path) -> None:
    """With the mask of the stored null text all tokens but its own would be left out without a word."""
    given = given_for(3, range(2), PIXART)
    alone = {"text": NEGATIVE["text"]}
    with pytest.raises(TokenCacheError, match="a null value of text was given, and none of text_mask: they belong together"):
        CachedSampler(artefact).sample(conditions=arrays(given), negative=alone)
    with pytest.raises(TokenCacheError, match="belong together"):
        torch_latents(Given(given, {name: torch.from_numpy(value) for name, value in alone.items()}))


def test_a_file_of_rows_has_all_of_the_null_values_that_are_stored_or_none(tmp_path: Path) -> None:
    save_teacher(PIXART, tmp_path / "teacher.safetensors")
    np.savez(tmp_path / "rows.npz", **PIXART.examples, **{"null.text": NEGATIVE["text"][:1]})  # type: ignore[arg-type]
    with pytest.raises(TokenCacheError, match="none of text_mask: they belong together"):
        load_teacher(TeacherSpec(str(tmp_path / "teacher.safetensors"), conditions=str(tmp_path / "rows.npz")), lambda _: None)


def test_verify_rebuilds_a_teacher_with_the_artefacts_null_values(artefact: Path) -> None:
    model = rebuild_teacher(CachedSampler(artefact, preload=False))
    given = given_for(3, range(2), PIXART)
    assert np.array_equal(sample(model, PLAN, noise_for(5, range(2), PIXART), given).numpy(), torch_latents(given))


def test_a_run_without_guidance_needs_no_null_values(tmp_path: Path) -> None:
    model = make_pixart(PixArtConfig(8, 2, 4, 4, 24, depth=2, num_heads=3, text_tokens=5, text_width=24, project_text=False))
    model.nulls = None
    plan = make_plan(model.signature(teacher_digest(model)), ((compute(0, 2),), (skip(0, 2, 1),)), Guidance(1.0, 4))
    export_artefact(model, plan, tmp_path / "plain", "fp32", "cpu", 1, lambda _: None)
    assert not (tmp_path / "plain" / "nulls.npz").exists()
    given = {name: value[:1] for name, value in (model.examples or {}).items()}
    with pytest.raises(TokenCacheError, match="guidance is 1"):
        CachedSampler(tmp_path / "plain").sample(conditions=given, negative={"text": given["text"]})


def test_a_file_of_rows_gives_conditions_and_null_values(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", **GIVEN, **{"null.text": NULLS["text"]})  # type: ignore[arg-type]
    rows = read_rows(tmp_path / "rows.npz", CONDITIONS)
    assert {*rows.examples} == {*GIVEN}
    assert {*rows.nulls} == {"text"}
    write_arrays(tmp_path / "nulls.npz", {"text": NULLS["text"]})
    with pytest.raises(TokenCacheError, match=r"nulls\.npz lacks the null value of mask"):
        read_nulls(tmp_path / "nulls.npz", CONDITIONS)
