"""What the tests of Stable Diffusion 3 share: small models of ours and of diffusers with equal weights, and what they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tc_lightning.models.conditions import Given
from tc_lightning.models.sd3 import SD3, SD3Config

# diffusers' own tests of the class, of 3 and of 3.5
SD30 = {
    "sample_size": 32,
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
    "out_channels": 4,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
SD35 = SD30 | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
# both attentions also in the last block, patches, and a table whose middle is no multiple of anything
ODD = SD35 | {"sample_size": 10, "patch_size": 2, "dual_attention_layers": (1, 3), "pos_embed_max_size": 8}
# one block of each kind of Stable Diffusion 3.5 Medium, in its widths
WIDE = SD35 | {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 24,
}

SMALL = SD3Config(
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=32,
    depth=4,
    num_heads=4,
    text_width=12,
    text_tokens=5,
    pooled_width=6,
    position_grid=7,
    position_base=4,
    dual_blocks="0 1",
    qk_norm=True,
)


def make_sd3(config: SD3Config = SMALL, seed: int = 0) -> SD3:
    """A frozen one whose blocks matter, and a null text that is none."""
    model: SD3 = randomised(SD3(config), seed).eval().requires_grad_(False)  # type: ignore[assignment]
    model.nulls = {name: value.numpy() for name, value in asked(config, 1, seed=7).items()}
    return model


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """All weights drawn, in place, so that gates are open; wider maps get smaller ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed.pos_embed" not in name and name != "pos_embed":
                std = 0.2 if parameter.ndim < 2 else 0.8 / parameter[0].numel() ** 0.5
                parameter.normal_(1.0 if "norm_" in name and parameter.ndim == 1 else 0.0, std, generator=generator)
    return model


def diffusers_sd3(values: dict[str, Any], seed: int = 0) -> Any:
    """diffusers' network of a configuration, randomised."""
    import diffusers

    return randomised(diffusers.SD3Transformer2DModel(**values), seed).eval().requires_grad_(False)


def asked(config: SD3Config, images: int = 2, seed: int = 0) -> Given:
    """Texts, token by token and pooled."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(images, config.text_tokens, config.text_width, generator=generator)
    return Given({"text": text, "pooled": torch.randn(images, config.pooled_width, generator=generator)})


def of_diffusers(model: Any, x: Tensor, t: Tensor, given: Given) -> Tensor:
    """What diffusers' network says."""
    return model(x, encoder_hidden_states=given["text"], pooled_projections=given["pooled"], timestep=t).sample


def saved(values: dict[str, Any], path: Path, **how: Any) -> Any:
    """The same, written to a folder."""
    model = diffusers_sd3(values)
    model.save_pretrained(path, **how)
    return model
