"""Whole pipelines of diffusers, tiny and of random parts, saved to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from teacher_files import diffusers_model

CLASSES = 1000  # `DiTPipeline` takes 1000 for the null label, whatever the model


SD3_FACTORS = {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}


def vae(channels: int = 4, **changes: Any) -> Any:
    """A tiny AutoencoderKL that doubles the sides, with weights that make its pixels span about [-1, 1]."""
    import diffusers

    torch.manual_seed(0)
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "latent_channels": channels,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    made = diffusers.AutoencoderKL(**config | changes).eval()
    with torch.no_grad():
        made.decoder.conv_out.weight *= 4  # of 0.2, as it is made
    return made


def scheduler(**changes: Any) -> Any:
    """The scheduler of the released DiT pipelines."""
    import diffusers

    return diffusers.DDIMScheduler(**{"clip_sample": False} | changes)


def transformer(**changes: Any) -> Any:
    """A tiny DiT of 4 channels; its gates are open."""
    shape = {"in_channels": 4, "out_channels": 8, "num_layers": 4, "num_embeds_ada_norm": CLASSES}
    return diffusers_model(**shape | changes)


def dit_pipeline(**parts: Any) -> Any:
    """A pipeline of these parts, and tiny ones for the others."""
    import diffusers

    made = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    return diffusers.DiTPipeline(**{name: parts[name] if name in parts else make() for name, make in made.items()})


def own_images(folder: Path, latents_BCHW: torch.Tensor, labels: list[int], steps: int, scale: float) -> np.ndarray:
    """What diffusers' pipeline makes of these latents, RGB bytes [B, H, W, 3]."""
    import diffusers
    from diffusers.pipelines.dit import pipeline_dit

    pipeline = diffusers.DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn, pipeline_dit.randn_tensor = pipeline_dit.randn_tensor, lambda **_: latents_BCHW
    try:
        images = pipeline(class_labels=labels, guidance_scale=scale, num_inference_steps=steps).images
    finally:
        pipeline_dit.randn_tensor = drawn
    return np.stack([np.asarray(image) for image in images])


def change_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    raw = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}), encoding="utf-8")
