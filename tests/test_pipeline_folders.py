"""Whole pipelines as teachers: the schedule is what the scheduler says, and what is not supported is refused by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from pipelines import change_json, dit_pipeline, scheduler, transformer, vae
from teacher_files import refuse

from tc_lightning.diffusion.described import describe, schedule_from
from tc_lightning.diffusion.flow import Flow
from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.errors import TeacherError, TokenCacheError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, save_teacher, teacher_digest
from tc_lightning.models.dit import DiT
from tc_lightning.models.sit import SiT


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A pipeline, not to be changed."""
    folder = tmp_path_factory.mktemp("pipelines") / "dit"
    dit_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(saved, tmp_path / "dit")


def load(folder: Path, lines: list[str] | None = None) -> DiT:
    model = load_teacher(TeacherSpec(str(folder)), (lines if lines is not None else []).append)
    assert isinstance(model, DiT)
    return model


def test_a_pipeline_is_its_transformer(saved):
    lines: list[str] = []
    model, alone = load(saved, lines), load(saved / "transformer")
    assert model.schedule == LinearBetas() == DiT.schedule
    assert teacher_digest(model) == teacher_digest(alone)
    assert lines == [f"{saved}: its scheduler says: 1000 linear betas from 0.0001 to 0.02, predicting eps"]


SCHEDULERS: dict[str, tuple[Any, Any]] = {
    "v": (scheduler(prediction_type="v_prediction", num_train_timesteps=500), LinearBetas(500, predicts="v")),
    "betas": (scheduler(beta_start=0.001, beta_end=0.01), LinearBetas(1000, 0.001, 0.01)),
    "ddpm": (diffusers.DDPMScheduler(clip_sample=False), LinearBetas()),
    "dpm": (diffusers.DPMSolverMultistepScheduler(), LinearBetas()),
    "unipc": (diffusers.UniPCMultistepScheduler(prediction_type="v_prediction"), LinearBetas(predicts="v")),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), Flow(1000.0, 0.0)),
    "dpm of a flow": (
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0),
        Flow(1000.0, 0.0),
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules(tmp_path, name):
    """Ours, and the same after `save_teacher`; weights that are used otherwise are another teacher."""
    theirs, ours = SCHEDULERS[name]
    dit_pipeline(scheduler=theirs).save_pretrained(tmp_path / "p")
    lines: list[str] = []
    model = load(tmp_path / "p", lines)
    assert model.schedule == ours
    spacing = {"flow": "sd3:3", "dpm of a flow": "shift:2"}.get(name)
    assert lines[0].endswith(f"`spacing: {spacing}`") == ("spacing" in lines[0]) == isinstance(ours, Flow)
    save_teacher(model, tmp_path / "t.safetensors")
    again = load_teacher(TeacherSpec(str(tmp_path / "t.safetensors")))
    assert again.schedule == ours
    assert teacher_digest(again) == teacher_digest(model)
    assert (teacher_digest(model) == teacher_digest(load(tmp_path / "p" / "transformer"))) == (ours == LinearBetas())
    assert DiT.schedule == LinearBetas()


def test_schedules_mix_as_diffusers_does():
    """x_t of a data point and a noise, by their own `add_noise`."""
    x, eps = torch.randn(1, 4), torch.randn(1, 4)
    for theirs, ours in (SCHEDULERS["betas"], SCHEDULERS["v"]):
        for t in (0, 10, 499):
            alpha, sigma = ours.alpha_sigma(t)
            torch.testing.assert_close(theirs.add_noise(x, eps, torch.tensor([t])), float(alpha) * x + float(sigma) * eps)
    theirs, ours = SCHEDULERS["flow"]
    for t in theirs.timesteps[[0, 500, 999]]:
        alpha, sigma = ours.alpha_sigma(float(t))
        torch.testing.assert_close(theirs.scale_noise(x, t[None], eps), float(alpha) * x + float(sigma) * eps)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"beta_schedule": "scaled_linear"}, "beta_schedule is 'scaled_linear'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"thresholding": True}, "thresholding"),
        ({"clip_sample": True}, "clip_sample is True"),
        ({"clip_sample": None}, "clip_sample is True"),  # unsaid: diffusers clips
        ({"beta_end": 2.0}, "betas from 0.0001 to 2.0"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps"),
        ({"eta_noise_seed_delta": 31}, "eta_noise_seed_delta (31)"),
    ],
)
def test_what_no_schedule_of_ours_is(folder, changes, word):
    change_json(folder / "scheduler" / "scheduler_config.json", **changes)
    refuse(TeacherSpec(str(folder)), word, "scheduler_config.json", "set `weights` to the folder of the transformer")


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True), "use_karras_sigmas"),
        (lambda: diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True), "use_lu_lambdas"),
        (lambda: diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "contradict"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), "shift_terminal"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling"),
        (lambda: diffusers.EulerDiscreteScheduler(), "EulerDiscreteScheduler"),
    ],
)
def test_schedulers_that_are_not_supported(folder, made, word):
    shutil.rmtree(folder / "scheduler")
    made().save_pretrained(folder / "scheduler")
    change_json(folder / "model_index.json", scheduler=["diffusers", type(made()).__name__])
    refuse(TeacherSpec(str(folder)), word)


