from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from teacher_files import TINY, refuse, same

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints import ROOT, TeacherSpec, load_teacher, save, save_teacher, spec, teacher_digest
from tc_lightning.models.checkpoints.digest import digest
from tc_lightning.models.dit import DiT, randomise_


@pytest.fixture
def model() -> DiT:
    return randomise_(DiT(TINY), seed=0)


# Round trips


def test_save_and_load(model, tmp_path):
    path = tmp_path / "new" / "teacher.safetensors"
    save_teacher(model, path)
    save_teacher(model, path)  # over the old file
    loaded = load_teacher(TeacherSpec(str(path)))
    assert same(loaded, model)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert [p.name for p in path.parent.iterdir()] == ["teacher.safetensors"]
    with torch.no_grad():
        args = (torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 5]))
        assert torch.equal(loaded(*args), model(*args))


def test_model_does_not_hang_on_its_file(model, tmp_path):
    for path in (tmp_path / "t.safetensors", tmp_path / "t.pt"):
        save_teacher(model, path) if path.suffix == ".safetensors" else torch.save(model.state_dict(), path)
        loaded = load_teacher(TeacherSpec(str(path), dit=TINY))
        with path.open("r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
        assert same(loaded, model)


def test_loading_leaves_the_random_state_alone(model, tmp_path):
    save_teacher(model, tmp_path / "t.safetensors")
    before = torch.get_rng_state()
    load_teacher(TeacherSpec(str(tmp_path / "t.safetensors")))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrap", ["plain", "ema", "model", "both", "training_script", "legacy"])
def test_original_release_layouts(model, tmp_path, wrap):
    state, other = model.state_dict(), randomise_(DiT(TINY), seed=9).state_dict()
    raw = {
        "plain": state,
        "legacy": state,
        "ema": {"ema": state},
        "model": {"model": state},
        "both": {"model": other, "ema": state},
        "training_script": {"model": other, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)},
    }[wrap]
    torch.save(raw, tmp_path / "t.pt", _use_new_zipfile_serialization=wrap != "legacy")
    assert same(load_teacher(TeacherSpec(str(tmp_path / "t.pt"), dit=TINY)), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(model, tmp_path, dtype):
    torch.save({k: v.to(dtype) for k, v in model.state_dict().items()}, tmp_path / "t.pt")
    loaded = load_teacher(TeacherSpec(str(tmp_path / "t.pt"), dit=TINY))
    expected = model.state_dict()["blocks.0.mlp.fc1.weight"].to(dtype).float()
    assert torch.equal(loaded.state_dict()["blocks.0.mlp.fc1.weight"], expected)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


def test_position_table_may_be_absent(model, tmp_path):
    state = {k: v for k, v in model.state_dict().items() if k != "pos_embed"}
    save_file(state, tmp_path / "t.safetensors")
    assert same(load_teacher(TeacherSpec(str(tmp_path / "t.safetensors"), dit=TINY)), model)


def test_preset_with_input_size(tmp_path, monkeypatch):
    monkeypatch.setattr(spec, "preset", lambda name: dataclasses.replace(TINY, input_size=32))
    torch.save(DiT(TINY).state_dict(), tmp_path / "t.pt")
    assert load_teacher(TeacherSpec(str(tmp_path / "t.pt"), preset="DiT-S/2", input_size=8)).config == TINY
    refuse(TeacherSpec(str(tmp_path / "t.pt"), preset="DiT-S/2"), "input_size is 8 in the weights and 32 in the configuration")


# Where files are looked for


def test_relative_paths(model, tmp_path, monkeypatch):
    work, root = tmp_path / "work", tmp_path / "root"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(spec, "ROOT", root)
    save_teacher(model, root / "data" / "t.safetensors")
    assert same(load_teacher(TeacherSpec("data/t.safetensors")), model)
    other = randomise_(DiT(TINY), seed=1)
    save_teacher(other, work / "data" / "t.safetensors")
    assert same(load_teacher(TeacherSpec("data/t.safetensors")), other)
    refuse(TeacherSpec("gone.pt"), "gone.pt", str(work), str(root))
    refuse(TeacherSpec(""), "no teacher at ''")


def test_root_is_the_repository():
    assert (ROOT / "tc_lightning" / "models" / "checkpoints" / "spec.py").exists()


# Shapes


def test_unknown_shape(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "t.pt")
    refuse(TeacherSpec(str(tmp_path / "t.pt")), "preset", "dit", "t.pt")
    refuse(TeacherSpec(str(tmp_path / "t.pt"), preset="DiT-Q/2"), "unknown preset")


def test_contradicting_shape(model, tmp_path):
    path = str(tmp_path / "t.safetensors")
    save_teacher(model, Path(path))
    assert same(load_teacher(TeacherSpec(path, dit=TINY, input_size=8)), model)
    refuse(TeacherSpec(path, dit=dataclasses.replace(TINY, num_heads=4)), "num_heads is 2 there and 4 here")
    refuse(TeacherSpec(path, preset="DiT-S/2"), "contradicts", "hidden_size is 24 there and 384 here")
    refuse(TeacherSpec(path, input_size=16), "input_size is 8 there and 16 here")
    refuse(TeacherSpec(path, dit=TINY, input_size=16), "set one of them")


def test_file_from_before_a_field_existed(model, tmp_path):
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    old = {k: v for k, v in dataclasses.asdict(TINY).items() if k not in ("freq_shift", "mlp_norm_eps")}
    text = json.dumps(old)
    save_file(state, tmp_path / "t.safetensors", {"dit_config": text, "sha256": digest(text, state)})
    loaded = load_teacher(TeacherSpec(str(tmp_path / "t.safetensors")))
    assert loaded.config == dataclasses.replace(TINY, output="pixels")  # what the package trained then
    assert teacher_digest(loaded) == teacher_digest(model)


@pytest.mark.parametrize(
    ("text", "word"),
    [("{", "JSON"), ("[1]", "object"), ('{"colour": 1}', "colour"), ('{"depth": "2"}', "depth"), ('{"depth": 0}', "depth")],
)
def test_bad_shape_in_metadata(model, tmp_path, text, word):
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "t.safetensors", {"dit_config": text, "sha256": digest(text, state)})
    refuse(TeacherSpec(str(tmp_path / "t.safetensors")), word)


