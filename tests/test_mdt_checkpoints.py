"""The release's MDTv2 files: told by their names, their shape by their tensors; what cannot be one is refused in words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from mdt_models import CONFIG, HEADS, State, batch, make_mdt, published, released
from safetensors.torch import save_file
from teacher_files import refuse, under

from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, save_teacher, teacher_digest
from tc_lightning.models.mdt import MDT, MDTConfig

RELEASE = released(make_mdt())
INDEX = "de_blocks.0.attn.rel_pos_bias.relative_position_index"
KINDS: dict[str, tuple[Any, str]] = {
    "plain": (RELEASE, ""),
    "trained on several devices": (under("module.", RELEASE), "stripped the prefix `module.`"),
    "an average beside": ({"model": released(make_mdt(9)), "ema": RELEASE, "opt": {}, "args": 3}, "took `ema`"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_loads_and_computes_what_its_weights_say(kind: str, tmp_path: Path) -> None:
    raw, note = KINDS[kind]
    torch.save(raw, tmp_path / "mdt_xl2_v2_ckpt.pt")
    told: list[str] = []
    mdt = load_teacher(TeacherSpec(str(tmp_path / "mdt_xl2_v2_ckpt.pt")), told.append)
    assert type(mdt) is MDT
    assert mdt.config == CONFIG
    x, t, y = batch()
    torch.testing.assert_close(mdt(x, t, y), published(RELEASE, x, t, y, HEADS), atol=1e-5, rtol=1e-5)
    assert note in told[0]
    assert "left out the mask token and `sideblocks.*`, which nothing goes through when no token is masked" in told[0]
    assert not any(p.requires_grad for p in mdt.parameters())


@pytest.mark.parametrize(
    "changes", [{"decode_layers": 4}, {"num_heads": 4}, {"mlp_ratio": 2.0}, {"learn_sigma": False}, {"input_size": 6}, {"depth": 8}]
)
def test_all_of_the_shape_is_told_by_tensors(changes: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    save_file({name: value.contiguous() for name, value in released(make_mdt(config=config)).items()}, tmp_path / "mdt.safetensors")
    assert load_teacher(TeacherSpec(str(tmp_path / "mdt.safetensors")), lambda _: None).config == config


def test_its_own_file_tells_family_and_shape(tmp_path: Path) -> None:
    mdt = make_mdt()
    save_teacher(mdt, tmp_path / "mdt.safetensors")
    loaded = load_teacher(TeacherSpec(str(tmp_path / "mdt.safetensors")))
    assert type(loaded) is MDT
    assert loaded.config == CONFIG
    assert teacher_digest(loaded) == teacher_digest(mdt)


def changed(**tensors: torch.Tensor | None) -> State:
    """The release with some tensors replaced, or gone where the value is None; dots in names are written as `__`."""
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    return {name: value for name, value in (RELEASE | named).items() if value is not None}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (changed(en_inblocks__0__mlp__fc2__bias=None), ("missing blocks.0.mlp.fc2.bias", "another network, or some are lost")),
        (changed(en_outblocks__1__skip_linear__weight=torch.ones(32, 65)), ("blocks.3.skip_linear.weight should be (32, 64)",)),
        (changed(decoder_pos_embed=None), ("do not tell decode_layers",)),
        (changed(en_inblocks__0__attn__rel_pos_bias__relative_position_bias_table=None), ("do not tell num_heads",)),
        ({**RELEASE, INDEX: torch.zeros(16, 16).long()}, (INDEX, "relates positions otherwise")),
        ({**RELEASE, INDEX: torch.zeros(15, 16).long()}, ("relates positions otherwise",)),
        (changed(extra=torch.ones(3)), ("unexpected extra",)),
        (changed(en_inblocks__0__mlp__fc2__bias=torch.full((32,), torch.nan)), ("NaN",)),
        ({n: v for n, v in RELEASE.items() if not n.startswith("en_outblocks.1.")}, ("MDT decode_layers",)),
    ],
)
def test_files_that_are_no_whole_mdt(state: State, words: tuple[str, ...], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "odd.pt")
    refuse(TeacherSpec(str(tmp_path / "odd.pt")), *words)


def test_what_the_configuration_says_is_held_against_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / "mdt.pt")
    torch.save(RELEASE, path)
    refuse(TeacherSpec(path, family="dit"), "holds a mdt, and `family` is dit")
    refuse(TeacherSpec(path, preset="DiT-XL/2"), "depth is 6 there and 28 here")
    refuse(TeacherSpec(path, input_size=16), "input_size is 8 there and 16 here")
    assert load_teacher(TeacherSpec(path, family="mdt", input_size=8), lambda _: None).config == CONFIG


def test_training_parts_may_be_absent(tmp_path: Path) -> None:
    alone = {n: v for n, v in RELEASE.items() if not n.startswith("sideblocks") and n != "mask_token" and not n.endswith("_index")}
    torch.save(alone, tmp_path / "mdt.pt")
    told: list[str] = []
    assert load_teacher(TeacherSpec(str(tmp_path / "mdt.pt")), told.append).config == CONFIG
    assert not told


def test_the_real_shape_is_the_default() -> None:
    assert MDTConfig(depth=28, hidden_size=1152, num_heads=16, decode_layers=4).half_depth == 12
