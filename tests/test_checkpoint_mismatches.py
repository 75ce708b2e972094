"""Weights that do not fit: the nearest cause is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from teacher_files import TINY, under, weights

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.models.dit import DiT, preset


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"depth": 5}, "depth is 2 in the weights and 5 in the configuration"),
        ({"hidden_size": 48}, "hidden_size is 24 in the weights and 48"),
        ({"patch_size": 4, "input_size": 16}, "patch_size is 2 in the weights and 4 in the configuration; input_size is 8"),
        ({"input_size": 16}, "input_size is 8 in the weights and 16"),
        ({"in_channels": 4}, "in_channels is 3 in the weights and 4"),
        ({"num_classes": 10}, "num_classes is 5 (or 6 if the label table has no row for a null label) in the weights and 10"),
        ({"learn_sigma": False}, "learn_sigma is True in the weights and False"),
        ({"mlp_ratio": 2.0}, "mlp_ratio is 4.0 in the weights and 2.0"),
        ({"depth": 3, "num_classes": 3, "hidden_size": 32}, "depth is 2 in the weights and 3 in the configuration; hidden_size is 24"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_nearest_cause(tmp_path, changes, cause, prefix):
    torch.save(under(prefix, weights()), tmp_path / "t.pt")
    with pytest.raises(TeacherError) as caught:
        load_teacher(TeacherSpec(str(tmp_path / "t.pt"), dit=dataclasses.replace(TINY, **changes)))
    assert f"does not fit the model: {cause.partition(' ')[0]}" in str(caught.value)
    assert cause in str(caught.value)
    assert "missing" not in str(caught.value)
    assert "blocks." not in str(caught.value)


def test_a_cause_and_a_key(tmp_path):
    state = weights()
    del state["blocks.1.attn.qkv.bias"]
    torch.save(state, tmp_path / "t.pt")
    with pytest.raises(TeacherError, match=r"depth is 2 .* and 5 in the configuration; missing blocks\.1\.attn\.qkv\.bias \(72,\)\. C"):
        load_teacher(TeacherSpec(str(tmp_path / "t.pt"), dit=dataclasses.replace(TINY, depth=5)))


def test_the_preset_that_it_looks_like(tmp_path):
    small = preset("DiT-S/8", input_size=64)
    torch.save({name: torch.zeros(()).expand(tensor.shape) for name, tensor in DiT(small).state_dict().items()}, tmp_path / "t.pt")
    for spec in (TeacherSpec(str(tmp_path / "t.pt")), TeacherSpec(str(tmp_path / "t.pt"), preset="DiT-B/8")):
        with pytest.raises(TeacherError, match=r"`preset: DiT-S/8` with `input_size: 64`"):
            load_teacher(spec)
    assert load_teacher(TeacherSpec(str(tmp_path / "t.pt"), preset="DiT-S/8", input_size=64)).config == small


def test_one_anchor_is_not_a_network(tmp_path):
    state = weights()
    state["module.x_embedder.proj.weight"] = state.pop("x_embedder.proj.weight")
    torch.save(state, tmp_path / "t.pt")
    with pytest.raises(TeacherError, match=r"keys without a prefix, keys `module\.\*`"):
        load_teacher(TeacherSpec(str(tmp_path / "t.pt"), dit=TINY))
