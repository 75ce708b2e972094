"""Pipelines that listen to a text through the four commands of the README: encode, fit, export, sample."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import CONFIGS, SEARCH, SHORT
from test_commands import call
from text_pipelines import pixart_pipeline, sd3_pipeline

from export import encode
from tc_lightning.cli import main
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.rollout.sampling import noise_for

OVERLAY = """
model:
  init_args:
    teacher: {{weights: pipeline, conditions: conditions.npz, text_tokens: {tokens}}}
    num_steps: {steps}
    guidance_scale: {scale}
    guidance_channels: 4
    sensitivity_samples: 2
    policy: {{init_args: {{target_speedup: 1.5}}}}
data:
  init_args: {{num_train: 4, num_val: 2, batch_size: 2}}
trainer: {{max_steps: 2, val_check_interval: 2}}
"""
STEPS, SCALE, SEED, ASKED = 6, 2.5, 5, ["two birds", "a very long red cat"]
PROMPTS = [f"{adjective} {thing}" for adjective in ("red", "blue", "small") for thing in ("cat", "dog", "bird", "wire")]
KINDS: dict[str, tuple[Any, str, int]] = {
    "pixart": (pixart_pipeline, "pixart_alpha_512.yaml", 120),
    "sd3": (sd3_pipeline, "sd3_medium.yaml", 7 + 256),
}


def encoded(prompts: list[str], out: str, patch: pytest.MonkeyPatch) -> None:
    """The first command."""
    Path("prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    patch.setattr(sys, "argv", ["encode.py", "pipeline", "--prompts", "prompts.txt", "--out", out])
    encode.main()


@pytest.fixture(scope="module", params=KINDS)
def workplace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a pipeline, prompts encoded, fitted, exported and sampled; and the pipeline."""
    make, config, tokens = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = make(folder / "pipeline")
    (folder / "tiny.yaml").write_text(OVERLAY.format(tokens=tokens, steps=STEPS, scale=SCALE), encoding="utf-8")
    (folder / "search.yaml").write_text(SEARCH, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        encoded(PROMPTS, "conditions.npz", patch)
        patch.setattr(sys, "argv", ["lightning"])
        main(["fit", "-c", str(CONFIGS / config), "-c", "tiny.yaml", "-c", "search.yaml", *SHORT])
        encoded(ASKED, "asked.npz", patch)
    done = call(folder, "to_onnx.py", "--images", 2, "--out", "artefact")
    assert done.returncode == 0, done.stderr
    arguments = ("--conditions", "asked.npz", "--seed", SEED, "--out", "grid.png", "--images", "made", "--compare")
    done = call(folder, "sample.py", "artefact", *arguments, deployed=True)
    assert done.returncode == 0, done.stderr
    return folder, pipeline


def test_full_compute_is_the_pipelines_own_image(workplace: tuple[Path, Any]) -> None:
    """From the same latents and prompts, every pixel within 2 of 255 grey levels; and prompts matter."""
    folder, pipeline = workplace
    made = np.stack([np.asarray(Image.open(folder / "made" / f"{number:04d}-full.png")) for number in range(2)]).astype(int)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"use_resolution_binning": False, "clean_caption": False} if "PixArt" in type(pipeline).__name__ else {}
    noise = noise_for(SEED, range(2), load_teacher(TeacherSpec(str(folder / "pipeline"))))

    def theirs(prompts: list[str]) -> np.ndarray:
        with torch.inference_mode():
            images = pipeline(
                prompts, num_inference_steps=STEPS, guidance_scale=SCALE, latents=noise.clone(), height=16, width=16, **sizes
            ).images
        return np.stack([np.asarray(image) for image in images]).astype(int)

    own = theirs(ASKED)
    assert own.std() > 20
    assert np.abs(made - own).max() <= 2
    assert np.abs(made - theirs(ASKED[::-1])).max() > 2


def test_cached_images_are_others(workplace: tuple[Path, Any]) -> None:
    folder, _ = workplace
    cached, full = (np.asarray(Image.open(folder / "made" / f"0000-{row}.png")) for row in ("cached", "full"))
    assert (cached != full).any()
