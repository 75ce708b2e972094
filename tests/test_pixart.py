"""PixArt against diffusers' own, with random weights, through a folder as diffusers writes it; and what is refused of such a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, save_teacher, teacher_digest
from tc_lightning.models.network import Network
from tc_lightning.models.pixart import PixArt, PixArtConfig

TINY: dict[str, Any] = {  # of diffusers' own tests, but for the depth
    "sample_size": 8,
    "num_layers": 4,
    "patch_size": 2,
    "attention_head_dim": 2,
    "num_attention_heads": 2,
    "in_channels": 4,
    "cross_attention_dim": 8,
    "out_channels": 8,
    "num_embeds_ada_norm": 8,
    "use_additional_conditions": False,
    "caption_channels": None,
}
PROJECTED = TINY | {"num_attention_heads": 6, "cross_attention_dim": 12, "caption_channels": 10}
SIZED = PROJECTED | {"use_additional_conditions": True, "interpolation_scale": 2}
LARGE = PROJECTED | {"sample_size": 128, "patch_size": 32, "use_additional_conditions": None}  # 1024 x 1024: sized, and interpolated
REAL = PROJECTED | {"attention_head_dim": 72, "num_attention_heads": 16, "num_layers": 2, "cross_attention_dim": 1152}
REAL |= {"caption_channels": 4096}
LENGTHS = (120, 7, 1)


def written(folder: Path, config: dict[str, Any]) -> PixArtTransformer2DModel:
    """A folder of diffusers, and the model in it."""
    torch.manual_seed(0)
    theirs = PixArtTransformer2DModel(**config).eval().requires_grad_(False)
    theirs.save_pretrained(folder)
    return theirs


def loaded(folder: Path) -> Network:
    return load_teacher(TeacherSpec(str(folder)), tell=lambda _: None)


def given_to(model: Network, seed: int = 1) -> dict[str, Tensor]:
    """Conditions of three images, with texts of different lengths."""
    generator, c = torch.Generator().manual_seed(seed), model.config
    mask = (torch.arange(c.text_tokens) < torch.tensor(LENGTHS)[:, None]).long()
    given = {"text": torch.randn(len(LENGTHS), c.text_tokens, c.text_width, generator=generator), "text_mask": mask}
    sizes = {"resolution": torch.tensor([[512.0, 1024.0]] * 3), "aspect_ratio": torch.tensor([[0.5], [1.0], [2.0]])}
    return given | (sizes if c.sized else {})


def expected(theirs: PixArtTransformer2DModel, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
    sizes = {name: given.get(name) for name in ("resolution", "aspect_ratio")}
    return theirs(x, given["text"], t, sizes, encoder_attention_mask=given["text_mask"], return_dict=False)[0]


@pytest.mark.parametrize("config", [TINY, PROJECTED, SIZED, LARGE, REAL], ids=["tiny", "projected", "sized", "large", "real width"])
def test_forward_is_that_of_diffusers(tmp_path: Path, config: dict[str, Any]) -> None:
    theirs = written(tmp_path, config)
    ours, t = loaded(tmp_path), torch.tensor([999.0, 500.0, 1.0])
    c, given = ours.config, given_to(ours)
    x = torch.randn(3, 4, c.input_size, c.input_size, generator=torch.Generator().manual_seed(2))
    out = ours(x, t, given)
    torch.testing.assert_close(out, expected(theirs, x, t, given), rtol=1e-5, atol=1e-5)
    assert out.shape[1] == 8
    assert torch.equal(ours.eps(x, t, given), out[:, :4])
    assert isinstance(ours, PixArt)
    assert (c.sized, c.project_text) == (config["use_additional_conditions"] is not False, config["caption_channels"] is not None)
    padded = given["text"] + (1 - given["text_mask"])[..., None] * torch.randn(c.text_width)
    torch.testing.assert_close(ours(x, t, given | {"text": padded}), out, rtol=1e-6, atol=1e-6)  # what is hidden is not heard
    assert not torch.allclose(ours(x, t, given | {"text_mask": given["text_mask"].flip(0)}), out, atol=1e-3)


def test_a_saved_one_is_read_again(tmp_path: Path) -> None:
    written(tmp_path / "theirs", SIZED)
    ours = loaded(tmp_path / "theirs")
    save_teacher(ours, tmp_path / "ours.safetensors")
    again = loaded(tmp_path / "ours.safetensors")
    assert again.config == ours.config
    assert teacher_digest(again) == teacher_digest(ours)
    x, t, given = torch.randn(3, 4, 8, 8), torch.tensor([9.0, 5.0, 1.0]), given_to(ours)
    assert torch.equal(again(x, t, given), ours(x, t, given))


def test_the_pipeline_tells_how_long_texts_are(tmp_path: Path) -> None:
    written(tmp_path / "transformer", TINY)
    assert loaded(tmp_path / "transformer").config.text_tokens == 120
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}', encoding="utf-8")
    assert loaded(tmp_path / "transformer").config.text_tokens == 300


def test_the_older_class_is_read_too(tmp_path: Path) -> None:
    """Public folders of PixArt-alpha were written before it had a class of its own."""
    theirs = written(tmp_path, PROJECTED)
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | {"_class_name": "Transformer2DModel"}
    raw |= {"double_self_attention": False, "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    ours = loaded(tmp_path)
    x, t, given = torch.randn(3, 4, 8, 8), torch.tensor([9.0, 5.0, 1.0]), given_to(ours)
    torch.testing.assert_close(ours(x, t, given), expected(theirs, x, t, given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_type": "gated"}, "attention_type is 'gated'; of a PixArt, 'default' alone is supported"),
        ({"caption_dropout": 0.1}, r"does not know what caption_dropout \(0.1\) means for a PixArt"),
        ({"cross_attention_dim": None}, "cross_attention_dim is null; a PixArt attends to a text"),
        ({"caption_channels": 10, "cross_attention_dim": 8}, "texts are projected to the network's width, 12"),
        ({"caption_channels": "many"}, "caption_channels is 'many'; a positive integer was expected, or null"),
        ({"interpolation_scale": 0}, "interpolation_scale is 0; a number above 0 was expected"),
        ({"use_additional_conditions": "yes"}, "use_additional_conditions is 'yes'; true, false or null"),
        ({"num_layers": 5}, r"does not fit a pixart of its shape: missing blocks\.4\..* fetch the folder again"),
        ({"sample_size": 7}, "input_size 7 is not a multiple of patch_size 2"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    written(tmp_path, PROJECTED)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(TeacherError, match=message):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_tokens": 0}, "text_tokens is 0; it must be at least 1"),
        ({"position_step": 0.0}, "position_step is 0.0; it must be positive and finite"),
        ({"out_channels": 3}, "out_channels 3 are fewer than in_channels 4"),
        ({"output": "sounds"}, "output is 'sounds'; choose one of"),
        ({"hidden_size": 16, "num_heads": 2, "sized": True}, "must be a multiple of 4, of 3"),
    ],
)
def test_shapes_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        PixArtConfig(**change)
