"""Checkpoints without a null label: what they can do, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import vp_sampler
from teacher_files import NO_NULL, TINY, UNCONDITIONAL, same, weights

from export.compiler.compile import export_artefact
from tc_lightning.errors import TeacherError
from tc_lightning.learn.distiller import TokenCacheDistiller
from tc_lightning.learn.teacher import TeacherModule
from tc_lightning.models.checkpoints import TeacherSpec, config_json, load_teacher, save_teacher
from tc_lightning.models.content_predictor import ContentPredictor
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample


def full_run(model: DiT, scale: float) -> CachePlan:
    return full_plan(model_signature(model), vp_sampler("ddim", 3), Guidance(scale, 3))


@pytest.mark.parametrize("config", [NO_NULL, UNCONDITIONAL])
def test_guidance_needs_a_null_label(tmp_path, config):
    torch.save(weights(config), tmp_path / "t.pt")
    spec = TeacherSpec(str(tmp_path / "t.pt"), dit=dataclasses.replace(config, null_label=True))
    model, words = load_teacher(spec), r"guidance 1\.5 needs a null label.*`guidance_scale` to 1"
    x, y = noise_for(0, range(2), model), torch.tensor([0, config.num_classes - 1])
    assert torch.isfinite(sample(model, full_run(model, 1.0), x, y)).all()
    with pytest.raises(TeacherError, match=words):
        sample(model, full_run(model, 1.5), x, y)
    with pytest.raises(TeacherError, match=words):  # before anything takes time
        TokenCacheDistiller(spec, num_steps=3, guidance_scale=1.5)
    assert TokenCacheDistiller(spec, num_steps=3, guidance_scale=1.0).teacher.config == config


def test_export_without_a_null_label(tmp_path):
    model = randomise_(DiT(NO_NULL), 0, std=0.2).eval().requires_grad_(False)
    with pytest.raises(TeacherError, match="needs a null label"):
        export_artefact(model, full_run(model, 1.5), tmp_path / "a", "fp32", "cpu", images=1, report=lambda _: None)
    manifest = export_artefact(model, full_run(model, 1.0), tmp_path / "a", "fp32", "cpu", images=1, report=lambda _: None)
    assert manifest["parity"]["trajectory_rel_l2"] < 1e-5
    assert DiTConfig(**manifest["network"]["config"]) == NO_NULL


def test_training_without_a_null_label():
    with pytest.raises(TeacherError, match="condition_dropout"):
        TeacherModule(NO_NULL)
    assert TeacherModule(NO_NULL, condition_dropout=0.0).model.config == NO_NULL
    with pytest.raises(TeacherError, match="content predictor needs a null label"):
        ContentPredictor(NO_NULL)


def test_a_null_label_goes_without_saying(tmp_path):
    """Digests of teachers, by which plans and runs name them, are those from before there was a field for it."""
    assert "null_label" not in config_json(TINY)
    model = randomise_(DiT(NO_NULL), 0)
    save_teacher(model, tmp_path / "t.safetensors")
    for asked in (None, TINY, NO_NULL):
        assert same(load_teacher(TeacherSpec(str(tmp_path / "t.safetensors"), dit=asked)), model)
    save_teacher(randomise_(DiT(TINY), 0), tmp_path / "t.safetensors")
    with pytest.raises(TeacherError, match="null_label is True there and False here"):
        load_teacher(TeacherSpec(str(tmp_path / "t.safetensors"), dit=NO_NULL))
