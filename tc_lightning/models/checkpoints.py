"""Reading and writing teachers: the original release's `.pt`, `.safetensors`, and diffusers' `DiTTransformer2DModel` folders.

Nothing in a checkpoint is executed, nothing is guessed: every key, shape and value is checked, and a model comes out or a
`TeacherError`. diffusers itself is not needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tc_lightning.errors import TeacherError
from tc_lightning.models.dit import DiT, DiTConfig, preset

ROOT = Path(__file__).resolve().parents[2]
State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """Which teacher to load.

    Args:
        weights: a `.pt` or `.safetensors` file, or a folder in diffusers' layout; a relative path starts at
            the working directory or, failing that, at the repository.
        preset: shape by name, for example `DiT-XL/2`, for files that do not tell their own.
        dit: shape in full, in place of `preset`.
        input_size: height and width of the latents, where they are not the preset's 32.
    """

    weights: str
    preset: str | None = None
    dit: DiTConfig | None = None
    input_size: int | None = None


def load_teacher(spec: TeacherSpec) -> DiT:
    """Load a frozen teacher in eval mode, fp32, on the CPU.

    Raises:
        TeacherError: if the checkpoint is missing, damaged or unsafe, its shape is unknown or contradicted, its keys do not
            match, or a weight is not finite.
    """
    path = _locate(spec.weights)
    state: State
    found: DiTConfig | None
    if path.is_dir():
        state, found = _read_diffusers(path)
    elif path.suffix == ".safetensors":
        state, found = _read_safetensors(path)
    else:
        state, found = _read_torch(path), None
    return _build(_resolve(spec, found, path), state, path)


def save_teacher(model: DiT, path: Path) -> None:
    """Write the model as `.safetensors` with its shape and digest; an interrupted write leaves the old file in place.

    Raises:
        TeacherError: if the file cannot be written.
    """
    config = config_json(model.config)
    state = {name: _plain(tensor) for name, tensor in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, temporary, {"dit_config": config, "sha256": _digest(config, state)})
        temporary.chmod(0o644)  # safetensors makes it private
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"cannot write the teacher to {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def teacher_digest(model: DiT) -> str:
    """sha256 of the shape and of every weight in fp32, wherever the model lives."""
    return _digest(config_json(model.config), model.state_dict())


def config_json(config: DiTConfig) -> str:
    """Canonical JSON of a shape."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def _digest(config: str, state: State) -> str:
    hasher = hashlib.sha256(config.encode())
    for name in sorted(state):
        tensor = _plain(state[name])
        hasher.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.numpy().data)
    return hasher.hexdigest()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _locate(weights: str) -> Path:
    path = Path(weights).expanduser()
    candidates = [path] if path.is_absolute() else [Path.cwd() / path, ROOT / path]
    for candidate in candidates:
        if weights and candidate.exists():
            return candidate
    looked = " and ".join(str(candidate) for candidate in dict.fromkeys(candidates))
    raise TeacherError(
        f"no teacher at {weights!r} (looked for {looked}). Set `weights` to a .pt or .safetensors file or a diffusers folder."
    )


def _resolve(spec: TeacherSpec, found: DiTConfig | None, path: Path) -> DiTConfig:
    """The shape: what the checkpoint says, what the user says, or an error if they disagree or neither speaks."""
    asked = _asked(spec)
    if found is None:
        if spec.dit is None and spec.preset is None:
            raise TeacherError(f"{path} does not tell the model's shape: set `preset` (for example DiT-XL/2) or `dit`.")
        return DiTConfig(**asked)
    clashes = [f"{k} is {getattr(found, k)} there and {v} here" for k, v in asked.items() if getattr(found, k) != v]
    if clashes:
        raise TeacherError(f"the shape in {path} contradicts the configuration ({'; '.join(clashes)}): correct or remove the latter.")
    return found


def _asked(spec: TeacherSpec) -> dict[str, Any]:
    """Fields that the user has set."""
    asked: dict[str, Any] = {}
    if spec.dit is not None:
        asked = dataclasses.asdict(spec.dit)
        if spec.input_size not in (None, spec.dit.input_size):
            raise TeacherError(f"`input_size` is {spec.input_size} and `dit.input_size` is {spec.dit.input_size}: set one of them.")
    elif spec.preset is not None:
        conventions = ("freq_shift", "mlp_norm_eps")  # not part of a shape's name: the checkpoint's own hold
        asked = {k: v for k, v in dataclasses.asdict(preset(spec.preset)).items() if k not in conventions}
    return asked if spec.input_size is None else asked | {"input_size": spec.input_size}


