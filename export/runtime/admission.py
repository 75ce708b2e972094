"""What a request will take of memory, known before it runs. Standard library only."""

from __future__ import annotations

import math
from typing import Any

from export.runtime.layout import BYTES, lay_out
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import SAME, conditions_from_json


def most_rows(manifest: dict[str, Any], images: int, negative: bool = False) -> int:
    """Distinct rows of conditions that so many images can have, unconditional ones counted: one, or, where requests bring their own
    (`negative`) or both halves have the same value of a condition, as many as images."""
    conditions = conditions_from_json(manifest["model"]["conditions"], "conditions")
    few = math.prod(condition.classes or images for condition in conditions)
    many = negative or any(condition.null == SAME for condition in conditions)
    return min(images, few) + (manifest["guidance"]["scale"] != 1.0) * (images if many else 1)


def predicted_bytes(manifest: dict[str, Any], images: int, full: bool = False, negative: bool = False, decoding: int = 0) -> int:
    """Bytes of the buffers of so many images at a time: caches, modulations, constants, conditions and latents, at most, and of
    `decoding` pixels, which comes while they are still held; `negative`: if a request brings null values. What ONNX Runtime needs
    within a step's program comes on top, and is shared by all requests."""
    layout = lay_out(manifest, images, most_rows(manifest, images, negative), full)
    return decoding + sum(spec.values * BYTES[spec.dtype] for spec in layout.buffers.values())


def batch_within(
    manifest: dict[str, Any], most: int, max_bytes: int | None, full: bool = False, negative: bool = False, decoding: int = 0
) -> int:
    """Images at a time, `most` at most, that take no more than `max_bytes` (see `predicted_bytes`); None: as many as there may be.

    Raises:
        TokenCacheError: if a single image takes more.
    """
    if max_bytes is None or predicted_bytes(manifest, most, full, negative, decoding) <= max_bytes:
        return most
    if (one := predicted_bytes(manifest, 1, full, negative, decoding)) > max_bytes:
        of_decoder = f", {decoding:,} of them to decode its pixels (pixels=False makes none)" if decoding else ""
        raise TokenCacheError(
            f"an image takes {one:,} bytes of buffers{of_decoder}, and max_bytes is {max_bytes:,}: raise it, or export a plan that "
            "caches less (`python export/to_onnx.py --explain` shows what is held)."
        )
    low, high = 1, most  # of low we know that it fits, of high that it does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if predicted_bytes(manifest, middle, full, negative, decoding) <= max_bytes else (low, middle)
    return low
