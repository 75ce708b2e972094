"""Captions of the digits, and a teacher that reads them: what the texts say, what is dropped, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data.captions import CAPTIONS, DIGITS, TOKENS, WIDTH, CaptionsDataModule, captions_of, encode
from tc_lightning.errors import TeacherError, TokenCacheError
from tc_lightning.learn.sample_grid import SampleGrid
from tc_lightning.learn.teacher import TeacherModule
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, save_teacher
from tc_lightning.models.conditions import Given
from tc_lightning.models.dit import DiTConfig
from tc_lightning.plan.given import PLANNING, REPORTING, TRAINING, part_for
from tc_lightning.plan.rows_file import write_arrays

SHAPE = {"input_size": 16, "in_channels": 1, "out_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "output": "pixels"}
READER = SHAPE | {"text_tokens": TOKENS, "text_width": WIDTH}
LABELLED = DiTConfig(input_size=8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10, learn_sigma=False)


def meant(caption: str) -> int:
    """The digit that a person would read."""
    numbers = [DIGITS.index(word) if word in DIGITS else int(word) for word in caption.split() if word in DIGITS or word.isdigit()]
    return sum(numbers)


def test_captions_say_their_digit() -> None:
    assert len(CAPTIONS) == 10 * 4 + 55
    assert {caption: meant(caption) for caption in CAPTIONS} == CAPTIONS
    assert {"a seven", "the digit three", "number 4", "two plus five", "an eight"} < set(CAPTIONS)
    assert captions_of(1)[-2:] == ["zero plus one", "one plus zero"]


def test_captions_are_texts_of_several_lengths_ended_padded_and_masked() -> None:
    rows = encode(["a seven", "a picture of the number seven", ""])
    assert rows["text"].shape == (3, TOKENS, WIDTH)
    assert rows["text_mask"].tolist() == [[1] * 3 + [0] * 5, [1] * 7 + [0], [1] + [0] * 7]
    assert (np.abs(rows["text"]).sum(-1) == WIDTH * rows["text_mask"]).all()
    assert (rows["text"][0, 2] == rows["text"][2, 0]).all()  # the end
    assert (rows["text"][0, 1] == rows["text"][1, 5]).all()  # the same word
    words = encode([word for caption in CAPTIONS for word in caption.split()])["text"][:, 0]
    assert len(np.unique(words, axis=0)) == len({word for caption in CAPTIONS for word in caption.split()})
    assert words[0].tolist() == encode(list(CAPTIONS)[:1])["text"][0, 0].tolist()


def test_texts_that_no_caption_resembles_are_refused() -> None:
    with pytest.raises(TokenCacheError, match=r"'a zebra plus' has unknown words \(zebra\): use .*seven"):
        encode(["a zebra plus"])
    with pytest.raises(TokenCacheError, match=r"has 8 words: 7 are the most"):
        encode(["a picture of the number seven plus two"])


def test_training_planning_and_reporting_each_have_captions_of_every_digit() -> None:
    for use in (TRAINING, PLANNING, REPORTING):
        assert {*(part_for({"digit": np.array([*CAPTIONS.values()])}, use) or {})["digit"].tolist()} == {*range(10)}


def test_batches_are_images_with_texts_of_their_digit() -> None:
    data = CaptionsDataModule(batch_size=4, num_val=8)
    data.setup("fit")
    images, given = next(iter(data.val_dataloader()))
    assert images.shape == (4, 1, 16, 16)
    table = {row.tobytes(): digit for row, digit in zip(data.examples["text"], CAPTIONS.values(), strict=True)}
    labels = data._held_out.labels[:4]
    assert [table[row.numpy().tobytes()] for row in given["text"]] == labels
    first = data._captioned
    seen = {first[0][1]["text"].numpy().tobytes() for _ in range(60)}
    assert {table[row] for row in seen} == {first.labels[0]}
    assert len(seen) > 1  # drawn anew
    assert len({data._held_out[0][1]["text"].numpy().tobytes() for _ in range(9)}) == 1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_dropped_conditions_are_the_null_values_row_by_row(share: float) -> None:
    module = TeacherModule(shape=READER, family="pixart")
    module.model.nulls = encode([""])
    own = {name: torch.from_numpy(value) for name, value in encode(list(CAPTIONS)[:6]).items()}
    dropped = torch.arange(6) < 6 * share
    found = module._with_nulls(Given(own), dropped)
    for row in range(6):
        expected = encode([""] if dropped[row] else list(CAPTIONS)[row : row + 1])
        assert {name: value[row].tolist() for name, value in found.items()} == {n: v[0].tolist() for n, v in expected.items()}
    labels = TeacherModule(LABELLED)._with_nulls(Given({"label": torch.arange(6)}), dropped)["label"]
    assert labels.tolist() == [10 if drop else label for label, drop in enumerate(dropped.tolist())]


def test_a_teacher_has_one_shape_of_its_family() -> None:
    with pytest.raises(TeacherError, match="set either `dit` or"):
        TeacherModule()
    with pytest.raises(TeacherError, match="set either `dit` or"):
        TeacherModule(LABELLED, shape={})
    with pytest.raises(TeacherError, match=r"the shape of a pixart cannot be .*wings"):
        TeacherModule(shape=READER | {"wings": 2}, family="pixart")
    with pytest.raises(TeacherError, match="a pixart has not the shape of a DiT"):
        TeacherModule(LABELLED, family="pixart")
    assert type(TeacherModule(shape={"hidden_size": 16, "num_heads": 2, "depth": 1}, family="sit").model).family == "sit"


def test_samples_in_training_are_of_rows_of_the_examples() -> None:
    model = TeacherModule(shape=READER, family="pixart").model
    model.examples, model.nulls = encode(list(CAPTIONS)), encode([""])
    grid = SampleGrid(images_per_row=2, max_rows=3, num_steps=2)
    given = grid._rows(model, torch.device("cpu"))
    assert given["text"].tolist() == [row for row in encode(list(CAPTIONS)[:3])["text"].tolist() for _ in range(2)]
    assert grid._sample(model, torch.device("cpu")).shape == (6, 1, 16, 16)
    assert SampleGrid(2, 3)._rows(TeacherModule(LABELLED).model, torch.device("cpu"))["label"].tolist() == [0, 0, 1, 1, 2, 2]


def test_examples_are_looked_for_where_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = TeacherModule(shape=READER, family="pixart").model
    model.nulls = encode([""])
    save_teacher(model, tmp_path / "tiny.safetensors")
    shipped = load_teacher(TeacherSpec("tiny.safetensors", conditions="data/digits_captions.npz")).examples or {}
    assert {name: value.tolist() for name, value in shipped.items()} == {n: v.tolist() for n, v in encode(list(CAPTIONS)).items()}
    (tmp_path / "data").mkdir()
    write_arrays(tmp_path / "data" / "digits_captions.npz", encode(["a seven"]))
    mine = load_teacher(TeacherSpec("tiny.safetensors", conditions="data/digits_captions.npz")).examples or {}
    assert len(mine["text"]) == 1
    with pytest.raises(TokenCacheError, match=re.escape("cannot read the conditions absent.npz")):
        load_teacher(TeacherSpec("tiny.safetensors", conditions="absent.npz"))