BREAK: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda p: (p / "model_index.json").unlink(), "pipeline without its model_index.json"),
    "no JSON": (lambda p: (p / "model_index.json").write_text("[", encoding="utf-8"), "not valid JSON"),
    "another pipeline": (lambda p: change_json(p / "model_index.json", _class_name="FluxPipeline"), "is of a FluxPipeline"),
    "no name of a class": (lambda p: change_json(p / "model_index.json", _class_name=["DiTPipeline"]), "is of a ['DiTPipeline']"),
    "no class": (lambda p: change_json(p / "model_index.json", _class_name=None), "is of a None"),
    "own code": (lambda p: change_json(p / "model_index.json", transformer=["mine", "DiT"]), "its transformer is ['mine', 'DiT']"),
    "no transformer": (lambda p: shutil.rmtree(p / "transformer"), "holds no transformer/config.json"),
    "no scheduler": (lambda p: shutil.rmtree(p / "scheduler"), "holds no scheduler/scheduler_config.json"),
    "no vae": (lambda p: shutil.rmtree(p / "vae"), "holds no vae/config.json"),
    "vae unnamed": (lambda p: change_json(p / "model_index.json", vae=None), "names no vae"),
    "vae null": (lambda p: change_json(p / "model_index.json", vae=[None, None]), "names no vae"),
    "another vae": (lambda p: change_json(p / "model_index.json", vae=["diffusers", "AutoencoderDC"]), "is of a AutoencoderDC"),
    "vae without weights": (lambda p: (p / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "holds no weights"),
    "vae scaled by channel": (lambda p: change_json(p / "vae" / "config.json", latents_mean=[0.0] * 4), "latents_mean"),
    "vae of no scale": (lambda p: change_json(p / "vae" / "config.json", scaling_factor=0), "scaling_factor is 0"),
    "vae of no shift": (lambda p: change_json(p / "vae" / "config.json", shift_factor="much"), "shift_factor is 'much'"),
    "vae of other channels": (lambda p: vae(16).save_pretrained(p / "vae"), "latents of 16 channels, and the network makes 4"),
    "another transformer": (
        lambda p: change_json(p / "transformer" / "config.json", _class_name="FluxTransformer2DModel"),
        "is of a Flux",
    ),
    "a field of another": (lambda p: change_json(p / "transformer" / "config.json", guidance_embeds=True), "guidance_embeds (True)"),
    "classless": (lambda p: change_json(p / "transformer" / "config.json", _class_name=None), "does not say what it is of"),
}


@pytest.mark.parametrize("name", BREAK)
def test_broken_pipelines(folder, name):
    breaking, word = BREAK[name]
    breaking(folder)
    with pytest.raises(TeacherError) as caught:
        load_teacher(TeacherSpec(str(folder)))
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_older_class_is_told_by_its_norm(folder):
    path = folder / "transformer" / "config.json"
    change_json(path, _class_name="Transformer2DModel", cross_attention_dim=None, num_vector_embeds=None, use_linear_projection=False)
    assert teacher_digest(load(folder))
    change_json(path, norm_type="layer_norm")
    refuse(TeacherSpec(str(folder)), "is of a Transformer2DModel with norm_type 'layer_norm'")


def test_a_shape_that_the_user_repeats(saved):
    found = load(saved).config
    assert load_teacher(TeacherSpec(str(saved), dit=found)).config == found
    refuse(TeacherSpec(str(saved), preset="DiT-S/2"), "depth is 4 there and 12 here")
    refuse(TeacherSpec(str(saved), family="sit"), "holds a dit, and `family` is sit")


def test_descriptions_of_schedules():
    for schedule in (LinearBetas(), LinearBetas(10, 0.1, 0.2, "v"), Flow(), Flow(1000.0, 0.0)):
        assert schedule_from(json.loads(json.dumps(describe(schedule)))) == schedule
    wrong: list[dict[str, Any]] = [{}, {"kind": "cosine"}, {"kind": "flow", "shift": 1.0}, {"kind": "flow", "noise_at": "x"}]
    wrong += [
        {"kind": "linear_betas", "predicts": "x0"},
        {"kind": "linear_betas", "num_train_steps": 1},
        {"kind": "flow", "noise_at": 1.0},
    ]
    for described in wrong:
        with pytest.raises(TokenCacheError):
            schedule_from(described)


def test_a_schedule_beside_a_file_that_was_changed(tmp_path):
    """A schedule of an instance is part of what the file's sha256 covers, and one that nothing can describe is not written."""

    class Odd(LinearBetas):
        pass

    model = SiT(load_shape())
    model.schedule = Odd()
    with pytest.raises(TokenCacheError, match="a Odd cannot be written"):
        save_teacher(model, tmp_path / "t.safetensors")
    assert not list(tmp_path.iterdir())
    model.schedule = Flow(1000.0, 0.0)
    save_teacher(model, tmp_path / "t.safetensors")
    path = tmp_path / "t.safetensors"
    path.write_bytes(path.read_bytes().replace(b'noise_at\\": 1000.0', b'noise_at\\": 2000.0'))
    refuse(TeacherSpec(str(path)), "damaged")


def load_shape() -> Any:
    from teacher_files import TINY

    return TINY


def test_alphas_are_those_of_diffusers():
    theirs, ours = SCHEDULERS["betas"]
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-5)
    assert transformer().config.num_embeds_ada_norm == 1000
