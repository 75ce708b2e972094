"""The classes of diffusers that can be read: the one place that lists them. A family adds its reader here, and its pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.diffusers_config import CLASS, CONFIG, Reader
from tc_lightning.models.checkpoints.dit_folder import read_dit
from tc_lightning.models.checkpoints.pixart_folder import read_pixart
from tc_lightning.models.checkpoints.sd3_folder import read_sd3

# Transformers by the `_class_name` of their config.json.
READERS: dict[str, Reader] = {
    "DiTTransformer2DModel": read_dit,
    "PixArtTransformer2DModel": read_pixart,
    "SD3Transformer2DModel": read_sd3,
}
# Pipelines by that of their model_index.json, and the class of their transformer.
PIPELINES = {
    "DiTPipeline": "DiTTransformer2DModel",
    "PixArtAlphaPipeline": "PixArtTransformer2DModel",
    "PixArtSigmaPipeline": "PixArtTransformer2DModel",
    "StableDiffusion3Pipeline": "SD3Transformer2DModel",
}
_OLDER = "Transformer2DModel"  # one class for several models, until diffusers told them apart by `norm_type`
_NORM_TYPES = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def class_of(config: dict[str, Any], folder: Path) -> str:
    """The class that a transformer's configuration is of.

    Raises:
        TeacherError: if it does not tell, or there is no reader for it.
    """
    said = config.get(CLASS)
    name = _NORM_TYPES.get(str(config.get("norm_type"))) if said == _OLDER else said
    if not isinstance(name, str) or name not in READERS:
        told = f"is of a {said}" if said else f"does not say what it is of ({CLASS})"
        more = f" with norm_type {config.get('norm_type')!r}" if said == _OLDER else ""
        raise TeacherError(
            f"{folder / CONFIG} {told}{more}: folders of {', '.join(READERS)} can be read. A network of another family can be "
            "written to a file of this package's own with `tc_lightning.models.checkpoints.save_teacher`."
        )
    return name
