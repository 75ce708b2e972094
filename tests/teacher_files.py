"""What the tests of checkpoints share: small models of ours and of diffusers, and how to compare or refuse them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.models.dit import DiT, DiTConfig, randomise_

TINY = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=2, num_classes=5)
NO_NULL = dataclasses.replace(TINY, null_label=False)
UNCONDITIONAL = dataclasses.replace(TINY, num_classes=1, null_label=False)
State = dict[str, torch.Tensor]


def same(a: DiT, b: DiT) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return a.config == b.config and left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def refuse(spec: TeacherSpec, *words: str) -> None:
    with pytest.raises(TeacherError) as caught:
        load_teacher(spec)
    for word in words:
        assert word in str(caught.value)


# diffusers


def diffusers_model(**changes):
    import diffusers

    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 3,
        "out_channels": 6,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 5,
    }
    model = diffusers.DiTTransformer2DModel(**config | changes).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def weights(config: DiTConfig = TINY, seed: int = 0) -> State:
    return randomise_(DiT(config), seed, std=0.2).state_dict()


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def require_same_forward(ours: DiT, expected: Callable[..., torch.Tensor]) -> None:
    """Agreement to 1e-5 for every label that there is."""
    c = ours.config
    y = torch.arange(c.num_classes + c.null_label)
    x = torch.randn(len(y), c.in_channels, c.input_size, c.input_size, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0, 999, len(y)).round()
    with torch.no_grad():
        made, wanted = ours(x, t, y), expected(x, t, y)
    assert wanted.abs().mean() > 0.1
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)
