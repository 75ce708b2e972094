"""Folders of diffusers: agreement, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher_files import TINY, diffusers_model, refuse

from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, spec
from tc_lightning.models.dit import DiT


@pytest.mark.parametrize(
    ("changes", "safe"),
    [
        ({}, True),
        ({}, False),
        ({"norm_eps": 1e-6, "out_channels": 3}, True),
        ({"patch_size": 4, "num_attention_heads": 3}, True),
    ],
)
def test_agrees_with_diffusers(tmp_path, changes, safe):
    theirs = diffusers_model(**changes)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    ours = load_teacher(TeacherSpec(str(tmp_path)))
    assert ours.config.freq_shift == 1.0
    generator = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 31, 500, 999]), torch.tensor([0, 2, 4, 5])
    with torch.no_grad():
        a, b = ours(x, t, y), theirs(x, t, class_labels=y).sample
        assert a.abs().mean() > 0.1
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        # The conventions matter: with the release's, the same weights say something else.
        release = DiT(dataclasses.replace(ours.config, freq_shift=0.0))
        release.load_state_dict(ours.state_dict())
        assert (release(x, t, y) - b).abs().max() > 1e-3


def test_diffusers_pipeline_folder_and_shape(tmp_path, monkeypatch):
    diffusers_model().save_pretrained(tmp_path / "transformer")
    found = load_teacher(TeacherSpec(str(tmp_path))).config
    monkeypatch.setattr(spec, "preset", lambda name: TINY)  # a preset says nothing of diffusers' conventions
    assert load_teacher(TeacherSpec(str(tmp_path), preset="any")).config == found
    assert load_teacher(TeacherSpec(str(tmp_path), dit=found)).config == found
    refuse(TeacherSpec(str(tmp_path), dit=TINY), "freq_shift is 1.0 there and 0.0 here")


def test_diffusers_embedders_that_differ(tmp_path):
    model = diffusers_model()
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias[0] += 1.0
    model.save_pretrained(tmp_path)
    refuse(TeacherSpec(str(tmp_path)), "timestep_embedder.linear_2.bias", "one timestep and one class embedder")


@pytest.mark.parametrize(
    "drop", ["attn1.to_k.weight", "attn1.to_q.bias", "norm1.linear.weight", "norm1.emb.class_embedder.embedding_table.weight"]
)
def test_diffusers_missing_key(tmp_path, drop):
    diffusers_model().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.endswith(drop)}, file)
    refuse(TeacherSpec(str(tmp_path)), "does not fit")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"activation_fn": "gelu"}, "activation_fn"),
        ({"norm_type": "layer_norm"}, "norm_type"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine"),
        ({"attention_bias": False}, "attention_bias"),
        ({"out_channels": 5}, "out_channels"),
        ({"num_layers": "many"}, "num_layers"),
        ({"sample_size": None}, "sample_size"),
        ({"num_layers": 3}, "depth is 2 in the weights and 3 in its config.json"),
    ],
)
def test_diffusers_config_that_is_not_a_dit(tmp_path, changes, word):
    diffusers_model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    refuse(TeacherSpec(str(tmp_path)), word)


def test_diffusers_incomplete_folder(tmp_path):
    refuse(TeacherSpec(str(tmp_path)), "config.json")
    diffusers_model().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    refuse(TeacherSpec(str(tmp_path)), "no weights")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    refuse(TeacherSpec(str(tmp_path)), "config.json")
