"""What a manifest says of a decoder, and what of it has to be so. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.runtime.layout import DECODER
from export.runtime.manifest import AGAIN, ArtefactError
from export.runtime.onnx_header import Header
from tc_lightning.plan.signature import LATENTS

DATA = "decoder.data"  # file of its weights
IN, OUT = "latents", "pixels"
_KEYS = {"scaling_factor", "shift_factor", "pixels", "memory_bytes_per_image", "parity"}
_MOST = 2**53


def memory_bytes(said: Mapping[str, Any], weights: int, images: int = 1) -> int:
    """Bytes that decoding so many images at a time takes: weights as they are mapped and as a session repacks them, and activations.

    Args:
        said: the manifest's word of the decoder.
        weights: bytes of its weights.
        images: decoded at a time.
    """
    return 2 * weights + images * said["memory_bytes_per_image"]


def require_decoder(path: Path, manifest: Mapping[str, Any], graphs: Mapping[str, Header]) -> None:
    """Check what a manifest says of a decoder, if it does, against the graph and the files beside it.

    Raises:
        ArtefactError: naming the first thing that is not as it must be.
    """
    said, files, model = manifest.get(DECODER), manifest["files"], manifest["model"]
    if said is None:
        if DECODER in graphs or DATA in files:
            raise _damaged(path, "it lists a decoder and does not describe it")
        return
    if not isinstance(said, dict) or set(said) != _KEYS or not isinstance(said["parity"], dict):
        raise _damaged(path, f"decoder must be an object with {', '.join(sorted(_KEYS))}")
    if model["output"] != LATENTS:
        raise _damaged(path, f"it has a decoder, and the model makes {model['output']}")
    if DECODER not in graphs or DATA not in files:
        raise _damaged(path, f"it describes a decoder, and does not list {DECODER}.onnx and {DATA}")
    for name in ("scaling_factor", "shift_factor"):
        if type(said[name]) is not float or not math.isfinite(said[name]) or (name == "scaling_factor" and not said[name] > 0.0):
            raise _damaged(path, f"decoder.{name} is {said[name]!r}; a number was expected")
    memory, header = said["memory_bytes_per_image"], graphs[DECODER]
    if type(memory) is not int or not 0 < memory < _MOST:
        raise _damaged(path, f"decoder.memory_bytes_per_image is {memory!r}; a positive integer was expected")
    latent = (0, model["in_channels"], model["input_size"], model["input_size"])
    if header.inputs != [IN] or header.outputs != [OUT] or header.sizes[IN] != latent:
        raise _damaged(path, f"{DECODER}.onnx does not take the model's latents")
    if [0, *_list(said["pixels"])] != list(header.sizes[OUT]):
        raise _damaged(path, f"{DECODER}.onnx makes other pixels than decoder.pixels says")
    for name, weight in header.weights.items():
        if weight.location != DATA or weight.offset < 0 or weight.offset + weight.nbytes > files[DATA]["bytes"]:
            raise _damaged(path, f"weight {name} of {DECODER}.onnx lies outside of {DATA}")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _damaged(path: Path, reason: str) -> ArtefactError:
    return ArtefactError(f"{path} is damaged: {reason}. {AGAIN}")
