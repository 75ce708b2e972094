"""Checkpoints as people have them: each kind loads and computes what its weights say, or is refused in words that help."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from safetensors.torch import load_file, save_file
from test_checkpoints import diffusers_model, same

from export.compiler.compile import export_artefact
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import TeacherError
from tc_lightning.learn.distiller import TokenCacheDistiller
from tc_lightning.learn.teacher import TeacherModule
from tc_lightning.models.checkpoints import TeacherSpec, config_json, load_teacher, save_teacher, teacher_digest
from tc_lightning.models.content_predictor import ContentPredictor
from tc_lightning.models.dit import DiT, DiTConfig, preset, randomise_
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample

TINY = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=2, num_classes=5)
NO_NULL = dataclasses.replace(TINY, null_label=False)
State = dict[str, torch.Tensor]


def weights(config: DiTConfig = TINY, seed: int = 0) -> State:
    return randomise_(DiT(config), seed, std=0.2).state_dict()


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


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
UNCONDITIONAL = dataclasses.replace(TINY, num_classes=1, null_label=False)
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


# Labels


def full_run(model: DiT, scale: float) -> CachePlan:
    return full_plan(model_signature(model), make_sampler("ddim", 3), Guidance(scale, 3))


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
    with pytest.raises(TeacherError, match="label_dropout"):
        TeacherModule(NO_NULL)
    assert TeacherModule(NO_NULL, label_dropout=0.0).model.config == NO_NULL
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


# Folders


def folder(path: Path, *forms: str, **changes: Any) -> Any:
    """A folder of diffusers with weights in the given forms, and the model."""
    model = diffusers_model(**changes)
    for form in forms:
        size = {"max_shard_size": "20KB"} if form.startswith("shards") else {}
        variant = form.partition(" ")[2] or None
        saved = model.half() if variant == "fp16" else model.float()
        saved.save_pretrained(path / form, variant=variant, **size)
        for file in (path / form).iterdir():
            file.rename(path / file.name)
        (path / form).rmdir()
    return model.float()


WHOLE, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
FP16 = "diffusion_pytorch_model.fp16.safetensors"


@pytest.mark.parametrize(
    ("forms", "told"),
    [
        (("whole",), None),
        (("variant fp16",), f"took {FP16}, the only precision there"),
        (("shards",), None),
        (("shards fp16",), "took diffusion_pytorch_model.safetensors.index.fp16.json, the only precision there"),
        (("whole", "variant fp16"), f"took {WHOLE} (there is also {FP16})"),
        (("shards", "variant fp16"), f"took {INDEX} (there is also {FP16})"),
        (("shards", "whole"), f"took {WHOLE} (there is also {INDEX})"),
    ],
)
def test_folders(tmp_path, forms, told):
    theirs, lines = diffusers_model(), []
    folder(tmp_path, *forms)
    if all("fp16" in form for form in forms):
        theirs.load_state_dict({name: value.half() for name, value in theirs.state_dict().items()})
    ours = load_teacher(TeacherSpec(str(tmp_path)), lines.append)
    require_same_forward(ours, lambda x, t, y: theirs(x, t.long(), class_labels=y).sample)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert lines == ([f"{tmp_path}: {told}"] if told else [])


def test_one_digest_for_all_forms(tmp_path):
    forms = ("whole", "shards")
    for form in forms:
        (tmp_path / form).mkdir()
        folder(tmp_path / form, form)
    digests = {teacher_digest(load_teacher(TeacherSpec(str(tmp_path / form)))) for form in forms}
    assert len(digests) == 1


def test_several_variants(tmp_path):
    folder(tmp_path, "whole")
    for variant in ("bf16", "fp16"):
        save_file(load_file(tmp_path / WHOLE), tmp_path / f"diffusion_pytorch_model.{variant}.safetensors")
    (tmp_path / WHOLE).unlink()
    with pytest.raises(TeacherError, match=r"several variants \(diffusion_pytorch_model\.bf16.*fp16.*set `weights`"):
        load_teacher(TeacherSpec(str(tmp_path)))
    assert load_teacher(TeacherSpec(str(tmp_path / FP16))).config.depth == 2


def change_index(path: Path, **entries: Any) -> None:
    raw = json.loads((path / INDEX).read_text(encoding="utf-8"))
    raw["weight_map"] |= entries
    (path / INDEX).write_text(json.dumps(raw), encoding="utf-8")


def first_shard(path: Path) -> Path:
    return min(path.glob("*-of-*"))


BREAK: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda p: first_shard(p).unlink(), "names the shard diffusion_pytorch_model-00001-of"),
    "a shard is cut": (lambda p: os.truncate(first_shard(p), 1000), "damaged"),
    "a shard is noise": (lambda p: first_shard(p).write_bytes(bytes(5000)), "damaged"),
    "a shard of another model": (lambda p: save_file({"a": torch.ones(1)}, first_shard(p)), "does not hold the tensors"),
    "outside": (lambda p: change_index(p, x="../other.safetensors"), "a .safetensors or .bin file of the same folder"),
    "absolute": (lambda p: change_index(p, x="/etc/model.safetensors"), "a .safetensors or .bin file of the same folder"),
    "itself": (lambda p: change_index(p, x=INDEX), "a .safetensors or .bin file of the same folder"),
    "no name": (lambda p: change_index(p, x=3), "a .safetensors or .bin file of the same folder"),
    "a tensor more": (lambda p: change_index(p, x=first_shard(p).name), "does not hold the tensors"),
    "no map": (lambda p: (p / INDEX).write_text("{}", encoding="utf-8"), "no index of shards"),
    "no JSON": (lambda p: (p / INDEX).write_bytes(b"\xff{"), INDEX),
    "no index": (lambda p: (p / INDEX).unlink(), "only shards"),
}


@pytest.mark.parametrize("name", BREAK)
def test_broken_shards(tmp_path, name):
    folder(tmp_path, "shards")
    assert len(list(tmp_path.glob("*-of-*"))) > 1
    breaking, words = BREAK[name]
    breaking(tmp_path)
    with pytest.raises(TeacherError) as caught:
        load_teacher(TeacherSpec(str(tmp_path)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_diffusers_without_its_folder(tmp_path):
    folder(tmp_path, "whole")
    (tmp_path / "config.json").unlink()
    with pytest.raises(TeacherError, match=r"diffusers' names.*config\.json"):
        load_teacher(TeacherSpec(str(tmp_path / WHOLE), dit=TINY))


# Mismatches


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"depth": 5}, "depth is 2 in the weights and 5 in the configuration"),
        ({"hidden_size": 48}, "hidden_size is 24 in the weights and 48"),
        ({"patch_size": 4, "input_size": 16}, "patch_size is 2 in the weights and 4 in the configuration; input_size is 8"),
        ({"input_size": 16}, "input_size is 8 in the weights and 16"),
        ({"in_channels": 4}, "in_channels is 3 in the weights and 4"),
        ({"num_classes": 10}, "num_classes is 5 (or 6 if the label table has no row for a null label) in the weights and 10"),
        ({"learn_sigma": False}, "learn_sigma is True in the weights and False"),
        ({"mlp_ratio": 2.0}, "mlp_ratio is 4.0 in the weights and 2.0"),
        ({"depth": 3, "num_classes": 3, "hidden_size": 32}, "depth is 2 in the weights and 3 in the configuration; hidden_size is 24"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_nearest_cause(tmp_path, changes, cause, prefix):
    torch.save(under(prefix, weights()), tmp_path / "t.pt")
    with pytest.raises(TeacherError) as caught:
        load_teacher(TeacherSpec(str(tmp_path / "t.pt"), dit=dataclasses.replace(TINY, **changes)))
    assert f"does not fit the model: {cause.partition(' ')[0]}" in str(caught.value)
    assert cause in str(caught.value)
    assert "missing" not in str(caught.value)
    assert "blocks." not in str(caught.value)


def test_a_cause_and_a_key(tmp_path):
    state = weights()
    del state["blocks.1.attn.qkv.bias"]
    torch.save(state, tmp_path / "t.pt")
    with pytest.raises(TeacherError, match=r"depth is 2 .* and 5 in the configuration; missing blocks\.1\.attn\.qkv\.bias \(72,\)\. C"):
        load_teacher(TeacherSpec(str(tmp_path / "t.pt"), dit=dataclasses.replace(TINY, depth=5)))


def test_the_preset_that_it_looks_like(tmp_path):
    small = preset("DiT-S/8", input_size=64)
    torch.save({name: torch.zeros(()).expand(tensor.shape) for name, tensor in DiT(small).state_dict().items()}, tmp_path / "t.pt")
    for spec in (TeacherSpec(str(tmp_path / "t.pt")), TeacherSpec(str(tmp_path / "t.pt"), preset="DiT-B/8")):
        with pytest.raises(TeacherError, match=r"`preset: DiT-S/8` with `input_size: 64`"):
            load_teacher(spec)
    assert load_teacher(TeacherSpec(str(tmp_path / "t.pt"), preset="DiT-S/8", input_size=64)).config == small


def test_one_anchor_is_not_a_network(tmp_path):
    state = weights()
    state["module.x_embedder.proj.weight"] = state.pop("x_embedder.proj.weight")
    torch.save(state, tmp_path / "t.pt")
    with pytest.raises(TeacherError, match=r"keys without a prefix, keys `module\.\*`"):
        load_teacher(TeacherSpec(str(tmp_path / "t.pt"), dit=TINY))
