"""What Triton is told of an artefact: its `config.pbtxt`, written from the manifest. Standard library only."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import conditions_from_json
from tc_lightning.plan.signature import PIXELS, ModelSignature

CPU, CUDA, EITHER = "cpu", "cuda", "either"
PROVIDERS = (CPU, CUDA, EITHER)  # `either`: CUDA where Triton puts an instance on a GPU, the CPU where it has none
SEED, INDEX, GUIDANCE, FULL = "seed", "index", "guidance", "full"
IMAGE, LATENT, RECEIPT = "image", "latent", "receipt"
TYPES = {"int64": "TYPE_INT64", "fp32": "TYPE_FP32"}
ASKED = ((SEED, "TYPE_INT64", False), (INDEX, "TYPE_INT64", True), (GUIDANCE, "TYPE_FP32", True), (FULL, "TYPE_BOOL", True))
MOST_SIZES = 4  # of requests whose CUDA graphs a sampler keeps: more preferred sizes would not be replayed


@dataclasses.dataclass(frozen=True)
class Settings:
    """How Triton is to serve an artefact.

    Args:
        provider: `cpu`, `cuda`, or `either`, which is CUDA where Triton has put an instance on a GPU, and the CPU where it has none.
        max_batch: rows computed at a time.
        batching: whether rows of several requests may be.
        delay_ms: how long the first of them waits for others.
        queue: requests that may wait; further ones are refused at once.
        threads: threads of an instance on the CPU; None lets ONNX Runtime choose.

    Raises:
        TokenCacheError: if a field is not possible.
    """

    provider: str = CPU
    max_batch: int = 16
    batching: bool = True
    delay_ms: float = 5.0
    queue: int = 256
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise TokenCacheError(f"unknown provider {self.provider!r}: choose one of {', '.join(PROVIDERS)}.")
        for name in ("max_batch", "queue", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise TokenCacheError(f"{name} is {value}: give 1 or more.")
        if not 0 <= self.delay_ms <= 60_000:
            raise TokenCacheError(f"delay_ms is {self.delay_ms}: a request waits for others for 0 to 60,000 ms.")

    @property
    def preferred(self) -> tuple[int, ...]:
        """Sizes of batches that Triton prefers: the largest, its half and its quarter; few, as CUDA graphs are kept of few sizes."""
        sizes = {self.max_batch, self.max_batch // 2, self.max_batch // 4}
        return tuple(sorted(size for size in sizes if size > 1))


def served_name(artefact: Path) -> str:
    """Name of an artefact's model: that of its folder.

    Raises:
        TokenCacheError: if Triton's addresses cannot hold it.
    """
    name = artefact.absolute().name if artefact.name not in ("", "..") else artefact.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise TokenCacheError(
            f"{artefact} would be a model named {name!r}, which Triton's addresses cannot hold: letters, digits, _, - and . are "
            "possible, and a letter, digit or _ first. Rename the folder, or link to it under another name."
        )
    return name


def config_of(name: str, manifest: Mapping[str, Any], settings: Settings) -> str:
    """The text of `config.pbtxt`.

    Args:
        name: of the model.
        manifest: the artefact's.
        settings: how it is to be served.
    """
    parts = [
        f'name: {_quoted(name)}\nbackend: "python"\nmax_batch_size: {settings.max_batch}',
        *(_tensor("input", *given) for given in inputs_of(manifest)),
        *(_tensor("output", *made) for made in outputs_of(manifest)),
        _instances(settings),
    ]
    if settings.batching:
        parts.append(_batching(settings))
    return "\n".join([*parts, *(_parameter(*pair) for pair in _parameters(manifest, settings).items())]) + "\n"


def inputs_of(manifest: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...], bool]]:
    """Name, type, shape of a row and whether it may be left out, of all that a request brings: conditions first."""
    conditions = conditions_from_json(manifest["model"]["conditions"], "conditions")
    return [(c.name, TYPES[c.dtype], c.shape or (1,), False) for c in conditions] + [(n, t, (1,), o) for n, t, o in ASKED]


def outputs_of(manifest: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...], bool]]:
    """Name, type and shape of a row of all that a request gets; pixels where the model or a decoder makes some."""
    model = ModelSignature.from_json(manifest["model"], "model")
    latent = model.latent
    pixels = latent if model.output == PIXELS else tuple(manifest["decoder"]["pixels"]) if "decoder" in manifest else None
    made = [] if pixels is None else [(IMAGE, "TYPE_FP32", pixels, False)]
    return [*made, (LATENT, "TYPE_FP32", latent, False), (RECEIPT, "TYPE_STRING", (1,), False)]


def _tensor(kind: str, name: str, dtype: str, dims: tuple[int, ...], optional: bool) -> str:
    shape = ", ".join(map(str, dims))
    return f"{kind} [ {{ name: {_quoted(name)} data_type: {dtype} dims: [ {shape} ]{' optional: true' if optional else ''} }} ]"


def _instances(settings: Settings) -> str:
    """One a GPU that Triton sees, or one on the CPU. That it must be a GPU is not told to Triton: the model says so, in a paragraph."""
    return f"instance_group [ {{ count: 1{' kind: KIND_CPU' if settings.provider == CPU else ''} }} ]"


def _batching(settings: Settings) -> str:
    sizes = f"  preferred_batch_size: [ {', '.join(map(str, settings.preferred))} ]\n" if settings.preferred else ""
    return (
        f"dynamic_batching {{\n{sizes}  max_queue_delay_microseconds: {round(1e3 * settings.delay_ms)}\n"
        f"  default_queue_policy {{ max_queue_size: {settings.queue} }}\n}}"
    )


def _parameters(manifest: Mapping[str, Any], settings: Settings) -> dict[str, str]:
    """What the model is told; the plan's digest says which artefact this was written for."""
    said = {"provider": settings.provider, "plan_digest": manifest["plan_digest"], "preferred": ",".join(map(str, settings.preferred))}
    return said | ({} if settings.threads is None else {"threads": str(settings.threads)})


def _parameter(key: str, value: str) -> str:
    return f"parameters [ {{ key: {_quoted(key)} value: {{ string_value: {_quoted(value)} }} }} ]"


def _quoted(text: str) -> str:
    return json.dumps(text)  # of a name or digest, as pbtxt spells it
