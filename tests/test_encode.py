"""export/encode.py: prompts become the conditions that the pipeline's own `encode_prompt` makes of them, or what is wrong is said."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import change_json
from safetensors.torch import load_file, save_file
from text_pipelines import CLIP_TOKENS, CLIP_WIDTHS, T5_WIDTH, pixart_pipeline, sd3_pipeline, t5

from export import encode
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.plan.rows_file import Rows, read_rows

PROMPTS, NEGATIVE = ["A red cat", "dog", " two  birds on a wire"], "blurry"
FORMAT = {"format": "pt"}  # without which transformers reads no file
MAKE: dict[str, Callable[[Path], Any]] = {
    "alpha": pixart_pipeline,
    "sigma": lambda folder: pixart_pipeline(folder, sigma=True),
    "sd3": sd3_pipeline,
    "sd3 without t5": lambda folder: sd3_pipeline(folder, with_t5=False),
}


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str, prompts: str = "\n\n".join(PROMPTS)) -> dict[str, np.ndarray]:
    """What the command writes beside the pipeline."""
    place = folder.parent
    (place / "prompts.txt").write_text(prompts, encoding="utf-8")
    out = place / "conditions.npz"
    words = ["encode.py", str(folder), "--prompts", str(place / "prompts.txt"), "--out", str(out), "--batch", "2", *more]
    monkeypatch.setattr(sys, "argv", words)
    encode.main()
    with np.load(out) as file:
        return dict(file)


def own(pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
    """What the pipeline makes of the same: rows of the prompts, and of the negative one."""
    with torch.inference_mode():
        if type(pipeline).__name__ == "StableDiffusion3Pipeline":
            found = pipeline.encode_prompt(prompts, None, None, negative_prompt=[NEGATIVE] * len(prompts))
            names = ("text", "null.text", "pooled", "null.pooled")
        else:
            found = pipeline.encode_prompt(prompts, negative_prompt=NEGATIVE)
            names = ("text", "text_mask", "null.text", "null.text_mask")
    rows = {name: value.numpy() for name, value in zip(names, found, strict=True)}
    return {name: value[:1] if name.startswith("null.") else value for name, value in rows.items()}


@pytest.mark.parametrize("name", MAKE)
def test_rows_are_those_of_the_pipeline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = MAKE[name](tmp_path / "pipeline")
    written = command(monkeypatch, tmp_path / "pipeline", "--negative", NEGATIVE)
    expected = own(pipeline, [prompt.strip() for prompt in PROMPTS])
    assert written.keys() == expected.keys()
    for condition, rows in expected.items():
        assert written[condition].shape == rows.shape, condition
        assert np.abs(written[condition] - rows).max() < 1e-6, condition
    assert np.abs(written["text"][0] - written["text"][1]).max() > 0.01  # a prompt is felt
    assert np.abs(written["text"][0] - written["null.text"][0]).max() > 0.01


def test_they_are_what_the_network_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, too, which are no prompt's: the square that the transformer was made for. They have no null value."""
    pixart_pipeline(tmp_path / "pipeline", sized=True)
    command(monkeypatch, tmp_path / "pipeline")
    found, nulls = taken(tmp_path)
    assert found["resolution"].tolist() == [[16.0, 16.0]] * 3
    assert found["aspect_ratio"].tolist() == [[1.0]] * 3
    assert found["text_mask"].sum(1).tolist() == [11, 5, 21]  # letters, a mark for each word, and the end
    assert nulls.keys() == {"text", "text_mask"}
    assert nulls["text_mask"].sum() == 1  # of the empty prompt, its end


def test_and_what_stable_diffusion_3_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sd3_pipeline(tmp_path / "pipeline")
    command(monkeypatch, tmp_path / "pipeline", "--tokens", str(333 - CLIP_TOKENS))
    found, nulls = taken(tmp_path)
    assert found.keys() == nulls.keys() == {"text", "pooled"}


def taken(place: Path) -> Rows:
    """What the network in a pipeline reads of the file beside it."""
    network = load_teacher(TeacherSpec(str(place / "pipeline")), lambda _: None)
    return read_rows(place / "conditions.npz", network.conditions)


