"""Checkpoints as people have them: each kind loads and computes what its weights say, or is refused in words that help."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from safetensors.torch import save_file
from teacher_files import NO_NULL, TINY, UNCONDITIONAL, State, require_same_forward, same, under, weights

from tc_lightning.errors import TeacherError
from tc_lightning.learn.teacher import TeacherModule
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, teacher_digest
from tc_lightning.models.dit import DiT, DiTConfig


def original(state: State, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, heads: int = 2) -> torch.Tensor:
    """The forward of the paper's equations, from the release's names alone."""

    def linear(name: str, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def normed(h: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    patches = state["x_embedder.proj.weight"]
    P, grid = patches.shape[2], x.shape[2] // patches.shape[2]
    z = F.conv2d(x, patches, state["x_embedder.proj.bias"], stride=P).flatten(2).transpose(1, 2) + state["pos_embed"]
    angles = t[:, None].float() * torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][y])
    for b in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(f"blocks.{b}.adaLN_modulation.1", c).chunk(6, 1)
        qkv = linear(f"blocks.{b}.attn.qkv", normed(z, shift_a, scale_a)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (qkv[0] @ qkv[1].transpose(2, 3) / qkv.shape[-1] ** 0.5).softmax(-1)
        z = z + gate_a[:, None] * linear(f"blocks.{b}.attn.proj", (scores @ qkv[2]).transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"blocks.{b}.mlp.fc1", normed(z, shift_m, scale_m)), approximate="tanh")
        z = z + gate_m[:, None] * linear(f"blocks.{b}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    out = linear("final_layer.linear", normed(z, shift, scale)).unflatten(2, (P, P, -1)).unflatten(1, (grid, grid))
    return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), -1, grid * P, grid * P)


class Odd:
    """What a training script may have pickled."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A checkpoint of one file: what it holds, of which the weights are `state`, and what its loading tells."""

    raw: Any
    told: tuple[str, ...] = ()
    state: State = dataclasses.field(default_factory=weights)
    config: DiTConfig = TINY
    suffixes: tuple[str, ...] = (".pt",)


