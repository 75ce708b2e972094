"""Folders of diffusers as people have them: variants, shards, and broken ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher_files import TINY, diffusers_model, require_same_forward

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, teacher_digest


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
