"""Which teacher is meant: where its file is, and what shape the user says that it has."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tc_lightning.errors import TeacherError
from tc_lightning.models.dit import DiT, DiTConfig, preset
from tc_lightning.models.families import family_of
from tc_lightning.models.network import Network
from tc_lightning.plan.signature import LATENTS

_TOLD = (("null_label", True), ("output", LATENTS))  # what a `dit` says by saying nothing
ROOT = Path(__file__).resolve().parents[3]


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """Which teacher to load.

    Args:
        weights: a `.pt`, `.ckpt` or `.safetensors` file, or a folder in diffusers' layout (or the one of its weights files that is
            meant); a relative path starts at the working directory or, failing that, at the repository.
        preset: shape by name, for example `DiT-XL/2`, for files that do not tell their own.
        dit: shape in full, in place of `preset`.
        input_size: height and width of the latents, where they are not the preset's 32.
        family: which networks these are weights of (`tc_lightning.models.families`), where the file does not tell: several share
            names and shapes. None: what the file tells, or else dit.
        conditions: a `.npz` file with examples of conditions that cannot be drawn as class labels are: an array [rows, ...] of each;
            looked for as `weights` are.
        text_tokens: how many tokens a text has, for networks that read one, where it is not the family's usual number.
    """

    weights: str
    preset: str | None = None
    dit: DiTConfig | None = None
    input_size: int | None = None
    family: str | None = None
    conditions: str | None = None
    text_tokens: int | None = None


def locate(weights: str) -> Path:
    """The file or folder that is meant.

    Raises:
        TeacherError: if there is none, naming where it was looked for.
    """
    for candidate in _candidates(weights):
        if weights and candidate.exists():
            return candidate
    looked = " and ".join(str(candidate) for candidate in dict.fromkeys(_candidates(weights)))
    raise TeacherError(
        f"no teacher at {weights!r} (looked for {looked}). Set `weights` to a .pt or .safetensors file or a diffusers folder."
    )


def locate_conditions(path: str) -> Path:
    """The file of conditions that is meant, looked for where weights are; if there is none, that of the working directory."""
    return next((candidate for candidate in _candidates(path) if candidate.exists()), Path(path).expanduser())


def _candidates(said: str) -> list[Path]:
    path = Path(said).expanduser()
    return [path] if path.is_absolute() else [Path.cwd() / path, ROOT / path]


def resolve(spec: TeacherSpec, found: Any, path: Path) -> Any:
    """The shape: what the checkpoint says or what the user says; None if neither speaks.

    Raises:
        TeacherError: if they disagree, or the user says nothing that is possible.
    """
    asked = _asked(spec)
    if found is None:
        return None if spec.dit is None and spec.preset is None else DiTConfig(**asked)
    there = dataclasses.asdict(found)
    clashes = [f"{k} is {there.get(k, 'unheard of')} there and {v} here" for k, v in asked.items() if there.get(k) != v]
    if clashes:
        raise TeacherError(f"the shape in {path} contradicts the configuration ({'; '.join(clashes)}): correct or remove the latter.")
    return found


def resolve_family(spec: TeacherSpec, found: str | None, path: Path) -> type[Network]:
    """The family: what the checkpoint says or what the user says; DiT if neither speaks.

    Raises:
        TeacherError: if they disagree, or there is no such family.
    """
    asked = None if spec.family is None else family_of(spec.family).network.family
    if None not in (asked, found) and asked != found:
        raise TeacherError(f"{path} holds a {found}, and `family` is {asked}: correct or remove the latter.")
    return family_of(asked or found or DiT.family).network


def _asked(spec: TeacherSpec) -> dict[str, Any]:
    """Fields that the user has set."""
    asked: dict[str, Any] = {}
    if spec.dit is not None:
        asked = {k: v for k, v in dataclasses.asdict(spec.dit).items() if (k, v) not in _TOLD}  # the checkpoint tells
        if spec.input_size not in (None, spec.dit.input_size):
            raise TeacherError(f"`input_size` is {spec.input_size} and `dit.input_size` is {spec.dit.input_size}: set one of them.")
    elif spec.preset is not None:
        conventions = ("freq_shift", "mlp_norm_eps", "null_label", "output")  # not part of a shape's name: the checkpoint's own hold
        asked = {k: v for k, v in dataclasses.asdict(preset(spec.preset)).items() if k not in conventions}
    return asked if spec.input_size is None else asked | {"input_size": spec.input_size}
