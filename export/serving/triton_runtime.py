"""All that serving by Triton needs of the runtime, imported in one place: it may come to be a package of another name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort

from export.runtime.contract import read_artefact
from export.runtime.sampler import CachedSampler

__all__ = ["CachedSampler", "artefact_manifest"]


def artefact_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artefact that is whole, and that the onnxruntime which is installed can run.

    Raises:
        ArtefactError: if it is not.
    """
    return read_artefact(folder, ort.__version__)
