"""What a request's receipt says, in plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from export.runtime.decoder import Decoder
from export.runtime.layout import CONDITION
from export.runtime.manifest import WEIGHTS
from export.runtime.request import Row, Tally, outside_the_fit

T = TypeVar("T")


def one_or_each(values: Sequence[T]) -> T | list[T]:
    """One value where they are all the same, else that of each image."""
    return values[0] if len(set(values)) == 1 else list(values)


def said_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Seeds and indices of a request."""
    indices = [row.index for row in rows]
    series = indices == list(range(indices[0], indices[0] + len(rows)))
    return {"seed": one_or_each([row.seed for row in rows])} | ({"first_index": indices[0]} if series else {"indices": indices})


def receipt_of(
    m: Mapping[str, Any],
    tally: Tally,
    asked: Mapping[str, Any],
    place: Mapping[str, Any],
    scales: Sequence[float],
    full: bool,
    no_graphs: str | None,
    seconds: float,
) -> dict[str, Any]:
    """The receipt of a request.

    Args:
        m: the artefact's manifest.
        tally: what ran.
        asked: what was asked for.
        place: where it ran: provider, device, nodes on each provider.
        scales: guidance scale of each image.
        full: whether the reference ran instead of the plan.
        no_graphs: why no CUDA graphs were used; None if they were.
        seconds: how long the latents took.
    """
    planned = float(m["guidance"]["scale"])
    everything = asked["parts"] * m["full_steps"] * m["model"]["depth"] * m["model"]["tokens"]
    return {
        "plan_digest": m["plan_digest"],
        "plan": m.get("plan_in_words"),
        "outside_the_fit": outside_the_fit(None if full else m.get("fit"), scales, asked.get("labels", [])),
        "weights_sha256": m.get("files", {}).get(WEIGHTS, {}).get("sha256"),
        "teacher": m["teacher"],
        "precision": m["precision"],
        **asked,
        "guidance": {
            "scale": one_or_each(scales),
            "planned": planned,
            "as_planned": set(scales) == {planned},
            "steps": dict(tally.guidance),
        },
        **place,
        "full_compute": full,
        "steps_per_program": {name: count for name, count in tally.ran.items() if name != CONDITION},
        "steps_reading_cache": tally.cached_steps,
        "cache_engaged": tally.cached_steps > 0,
        "blocks_x_tokens_computed": tally.computed,
        "blocks_x_tokens_share": tally.computed / everything,
        "cache_bytes": tally.cache_bytes,
        "modulation_bytes": tally.modulation_bytes,
        "constant_bytes": tally.constant_bytes,
        "cuda_graphs": {name: tally.graphs[name] for name in ("captured", "replayed", "plain")} | {"off": no_graphs},
        "ms_per_program": {name: 1e3 * value for name, value in tally.seconds.items()} or None,  # see `timing`
        "ms": 1e3 * seconds,
    }


def receipt_of_one(receipt: Mapping[str, Any], m: Mapping[str, Any], place: int) -> dict[str, Any]:
    """The receipt of one image of a request that others share: what ran is the request's, as are its times; of what was asked for, it
    holds this image's part alone.

    Args:
        receipt: the request's.
        m: the artefact's manifest.
        place: the image's place among the request's `images`.
    """
    scale, fit = _one(receipt["guidance"]["scale"], place), m.get("fit")
    own: dict[str, Any] = {"seed": _one(receipt["seed"], place), "place": place}
    own["index"] = receipt["first_index"] + place if "first_index" in receipt else receipt["indices"][place]
    if "labels" in receipt:
        own["labels"] = [receipt["labels"][place]]
    else:
        classes = {condition["name"] for condition in m["model"]["conditions"] if condition["classes"]}
        own["conditions"] = {name: [said[place]] if name in classes else [1, *said[1:]] for name, said in receipt["conditions"].items()}
    own["guidance"] = receipt["guidance"] | {"scale": scale, "as_planned": scale == receipt["guidance"]["planned"]}
    own["outside_the_fit"] = outside_the_fit(None if receipt["full_compute"] else fit, [scale], own.get("labels", []))
    return {name: value for name, value in receipt.items() if name not in ("first_index", "indices")} | own


def _one(value: T | list[T], place: int) -> T:
    return value[place] if isinstance(value, list) else value


def decoding_of(decoder: Decoder | None, pixels: np.ndarray | None, seconds: float) -> dict[str, Any]:
    """What a receipt says of the decoder: nothing where there is none or it did not run."""
    if decoder is None or pixels is None:
        return {}
    ran = {"images_at_a_time": decoder.batch, "memory_bytes": decoder.memory_bytes, "ms": 1e3 * seconds}
    return {"decoder": ran | {"pixels": list(pixels.shape)}}
