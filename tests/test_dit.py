from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tc_lightning.errors import TeacherError
from tc_lightning.models.dit import DiT, DiTConfig, FinalModulation, preset, randomise_, sincos_position_embedding

TINY = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=2, num_classes=5)


def inputs(config: DiTConfig, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    return x, torch.tensor([0.0, 400.5, 999.0]), torch.tensor([0, 3, config.num_classes])


def test_xl_has_the_released_size_and_keys():
    with torch.device("meta"):
        model = DiT(preset("DiT-XL/2"))
    D, block = 1152, 18 * 1152**2 + 15 * 1152  # qkv 3, proj 1, mlp 8, adaLN 6 D^2; biases 3 + 1 + 4 + 1 + 6
    embedders = (4 * 4 * D + D) + (256 * D + D + D * D + D) + 1001 * D
    final = 2 * D * D + 2 * D + 32 * D + 32
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 28 * block + embedders + final == 674_834_720
    block_keys = {f"{m}.{k}" for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1") for k in ("weight", "bias")}
    ends = ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1")
    expected = {f"{m}.{k}" for m in ends for k in ("weight", "bias")} | {"pos_embed", "y_embedder.embedding_table.weight"}
    expected |= {f"blocks.{i}.{k}" for i in range(28) for k in block_keys}
    assert set(model.state_dict()) == expected
    assert tuple(model.state_dict()["blocks.27.attn.qkv.weight"].shape) == (3 * D, D)


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "tokens"),
    [
        ("DiT-S/8", 384, 12, 6, 16),
        ("DiT-B/4", 768, 12, 12, 64),
        ("DiT-L/2", 1024, 24, 16, 256),
        ("DiT-XL/2", 1152, 28, 16, 256),
    ],
)
def test_presets(name, width, depth, heads, tokens):
    config = preset(name)
    assert (config.hidden_size, config.depth, config.num_heads, config.num_tokens) == (width, depth, heads, tokens)
    assert config.out_channels == 8
    assert preset(name, input_size=64).num_tokens == 4 * tokens


@pytest.mark.parametrize("name", ["DiT-XL", "DiT-XL/3", "XL/2", "DiT-H/2", ""])
def test_unknown_preset(name):
    with pytest.raises(TeacherError, match="DiT-XL/2"):
        preset(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 9}, "input_size 9"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"hidden_size": 26}, "hidden_size 26"),
        ({"depth": 0}, "depth is 0"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(TeacherError, match=message):
        dataclasses.replace(TINY, **change)


def test_new_model_outputs_zeros():
    model = DiT(TINY)
    out = model(*inputs(TINY))
    assert out.shape == (3, 6, 8, 8)
    assert torch.equal(out, torch.zeros_like(out))


def test_closed_gates_pass_tokens_through():
    model = DiT(TINY)
    x, t, y = inputs(TINY)
    z = model.embed(x)
    mods, _ = model.modulations(model.condition(t, label=y))
    assert torch.equal(model.blocks[0](z, mods[0]), z)


def test_eps_is_the_first_half():
    model = randomise_(DiT(TINY), seed=0)
    x, t, y = inputs(TINY)
    assert torch.equal(model.eps(x, t, y), model(x, t, y)[:, :3])
    assert DiT(dataclasses.replace(TINY, learn_sigma=False))(x, t, y).shape == x.shape


def test_patches_come_back_where_they_were():
    """With an identity for the output layer, readout undoes patchification."""
    config = dataclasses.replace(TINY, in_channels=3, hidden_size=12, learn_sigma=False)
    model = DiT(config)
    with torch.no_grad():
        model.final_layer.linear.weight.copy_(torch.eye(12))
    x = inputs(config)[0]
    # A patch's features are ordered (row, column, channel).
    tokens = x.reshape(3, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(3, 16, 12)
    model.final_layer.norm_final = torch.nn.Identity()
    mod = FinalModulation(torch.zeros(3, 1, 12), torch.ones(3, 1, 12))
    torch.testing.assert_close(model.readout(tokens, mod), x)


def test_patch_embedding_is_row_major():
    model = DiT(TINY)
    x = torch.zeros(1, 3, 8, 8)
    x[:, :, 2:4, 6:8] = 1.0  # second row of patches, last column
    z = model.x_embedder(x)[0] - model.x_embedder(torch.zeros_like(x))[0]
    assert z.abs().sum(1).nonzero().flatten().tolist() == [1 * 4 + 3]


def test_position_table_by_hand():
    table = sincos_position_embedding(8, 3)
    assert table.shape == (9, 8)
    np.testing.assert_allclose(table[0], [0, 0, 1, 1, 0, 0, 1, 1])
    # token 5 is row 1, column 2; two frequencies, 1 and 1/100
    column = [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)]
    row = [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    np.testing.assert_allclose(table[5], column + row)


def test_timestep_features_by_hand():
    embedder = DiT(TINY).t_embedder
    seen: list[torch.Tensor] = []
    embedder.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    embedder(torch.tensor([37.0]))
    k = np.arange(128)
    args = 37.0 * 10000.0 ** (-k / 128)
    np.testing.assert_allclose(seen[0][0], np.concatenate([np.cos(args), np.sin(args)]), atol=1e-5)


def test_the_order_of_keys_does_not_matter():
    """And a token's attention does not depend on which other tokens attend."""
    model = randomise_(DiT(TINY), seed=1)
    x, t, y = inputs(TINY)
    z, (mods, _) = model.embed(x), model.modulations(model.condition(t, label=y))
    block, mod = model.blocks[0], mods[0]
    full, kv = block.attn_branch(z, mod)
    q, _, _ = block.qkv(z[:, :5], mod)
    turned = torch.arange(z.shape[1]).roll(3)
    torch.testing.assert_close(block.attention(q, kv.k[:, turned], kv.v[:, turned]), full[:, :5], atol=1e-5, rtol=1e-5)
    assert kv.k.shape == kv.v.shape == z.shape


def test_randomise_is_reproducible_and_leaves_positions():
    a, b, c = (randomise_(DiT(TINY), seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["final_layer.linear.weight"], c["final_layer.linear.weight"])
    assert torch.equal(a["pos_embed"], c["pos_embed"])