def _read_torch(path: Path) -> State:
    """A state dict, plain or under `ema` or `model`, without ever running code from the file."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the release's training script stores its arguments
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TeacherError(
            f"{path} cannot be read as a checkpoint of plain tensors ({reason[:200]}). Either it is damaged, and should be "
            "fetched again, or it is a pickle of other objects, which is not opened because that can run code: where you trust "
            "it, save `model.state_dict()` alone, best as .safetensors."
        ) from error
    for key in ("ema", "model"):
        if isinstance(raw, dict) and isinstance(raw.get(key), dict):
            return _state(raw[key], path)
    return _state(raw, path)


def _state(raw: Any, path: Path) -> State:
    if isinstance(raw, dict) and raw and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in raw.items()):
        return {name: _checked(name, tensor, path) for name, tensor in raw.items()}
    held = f"a dict of {', '.join(map(str, list(raw)[:5])) or 'nothing'}" if isinstance(raw, dict) else f"a {type(raw).__name__}"
    raise TeacherError(f"{path} holds {held}; a state dict of tensors, plain or under `ema` or `model`, was expected.")


def _checked(name: str, tensor: Tensor, path: Path) -> Tensor:
    """An own fp32 copy, so that the model does not hang on the file."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise TeacherError(f"{path}: tensor {name} is {tensor.dtype} ({tensor.layout}); dense floating-point weights are expected.")
    own = tensor.to(torch.float32, copy=True)
    if not torch.isfinite(own).all():
        raise TeacherError(f"{path}: tensor {name} holds NaN or infinite values. The checkpoint is damaged or its training diverged.")
    return own


def _read_safetensors(path: Path) -> tuple[State, DiTConfig | None]:
    """Tensors, and the shape if `save_teacher` wrote the file; then its digest is checked too."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            raw = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise TeacherError(f"{path} is damaged or not a safetensors file ({error}). Copy or create it again.") from error
    if "dit_config" not in metadata:
        return _state(raw, path), None
    if metadata.get("sha256") != _digest(metadata["dit_config"], raw):
        raise TeacherError(f"{path} is damaged: its content does not have the sha256 it was written with. Copy or create it again.")
    return _state(raw, path), _parse_config(metadata["dit_config"], path)


def _parse_config(text: str, path: Path) -> DiTConfig:
    raw = _parse_json(text, path)
    defaults = dataclasses.asdict(DiTConfig())
    for key, value in raw.items():
        if key not in defaults or not _fits(value, defaults[key]):
            raise TeacherError(f"{path}: the shape in its metadata has {key} = {value!r}, which this version does not understand.")
    return DiTConfig(**raw)


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise TeacherError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise TeacherError(f"{path}: a JSON object was expected, found {type(raw).__name__}.")
    return raw


def _fits(value: Any, default: Any) -> bool:
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def _build(config: DiTConfig, state: State, path: Path) -> DiT:
    with torch.device("meta"):
        model = DiT(config)
    if "pos_embed" not in state:  # a fixed table: some releases leave it out
        state["pos_embed"] = model.pos_embed.detach()
    _match({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, state, path)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _match(expected: dict[str, tuple[int, ...]], state: State, path: Path) -> None:
    """Every key there, none left over, every shape right."""
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    faults += [f"unexpected {name} {shape}" for name, shape in found.items() if name not in expected]
    faults += [f"{n} should be {s}, is {found[n]}" for n, s in expected.items() if n in found and found[n] != s]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise TeacherError(
            f"{path} does not fit the model: {'; '.join(faults[:5])}{more}. Check the shape (`preset`, `dit`, `input_size`)."
        )


_DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
_DIFFUSERS_FIXED: dict[str, Any] = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
_DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_DIFFUSERS_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_DIFFUSERS_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
_DIFFUSERS_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}


def _read_diffusers(folder: Path) -> tuple[State, DiTConfig]:
    """Weights under the release's names, and the shape; `folder` may be the model's or a whole pipeline's."""
    if not (folder / "config.json").exists() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if not (folder / "config.json").exists():
        raise TeacherError(
            f"{folder} holds no config.json; a folder must be in diffusers' layout (config.json and {_DIFFUSERS_WEIGHTS[0]})."
        )
    config = _diffusers_config(folder / "config.json")
    for name in _DIFFUSERS_WEIGHTS:
        file = folder / name
        if file.exists():
            state = _read_safetensors(file)[0] if file.suffix == ".safetensors" else _read_torch(file)
            return _rename(state, file), config
    raise TeacherError(f"{folder} holds no weights: {' or '.join(_DIFFUSERS_WEIGHTS)} was expected (sharded weights are not read).")


