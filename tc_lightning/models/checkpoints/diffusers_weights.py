"""Which of the weights in a folder of diffusers are read: whole or in shards, in full precision or a variant."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.safetensors_file import read_safetensors
from tc_lightning.models.checkpoints.state import parse_json
from tc_lightning.models.checkpoints.state_choice import ReadState, choose
from tc_lightning.models.checkpoints.torch_file import read_torch

STEM = "diffusion_pytorch_model"
_FORMS = ("{v}.safetensors", ".safetensors.index{v}.json", "{v}.bin", ".bin.index{v}.json")  # best first; {v}: .fp16, or nothing


class WeightsFile(NamedTuple):
    """A weights file or an index of shards, and why it was chosen, in words (empty if there was no choice)."""

    file: Path
    notes: list[str]


def choose_weights(folder: Path) -> WeightsFile:
    """Full precision before a variant, safetensors before pickles, whole before shards.

    Raises:
        TeacherError: if there is none, or there are several variants and none in full precision.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for form in _FORMS:
        pattern = re.escape(STEM + form).replace(re.escape("{v}"), r"(\.[^.-]+)?")
        for file in sorted(folder.iterdir()):
            if match := re.fullmatch(pattern, file.name):
                found[(match[1] or "").removeprefix(".")].append(file)
    if not found:
        shards = f", only shards ({STEM}-...) without their index" if any(folder.glob(f"{STEM}*-of-*")) else ""
        raise TeacherError(f"{folder} holds no weights{shards}: {STEM}.safetensors, a variant of it or an index was expected.")
    if "" not in found and len(found) > 1:
        names = ", ".join(files[0].name for files in found.values())
        raise TeacherError(
            f"{folder} holds several variants ({names}) and none in full precision: set `weights` to one of these files."
        )
    variant = "" if "" in found else next(iter(found))
    chosen = found[variant][0]
    others = sorted(file.name for files in found.values() for file in files if file != chosen)
    notes = [f"took {chosen.name}"] if variant or others else []
    if variant:
        notes[0] += ", the only precision there"
    if others:
        notes[0] += f" (there is also {', '.join(others)})"
    return WeightsFile(chosen, notes)


def read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a weights file, or of the shards that an index names.

    Raises:
        TeacherError: if a file is missing, damaged, or disagrees with the index.
    """
    if file.suffix == ".json":
        return _read_shards(file)
    return read_safetensors(file).tensors if file.suffix == ".safetensors" else read_torch(file)


def _read_shards(index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard, names in _shards(index).items():
        path = index.parent / shard
        if not path.is_file():
            raise TeacherError(f"{index} names the shard {shard}, which is not there: fetch the folder again, whole.")
        held = read_weights(path)
        if not isinstance(held, dict) or set(held) != names:
            differing = sorted(map(str, names.symmetric_difference(held)))[:1] if isinstance(held, dict) else []
            raise TeacherError(
                f"{path} does not hold the tensors that {index.name} says it does ({', '.join(differing) or 'it is no dict'}): "
                "the folder mixes files of two checkpoints, or one is damaged. Fetch it again, whole."
            )
        tensors |= held
    return tensors


def _shards(index: Path) -> dict[str, set[str]]:
    """Names of the tensors in each shard; a shard is a file beside the index, and nothing else."""
    try:
        raw = parse_json(index.read_text(encoding="utf-8"), index).get("weight_map")
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"{index} cannot be read ({error}).") from error
    if not isinstance(raw, dict) or not raw:
        raise TeacherError(f"{index} is no index of shards: a weight_map from tensors to files was expected. Fetch it again.")
    shards: dict[str, set[str]] = defaultdict(set)
    for name, shard in raw.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.(safetensors|bin)", shard):
            raise TeacherError(f"{index} places {name} in {shard!r}: a .safetensors or .bin file of the same folder was expected.")
        shards[shard].add(name)
    return shards


def read_state(path: Path, anchors: tuple[str, ...]) -> ReadState:
    """The network's tensors in a model's folder, or in the one of its weights files (or indices) that is meant, under diffusers' names.

    Args:
        path: the folder or file.
        anchors: names of tensors of which the network has each once.

    Raises:
        TeacherError: if weights are missing, damaged, or not those of one such network.
    """
    chosen = choose_weights(path) if path.is_dir() else WeightsFile(path, [])
    read = choose(read_weights(chosen.file), chosen.file, anchors)
    return ReadState(read.state, chosen.notes + read.notes)
