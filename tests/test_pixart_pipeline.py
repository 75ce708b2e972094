"""A pipeline of PixArt, tiny and of random parts: from embeddings of a text to the pixels that diffusers' own makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from pipelines import vae
from test_pixart import TINY

from export.compiler.compile import export_artefact
from export.grid import to_pixels
from export.runtime.sampler import CachedSampler
from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.models.checkpoints.pipeline import find_vae
from tc_lightning.plan.guidance import Guidance
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for

STEPS, SCALE, SEED = 6, 4.5, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "pixart"
    torch.manual_seed(1)
    transformer = PixArtTransformer2DModel(**TINY).eval()
    parts = {"transformer": transformer, "vae": vae(), "scheduler": DPMSolverMultistepScheduler()}
    PixArtAlphaPipeline(tokenizer=None, text_encoder=None, **parts).save_pretrained(path)
    return path


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 333])
def test_times_of_its_solver(steps):
    theirs = DPMSolverMultistepScheduler()
    theirs.set_timesteps(steps)
    assert LinearBetas().timesteps("linspace", steps).tolist() == theirs.timesteps.tolist()


def test_pixels_are_the_pipelines_own(folder, tmp_path):
    """DPM-Solver++ at its own times, guidance of all channels away from a null text: within 2 of 255 grey levels, in every pixel."""
    model = load_teacher(TeacherSpec(str(folder)), lambda _: None)
    model.examples = {"text": torch.randn(4, 120, 8).numpy(), "text_mask": np.ones((4, 120), np.int64)}
    model.nulls = {"text": np.zeros((1, 120, 8), np.float32), "text_mask": np.ones((1, 120), np.int64)}
    plan = full_plan(model_signature(model), make_sampler(model.schedule, "dpmpp_2m", STEPS, "linspace"), Guidance(SCALE, 4))
    export_artefact(model, plan, tmp_path / "a", "fp32", "cpu", images=1, report=lambda _: None, vae=find_vae(TeacherSpec(str(folder))))
    text = torch.randn(2, 120, 8, generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(120) < torch.tensor([[9], [60]])).long()
    ours = CachedSampler(tmp_path / "a").sample(text=text.numpy(), text_mask=mask.numpy(), seed=SEED).images
    pipeline = PixArtAlphaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        negative_prompt=None,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=noise_for(SEED, range(2), model),
        prompt_embeds=text,
        prompt_attention_mask=mask,
        negative_prompt_embeds=torch.zeros_like(text),
        negative_prompt_attention_mask=torch.ones_like(mask),
        use_resolution_binning=False,
        height=16,
        width=16,
    ).images
    assert np.stack([np.asarray(image) for image in theirs]).std() > 20
    assert np.abs(to_pixels(ours).astype(int) - np.stack([np.asarray(image) for image in theirs])).max() <= 2
