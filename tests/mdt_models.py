"""What the tests of MDTv2 share: tiny models, the state dicts that the release would hold of them, and its formulas written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tc_lightning.models.mdt import MDT, MDTConfig

CONFIG = MDTConfig(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=6, num_heads=2, num_classes=5, decode_layers=2)
HALF, HEADS, GRID = CONFIG.half_depth, CONFIG.num_heads, CONFIG.grid
State = dict[str, Tensor]


def make_mdt(seed: int = 0, config: MDTConfig = CONFIG) -> MDT:
    """A frozen one whose branches, skips and positions matter."""
    mdt = MDT(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in mdt.named_parameters():
        parameter.normal_(0.0, 1.0 if "bias_table" in name else 0.2, generator=generator)
    return mdt


def pairwise_rows(grid: int) -> Tensor:
    """Row of the table for each query and key, by two loops over their places: the release's index."""
    places = [(y, x) for y in range(grid) for x in range(grid)]
    rows = [[(y - v + grid - 1) * (2 * grid - 1) + (x - u + grid - 1) for v, u in places] for y, x in places]
    return torch.tensor(rows)


def released(mdt: MDT) -> State:
    """Its weights under the release's names, with all that the release holds beside them."""
    half, decoder, state = mdt.config.half_depth, 2 * mdt.config.half_depth, State()
    for name, tensor in mdt.state_dict().items():
        if not name.startswith("blocks."):
            state[name] = tensor
            continue
        number, part = name.split(".", 2)[1:]
        b = int(number)
        stem, first = ("en_inblocks", 0) if b < half else ("en_outblocks", half) if b < decoder else ("de_blocks", decoder)
        part = f"attn.rel_pos_bias.{part}" if part == "relative_position_bias_table" else part
        if part == "pos_embed":
            state["decoder_pos_embed"] = tensor[None]
        else:
            state[f"{stem}.{b - first}.{part}"] = tensor
    blocks = {name.rsplit(".attn.qkv", 1)[0] for name in state if name.endswith("attn.qkv.weight")}
    state |= {f"{block}.attn.rel_pos_bias.relative_position_index": pairwise_rows(mdt.config.grid) for block in sorted(blocks)}
    side = {f"sideblocks.0.{n.split('.', 2)[2]}": t + 1 for n, t in state.items() if n.startswith("en_inblocks.0.")}
    return state | side | {"mask_token": torch.ones(1, 1, mdt.config.hidden_size)}


def published(state: State, x: Tensor, t: Tensor, y: Tensor, heads: int) -> Tensor:
    """The forward of the paper's equations when nothing is masked, from the release's names alone."""

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def normed(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def attention(name: str, h: Tensor) -> Tensor:
        q, k, v = linear(f"{name}.qkv", h).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        table, index = (state[f"{name}.rel_pos_bias.relative_position_{what}"] for what in ("bias_table", "index"))
        logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + table[index].permute(2, 0, 1)
        return linear(f"{name}.proj", (logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def block(name: str, z: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            z = linear(f"{name}.skip_linear", torch.cat([z, skip], -1))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(f"{name}.adaLN_modulation.1", F.silu(c)).chunk(6, 1)
        z = z + gate_a[:, None] * attention(f"{name}.attn", normed(z, shift_a, scale_a))
        hidden = F.gelu(linear(f"{name}.mlp.fc1", normed(z, shift_m, scale_m)), approximate="tanh")
        return z + gate_m[:, None] * linear(f"{name}.mlp.fc2", hidden)

    def count(stem: str) -> int:
        return len({name.split(".")[1] for name in state if name.startswith(f"{stem}.")})

    patches = state["x_embedder.proj.weight"]
    P, grid = patches.shape[2], x.shape[2] // patches.shape[2]
    z = F.conv2d(x, patches, state["x_embedder.proj.bias"], stride=P).flatten(2).transpose(1, 2) + state["pos_embed"]
    angles = t[:, None].float() * torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = c + state["y_embedder.embedding_table.weight"][y]
    embedded, skips = z, list[Tensor]()
    for i in range(count("en_inblocks")):
        z = block(f"en_inblocks.{i}", z)
        skips.append(z)
    for i in range(count("en_outblocks")):
        z = block(f"en_outblocks.{i}", z, skips.pop())
    z = z + state["decoder_pos_embed"]
    for i in range(count("de_blocks")):
        z = block(f"de_blocks.{i}", z, embedded)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
    out = linear("final_layer.linear", normed(z, shift, scale)).unflatten(2, (P, P, -1)).unflatten(1, (grid, grid))
    return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), -1, grid * P, grid * P)


def batch(config: MDTConfig = CONFIG) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times and labels, the null label among them."""
    shape = (3, config.in_channels, config.input_size, config.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 333.0, 999.0]), torch.tensor([0, 3, 5])