def test_t5_can_be_left_out_and_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pipeline"
    sd3_pipeline(folder)
    whole = command(monkeypatch, folder, "--tokens", "9")
    assert whole["text"].shape == (3, CLIP_TOKENS + 9, T5_WIDTH)
    assert not whole["text"][:, :CLIP_TOKENS, sum(CLIP_WIDTHS) :].any()
    (folder / "text_encoder_3" / "config.json").unlink()
    with pytest.raises(TokenCacheError, match=r"holds no config\.json"):
        command(monkeypatch, folder)
    without = command(monkeypatch, folder, "--no-t5", "--tokens", "9")
    assert np.array_equal(without["text"][:, :CLIP_TOKENS], whole["text"][:, :CLIP_TOKENS])
    assert not without["text"][:, CLIP_TOKENS:].any()
    assert np.array_equal(without["pooled"], whole["pooled"])


def test_a_prompt_that_is_cut_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pipeline"
    sd3_pipeline(folder)
    command(monkeypatch, folder, "--tokens", "12")  # of CLIP's seven, no prompt but one fits: T5 reads them whole
    told = capsys.readouterr()
    assert [line for line in told.out.splitlines() if line.startswith("cut")] == [
        "cut to 12 tokens, as the pipeline does: two  birds on a wire"
    ]
    assert "wrote" in told.out
    assert "3 prompts (text [19, 12], pooled [12])" in told.out
    assert all(f"{name}: 100%" in told.err for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    command(monkeypatch, folder, "--no-t5")
    assert "cut to 7 tokens, as the pipeline does: A red cat" in capsys.readouterr().out


def unread(folder: Path) -> None:
    """A folder without its T5's weights of one matrix."""
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file({name: value for name, value in state.items() if not name.endswith("layer.1.DenseReluDense.wo.weight")}, path, FORMAT)


def infinite(folder: Path) -> None:
    """Weights that no half precision holds."""
    model = t5()
    with torch.no_grad():
        model.encoder.final_layer_norm.weight.fill_(torch.inf)
    model.save_pretrained(folder / "text_encoder")


def garbled(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"nothing")


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no name of a class": (lambda f: change_json(f / "model_index.json", _class_name={}), r"is of a \{\}: prompts can be encoded"),
    "class": (lambda f: change_json(f / "model_index.json", _class_name="DiTPipeline"), "is of a DiTPipeline: prompts can be encoded"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "holds no model_index.json"),
    "no encoder": (lambda f: change_json(f / "model_index.json", text_encoder=[None, None]), "names no text_encoder"),
    "no tokenizer": (lambda f: change_json(f / "model_index.json", tokenizer=None), "names no tokenizer"),
    "other encoder": (
        lambda f: change_json(f / "model_index.json", text_encoder=["transformers", "UMT5EncoderModel"]),
        "UMT5EncoderModel.*T5EncoderModel was expected",
    ),
    "encoder not fetched": (lambda f: (f / "text_encoder" / "config.json").unlink(), "names a text_encoder.*holds no config.json"),
    "width": (lambda f: change_json(f / "transformer" / "config.json", caption_channels=16), "has 12 features.*takes 16"),
    "unknown field": (lambda f: change_json(f / "transformer" / "config.json", novelty=1), "does not know what novelty"),
    "weights lost": (unread, "has no weights .*DenseReluDense.wo.weight .2 are missing"),
    "weights damaged": (garbled, "cannot be read as a T5EncoderModel"),
    "not finite": (infinite, r"NaN or infinite numbers of text \(prompt 1\)"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pixart_pipeline(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A pipeline that may be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_pipeline_is_said(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, words = WRONG[name]
    damage(folder)
    with pytest.raises(TokenCacheError, match=words):
        command(monkeypatch, folder)
    assert {path.name for path in folder.parent.iterdir()} == {"pipeline", "prompts.txt"}  # nothing is half-written


def test_what_is_wrong_with_a_request_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        ("--no-t5",): "no other encoder than T5",
        ("--out", "conditions.txt"): "ends in .npz",
        ("--out", "absent/conditions.npz"): "absent does not exist",
        ("--prompts", "absent.txt"): "cannot read the prompts absent.txt",
    }
    for arguments, words in wrong.items():
        with pytest.raises(TokenCacheError, match=words):
            command(monkeypatch, folder, *arguments)
    with pytest.raises(TokenCacheError, match="holds no prompt"):
        command(monkeypatch, folder, prompts="\n  \n")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TokenCacheError, match=r"transformers.*pip install -e '\.\[text\]'"):
        command(monkeypatch, folder)
    assert {path.name for path in folder.parent.iterdir()} == {"pipeline", "prompts.txt"}