EITHER = (".pt", ".safetensors")
OTHER = weights(seed=9)
COUNTERS = {"step": torch.tensor(1000), "initted": torch.tensor(True)}
PREFIXES = ("module.", "_orig_mod.", "model.", "ema_model.", "module._orig_mod.", "model.ema_model.", "net.backbone.dit.")
FILES = {f"prefix {p}": Kind(under(p, weights()), (f"stripped the prefix `{p}`",), suffixes=EITHER) for p in PREFIXES} | {
    "plain": Kind(weights(), suffixes=EITHER),
    "lightning": Kind(
        {"epoch": 3, "state_dict": under("model.", weights()), "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]},
        ("took `state_dict`", "stripped the prefix `model.`"),
        suffixes=(".pt", ".ckpt"),
    ),
    "lightning averaged": Kind(
        {"state_dict": under("model.", weights()), "current_model_state": under("model.", OTHER)},
        ("took keys `model.*` of `state_dict` (there is also keys `model.*` of `current_model_state`)",),
    ),
    "model_state_dict": Kind(
        {"model_state_dict": weights(), "step": 7, "args": argparse.Namespace(lr=1e-4)}, ("took `model_state_dict`",)
    ),
    "container of another name": Kind(
        {"generator": {"weights": under("module.", weights())}}, ("took `generator/weights`", "`module.`")
    ),
    "ema and model": Kind({"ema": weights(), "model": OTHER}, ("took `ema` (there is also `model`)",)),
    "averaged beside online": Kind(
        under("online_model.", OTHER) | under("ema_model.", weights()) | COUNTERS,
        ("took keys `ema_model.*` (there is also keys `online_model.*`)", "left out initted, step"),
        suffixes=EITHER,
    ),
    "averaged beside online, in a container": Kind(
        {"model": OTHER, "ema": under("online_model.", OTHER) | under("ema_model.", weights()) | COUNTERS},
        ("took keys `ema_model.*` of `ema` (there is also `model`, keys `online_model.*` of `ema`)",),
    ),
    "ema with integer scalars": Kind({"ema": weights() | COUNTERS | {"decay": 0.999}}, ("left out decay, initted, step",)),
    "torch's averaged model": Kind(
        under("module.", weights()) | {"n_averaged": torch.tensor(5)}, ("left out n_averaged", "`module.`"), suffixes=EITHER
    ),
    "counters inside the prefix": Kind(
        under("ema.", weights() | {"step": torch.tensor([3.0])}), ("left out ema.step",), suffixes=EITHER
    ),
    "other networks beside": Kind(
        {"state_dict": under("model.", weights()) | {f"vae.{i}.weight": torch.ones(2) for i in range(9)}},
        ("left out vae.0.weight, vae.1.weight, vae.2.weight, vae.3.weight and 5 more",),
    ),
    "no null row": Kind(
        weights(NO_NULL),
        ("label table has as many rows as there are classes (5)", "guidance must be 1"),
        weights(NO_NULL),
        NO_NULL,
        EITHER,
    ),
    "one class, one row": Kind(weights(UNCONDITIONAL), ("(1)", "guidance must be 1"), weights(UNCONDITIONAL), UNCONDITIONAL, EITHER),
    "one class, two rows": Kind(
        weights(dataclasses.replace(TINY, num_classes=1)),
        state=weights(dataclasses.replace(TINY, num_classes=1)),
        config=dataclasses.replace(TINY, num_classes=1),
    ),
    "half precision": Kind(
        {"ema": {n: v.half() for n, v in weights().items()}}, state={n: v.half().float() for n, v in weights().items()}
    ),
}


def write(raw: Any, path: Path) -> None:
    save_file(raw, path) if path.suffix == ".safetensors" else torch.save(raw, path)


@pytest.mark.parametrize(("name", "suffix"), [(name, suffix) for name, kind in FILES.items() for suffix in kind.suffixes])
def test_files(tmp_path, name, suffix):
    kind, lines = FILES[name], []
    write(kind.raw, tmp_path / f"t{suffix}")
    asked = dataclasses.replace(kind.config, null_label=True)  # nobody knows of this field before
    model = load_teacher(TeacherSpec(str(tmp_path / f"t{suffix}"), dit=asked), lines.append)
    assert model.config == kind.config
    assert all(p.dtype == torch.float32 for p in model.parameters())
    require_same_forward(model, lambda *args: original(kind.state, *args))
    expected = DiT(kind.config)
    expected.load_state_dict(kind.state)
    assert teacher_digest(model) == teacher_digest(expected)  # whatever the container
    assert len(lines) == (1 if kind.raw.keys() != kind.state.keys() or kind.told else 0)
    assert all("\n" not in line and str(tmp_path) in line and word in line for line in lines for word in kind.told)


def test_a_real_lightning_checkpoint(tmp_path):
    module = TeacherModule(TINY)
    module.model.load_state_dict(weights())
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    lines: list[str] = []
    assert same(load_teacher(TeacherSpec(str(tmp_path / "last.ckpt"), dit=TINY), lines.append), module.model)
    assert "`state_dict`" in lines[0]
    assert "`model.`" in lines[0]


def test_told_once_on_the_console(tmp_path, capsys):
    torch.save(under("module.", weights()), tmp_path / "t.pt")
    load_teacher(TeacherSpec(str(tmp_path / "t.pt"), dit=TINY))
    assert capsys.readouterr().out == f"{tmp_path / 't.pt'}: stripped the prefix `module.`\n"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"teacher": weights(), "student": OTHER}, ("several networks", "`teacher`, `student`", "alone")),
        (under("a.", weights()) | under("b.", OTHER), ("several networks", "keys `a.*`, keys `b.*`")),
        ({"ema_1": weights(), "ema_2": OTHER, "net": OTHER}, ("several networks", "`ema_1`, `ema_2`. Save")),
        (weights() | {"module.pos_embed": torch.ones(3)}, ("unexpected module.pos_embed (3,)",)),
        ({"optimizer": {"state": {}}, "epoch": 3}, ("a dict of optimizer, epoch", "state dict")),
        (under("encoder.", {"layer.weight": torch.ones(3)}), ("a dict of encoder.layer.weight", "x_embedder.proj.weight")),
        ({"module": weights(), "extra": Odd()}, ("cannot be read as a checkpoint of plain tensors", "run code")),
        ({"ema": weights() | {"step": torch.ones(2, dtype=torch.int64)}}, ("step is torch.int64",)),
    ],
)
def test_refused(tmp_path, raw, words):
    torch.save(raw, tmp_path / "t.pt")
    with pytest.raises(TeacherError) as caught:
        load_teacher(TeacherSpec(str(tmp_path / "t.pt"), dit=TINY))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_nothing_but_plain_containers_is_opened(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"state_dict": under("module.", weights()), "callbacks": Evil()}, tmp_path / "t.ckpt")
    with pytest.raises(TeacherError, match="run code"):
        load_teacher(TeacherSpec(str(tmp_path / "t.ckpt"), dit=TINY))
    assert not (tmp_path / "evil").exists()
