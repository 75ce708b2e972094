"""Stable Diffusion 3: equal to diffusers' network, which is read from its folder, and what plans are told of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd3_models import ODD, SD30, SD35, SMALL, WIDE, asked, make_sd3, of_diffusers, saved

from tc_lightning.diffusion.flow import Flow
from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, save_teacher, teacher_digest
from tc_lightning.models.sd3 import SD3, SD3Config

WEIGHTS = "diffusion_pytorch_model.safetensors"


def require_same(theirs: Any, ours: SD3) -> None:
    """Agreement to 1e-5 with diffusers' network at several times."""
    config, given = ours.config, asked(ours.config, 3)
    x = torch.randn(3, config.in_channels, config.input_size, config.input_size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([1000.0, 437.5, 2.0])
    expected = of_diffusers(theirs, x, t, given)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, t, given), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [7, 154])
@pytest.mark.parametrize("values", [SD30, SD35, ODD], ids=["3", "3.5", "odd"])
def test_forward_is_diffusers(tmp_path: Path, values: dict[str, Any], tokens: int) -> None:
    theirs = saved(values, tmp_path)
    ours = load_teacher(TeacherSpec(str(tmp_path), text_tokens=tokens))
    assert ours.conditions[0].shape == (tokens, 32)
    require_same(theirs, ours)


def test_forward_is_diffusers_at_the_real_width(tmp_path: Path) -> None:
    require_same(saved(WIDE, tmp_path), load_teacher(TeacherSpec(str(tmp_path), text_tokens=77)))


def test_every_part_of_a_block_matters() -> None:
    """So that parity would notice if one were left out."""
    model, given = make_sd3(), asked(SMALL)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([900.0, 300.0])
    before = model(x, t, given)
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        assert not torch.allclose(model(x, t, given), before, atol=1e-4), name
        parameter.copy_(kept)


def test_the_last_block_gives_the_text_nothing() -> None:
    model, given = make_sd3(), asked(SMALL)
    terms = model.terms(torch.tensor([500.0, 20.0]), given)
    z = model.embed(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), terms.start)
    after = model.blocks[-1](z, terms.blocks[-1])
    assert torch.equal(after[:, :5], z[:, :5])
    assert not torch.equal(after[:, 5:], z[:, 5:])


# Its folder


def test_a_text_has_77_tokens_of_clip_and_256_of_t5_as_a_rule(tmp_path: Path) -> None:
    saved(SD30, tmp_path)
    model = load_teacher(TeacherSpec(str(tmp_path)))
    assert isinstance(model, SD3)
    assert model.conditions[0].shape == (333, 32)
    assert model.config.dual_blocks == ""
    assert model.schedule.span == (1000.0, 0.0)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_pipeline_tells_the_schedule_which_texts_of_another_length_leave_alone(tmp_path: Path) -> None:
    import diffusers

    saved(SD30, tmp_path / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=500).save_pretrained(tmp_path / "scheduler")
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    parts = {"transformer": "SD3Transformer2DModel", "scheduler": "FlowMatchEulerDiscreteScheduler", "vae": "AutoencoderKL"}
    index = {"_class_name": "StableDiffusion3Pipeline"} | {part: ["diffusers", name] for part, name in parts.items()}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    model = load_teacher(TeacherSpec(str(tmp_path), text_tokens=3))
    assert model.conditions[0].shape == (3, 32)
    assert model.schedule == Flow(500.0, 0.0)


def test_shards_and_own_files_hold_the_same(tmp_path: Path) -> None:
    for name, how in (("whole", {}), ("shards", {"max_shard_size": "40KB"})):
        saved(SD35, tmp_path / name, **how)
    whole, shards = (load_teacher(TeacherSpec(str(tmp_path / name), text_tokens=9)) for name in ("whole", "shards"))
    save_teacher(whole, tmp_path / "own.safetensors")
    own = load_teacher(TeacherSpec(str(tmp_path / "own.safetensors")))
    assert len(list((tmp_path / "shards").glob("*-of-*"))) > 1
    assert own.config == whole.config
    assert {teacher_digest(model) for model in (whole, shards, own)} == {teacher_digest(whole)}


def changed(path: Path, **values: Any) -> None:
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(raw | values), encoding="utf-8")


def reweighed(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(path / WEIGHTS)
    change(state)
    save_file(state, path / WEIGHTS)


BROKEN: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "a field": (lambda p: changed(p, axes_dims_rope=[2, 2]), ("axes_dims_rope ([2, 2])", "does not guess")),
    "a norm": (lambda p: changed(p, qk_norm="layer_norm"), ("qk_norm is 'layer_norm'", "'rms_norm'")),
    "a width": (lambda p: changed(p, caption_projection_dim=64), ("caption_projection_dim is 64", "of this shape has 32")),
    "channels": (lambda p: changed(p, out_channels=8), ("out_channels is 8", "of this shape has 4")),
    "a block": (lambda p: changed(p, dual_attention_layers=[0, 4]), ("dual_blocks is '0 4'", "0 to 3")),
    "no number": (lambda p: changed(p, dual_attention_layers=["0"]), ("dual_attention_layers is ['0']",)),
    "a word": (lambda p: changed(p, num_layers="4"), ("num_layers is '4'", "a number was expected")),
    "no patch": (lambda p: changed(p, patch_size=0), ("patch_size is 0",)),
    "too large": (lambda p: changed(p, sample_size=128), ("128 tokens a side", "only 96")),
    "no depth": (lambda p: changed(p, num_layers=5), ("missing blocks.3.text_mlp.fc1.weight", "fetch the folder again")),
    "no norms": (lambda p: changed(p, qk_norm=None), ("unexpected blocks.0.attn.norm_q.weight",)),
    "a table": (lambda p: changed(p, pos_embed_max_size=48), ("pos_embed.pos_embed has the shape (1, 9216, 32)", "(1, 2304, 32)")),
    "a key less": (
        lambda p: reweighed(p, lambda s: s.pop("transformer_blocks.1.attn.to_k.weight")),
        ("missing blocks.1.attn.qkv.weight", "unexpected blocks.1.attn.qv.weight"),
    ),
    "a key more": (lambda p: reweighed(p, lambda s: s.update(more=torch.ones(2))), ("unexpected more (2,)",)),
    "NaN": (lambda p: reweighed(p, lambda s: s["proj_out.bias"].fill_(torch.nan)), ("proj_out.bias holds NaN",)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_folders_that_are_refused(tmp_path: Path, name: str) -> None:
    saved(SD35, tmp_path)
    breaking, words = BROKEN[name]
    breaking(tmp_path)
    with pytest.raises(TeacherError) as caught:
        load_teacher(TeacherSpec(str(tmp_path)))
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"input_size": 9}, "not a multiple of patch_size 2"),
        ({"num_heads": 5}, "a multiple of 4 and of num_heads 5"),
        ({"dual_blocks": "1 0"}, "ascending"),
        ({"dual_blocks": "0  1"}, "a space between them"),
        ({"dual_blocks": "x"}, "'x'"),
        ({"output": "sound"}, "choose one of"),
    ],
)
def test_shapes_that_there_are_not(values: dict[str, Any], words: str) -> None:
    with pytest.raises(TeacherError, match=words):
        SD3Config(**values)


def test_texts_of_a_network_without_any() -> None:
    with pytest.raises(TeacherError, match="a dit takes no text: remove"):
        load_teacher(TeacherSpec("data/digits_dit.safetensors", text_tokens=77))