# Keys and values


def test_keys_are_strict(model, tmp_path):
    path, state = str(tmp_path / "t.pt"), dict(model.state_dict())
    del state["blocks.1.mlp.fc1.bias"]
    state["extra"] = torch.zeros(3)
    state["blocks.0.attn.proj.weight"] = torch.zeros(24, 12)
    torch.save(state, path)
    refuse(
        TeacherSpec(path, dit=TINY),
        "missing blocks.1.mlp.fc1.bias (96,)",
        "unexpected extra (3,)",
        "blocks.0.attn.proj.weight should be (24, 24), is (24, 12)",
    )
    torch.save(model.state_dict(), path)
    refuse(TeacherSpec(path, dit=dataclasses.replace(TINY, depth=5)), "depth is 2 in the weights and 5 in the configuration")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_values_that_are_not_finite(model, tmp_path, value, suffix):
    with torch.no_grad():
        model.blocks[1].attn.qkv.bias[7] = value
    path = tmp_path / f"t{suffix}"
    save_teacher(model, path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    refuse(TeacherSpec(str(path), dit=TINY), "blocks.1.attn.qkv.bias", "NaN or infinite")


def test_quantised_weights(model, tmp_path):
    torch.save(model.state_dict() | {"pos_embed": torch.zeros(1, 16, 24, dtype=torch.int8)}, tmp_path / "t.pt")
    refuse(TeacherSpec(str(tmp_path / "t.pt"), dit=TINY), "pos_embed is torch.int8")


# Damage


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL"],))


@pytest.mark.parametrize("torch_format", [True, False])
def test_pickle_is_not_run(tmp_path, monkeypatch, torch_format):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    path = tmp_path / "t.pt"
    torch.save({"model": Evil()}, path) if torch_format else path.write_bytes(pickle.dumps(Evil()))
    refuse(TeacherSpec(str(path), dit=TINY), str(path), "state_dict")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("raw", [[1, 2], {"epoch": 3}, {}, {"model": {"a": 1}}, torch.zeros(2)])
def test_not_a_state_dict(tmp_path, raw):
    torch.save(raw, tmp_path / "t.pt")
    refuse(TeacherSpec(str(tmp_path / "t.pt"), dit=TINY), "state dict", "t.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", bytes(range(200))])
def test_garbage(tmp_path, suffix, content):
    path = tmp_path / f"t{suffix}"
    path.write_bytes(content)
    refuse(TeacherSpec(str(path), dit=TINY), str(path))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncation(model, tmp_path, suffix, share):
    path = tmp_path / f"t{suffix}"
    save_teacher(model, path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refuse(TeacherSpec(str(path), dit=TINY), str(path))


def test_every_flipped_bit_is_noticed(model, tmp_path):
    path = tmp_path / "t.safetensors"
    save_teacher(model, path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    for position in [*range(8), *rng.sample(range(8, header), 60), *rng.sample(range(header, len(content)), 40)]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(TeacherError, match=r"t\.safetensors"):
            load_teacher(TeacherSpec(str(path)))


def test_every_flipped_bit_of_what_a_file_says_of_itself_is_noticed(model, tmp_path):
    """In which order it says so differs from file to file."""
    path = tmp_path / "t.safetensors"
    save_teacher(model, path)
    content = path.read_bytes()
    for position in range(8, content.index(b'"dtype"')):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 7
        path.write_bytes(damaged)
        with pytest.raises(TeacherError, match=r"t\.safetensors"):
            load_teacher(TeacherSpec(str(path)))


def test_interrupted_write_keeps_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    save_teacher(model, path)

    def full_disk(*args):
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "save_file", full_disk)
    with pytest.raises(TeacherError, match="No space left"):
        save_teacher(randomise_(DiT(TINY), seed=5), path)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    assert same(load_teacher(TeacherSpec(str(path))), model)


# Digest


def test_digest(model, tmp_path):
    digest = teacher_digest(model)
    assert len(digest) == 64
    save_teacher(model, tmp_path / "t.safetensors")
    assert teacher_digest(load_teacher(TeacherSpec(str(tmp_path / "t.safetensors")))) == digest
    with torch.no_grad():
        model.blocks[1].attn.proj.bias[0] += 1e-6
    assert teacher_digest(model) != digest
    heads = DiT(dataclasses.replace(TINY, num_heads=4))
    heads.load_state_dict(randomise_(DiT(TINY), seed=0).state_dict())
    assert teacher_digest(heads) != digest