def _diffusers_config(path: Path) -> DiTConfig:
    """Translate config.json; freq_shift and mlp_norm_eps are those with which diffusers runs the weights."""
    try:
        raw = _parse_json(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"{path} cannot be read ({error}).") from error
    for key, value in _DIFFUSERS_FIXED.items():
        if raw.get(key, value) != value:
            raise TeacherError(f"{path}: {key} is {raw[key]!r}; a DiT has {value!r}, and nothing else is supported.")
    c = {key: raw.get(key, default) for key, default in _DIFFUSERS_DEFAULTS.items()}
    for key, value in c.items():
        if not _fits(value, _DIFFUSERS_DEFAULTS[key]):
            raise TeacherError(f"{path}: {key} is {value!r}; a number was expected.")
    channels, out = c["in_channels"], raw.get("out_channels") or c["in_channels"]
    if out not in (channels, 2 * channels):
        raise TeacherError(f"{path}: out_channels is {out!r}; {channels} or {2 * channels} (learned variance) was expected.")
    return DiTConfig(
        input_size=c["sample_size"],
        patch_size=c["patch_size"],
        in_channels=channels,
        hidden_size=c["num_attention_heads"] * c["attention_head_dim"],
        depth=c["num_layers"],
        num_heads=c["num_attention_heads"],
        num_classes=c["num_embeds_ada_norm"],
        learn_sigma=out == 2 * channels,
        freq_shift=1.0,
        mlp_norm_eps=c["norm_eps"],
    )


def _rename(state: State, path: Path) -> State:
    """diffusers' names -> the release's; what is not recognised keeps its name and is reported by `_match`."""
    renamed: State = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem)
        index, part = block.groups() if block else ("", stem)
        if block and part in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
            qkv.setdefault(f"blocks.{index}.attn.qkv.{kind}", {})[part[-1]] = tensor
        elif block and part.removeprefix("norm1.emb.") in _DIFFUSERS_EMBEDDERS:
            _share(renamed, f"{_DIFFUSERS_EMBEDDERS[part.removeprefix('norm1.emb.')]}.{kind}", tensor, name, path)
        elif block and part in _DIFFUSERS_BLOCK:
            renamed[f"blocks.{index}.{_DIFFUSERS_BLOCK[part]}.{kind}"] = tensor
        elif stem in _DIFFUSERS_ENDS:
            renamed[f"{_DIFFUSERS_ENDS[stem]}.{kind}"] = tensor
        else:
            renamed["pos_embed" if name == "pos_embed.pos_embed" else name] = tensor
    return renamed | {name: _join(parts) for name, parts in qkv.items()}


def _share(renamed: State, target: str, tensor: Tensor, name: str, path: Path) -> None:
    """diffusers repeats the embedders in every block; a DiT has one."""
    if not torch.equal(renamed.setdefault(target, tensor), tensor):
        raise TeacherError(
            f"{path}: {name} differs from the same tensor of another block. A DiT has one timestep and one class embedder; "
            "diffusers stores a copy in every block, equal in converted checkpoints but not in models that it trained itself."
        )


def _join(parts: dict[str, Tensor]) -> Tensor:
    """One matrix from q, k and v; a missing one shows as a wrong shape."""
    present = [parts[key] for key in "qkv" if key in parts]
    same = all(p.shape[1:] == present[0].shape[1:] for p in present)
    return torch.cat(present) if same else present[0]
