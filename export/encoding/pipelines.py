"""Conditions of prompts, as each pipeline of diffusers makes them (its `encode_prompt`): the one place that lists them.

Shape suffixes: B prompts, E tokens, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from export.encoding.encoders import CLIP, T5, Encoder, Work, is_absent
from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.diffusers_config import CLASS, CONFIG, read_config
from tc_lightning.models.checkpoints.pipeline import INDEX, TRANSFORMER, VAE
from tc_lightning.models.checkpoints.pixart_folder import pixart_shape

PROMPTED = ("text", "text_mask", "pooled")  # conditions that a prompt acts on: those that have a null value
T5_TOKENS = 256  # of a prompt, in Stable Diffusion 3


class Encoded(NamedTuple):
    """Conditions of prompts by name, [B, ...] each, and the tokens that fit where prompts were cut, by their places."""

    rows: dict[str, np.ndarray]
    cut: dict[int, int]


@dataclasses.dataclass(frozen=True)
class Source:
    """A pipeline's folder, and how it is used.

    Args:
        folder: the pipeline.
        index: what its model_index.json holds.
        tokens: tokens of a prompt that the T5 encoder gives; None: as many as the pipeline takes by itself.
        without_t5: leave the T5 encoder out, where the pipeline can do without it.
    """

    folder: Path
    index: dict[str, Any]
    tokens: int | None = None
    without_t5: bool = False


def encode(source: Source, work: Work) -> Encoded:
    """Conditions of prompts.

    Raises:
        TeacherError: if the pipeline is of a class that is not supported, or an encoder is missing, damaged, or not the transformer's.
    """
    name = source.index.get(CLASS)
    if not isinstance(name, str) or name not in PIPELINES:
        raise TeacherError(f"{source.folder / INDEX} is of a {name}: prompts can be encoded for {', '.join(PIPELINES)}.")
    found = PIPELINES[name](source, work)
    for condition, rows in found.rows.items():
        if not np.isfinite(rows).all():
            raise TeacherError(
                f"{source.folder}: its encoders make NaN or infinite numbers of {condition} (prompt {_first_bad(rows) + 1}). In fp16 "
                "this is known of T5: use --precision bf16 or fp32."
            )
    return found


def encode_pixart(source: Source, work: Work) -> Encoded:
    """PixArt-alpha and Sigma: the last states of T5 [E, F] and the mask [E]; at 1,024 pixels also the sizes that were trained for.

    Prompts are in lower case, and without spaces at their ends, as `encode_prompt` does it without `clean_caption`.
    """
    if source.without_t5:
        raise TeacherError(f"{source.folder} has no other encoder than T5: leave --no-t5 out.")
    shape = pixart_shape(read_config(source.folder / TRANSFORMER / CONFIG), source.folder / TRANSFORMER)
    length = source.tokens or shape.text_tokens
    work = dataclasses.replace(work, prompts=[prompt.lower().strip() for prompt in work.prompts])
    encoder, texts, masks, cut = Encoder(source.folder, source.index, T5, "", work), [], [], []
    for tokens in encoder.batches(length):
        texts.append(_host(encoder(tokens.ids, tokens.mask)[0]))
        masks.append(tokens.mask.numpy().astype(np.int64))
        cut += tokens.cut
    rows = {"text": np.concatenate(texts), "text_mask": np.concatenate(masks)}
    _require_width(source, encoder.name, rows["text"].shape[-1], shape.text_width)
    if shape.sized:
        side = float(shape.input_size * _vae_factor(source.folder / VAE / CONFIG))
        sizes = {"resolution": np.array([side, side], np.float32), "aspect_ratio": np.array([1.0], np.float32)}
        rows |= {name: np.repeat(value[None], len(work.prompts), axis=0) for name, value in sizes.items()}
    return Encoded(rows, {place: length for place, short in enumerate(cut) if short})


def encode_sd3(source: Source, work: Work) -> Encoded:
    """Stable Diffusion 3: states of both CLIP side by side, and after them those of T5, [S, F]; both pooled side by side.

    The encoders are in memory one after the other. Without T5, its states are zeros.
    """
    config = read_config(source.folder / TRANSFORMER / CONFIG)
    width, pooled_width = config.get("joint_attention_dim", 4096), config.get("pooled_projection_dim", 2048)
    cut: dict[int, int] = {}
    one_BEF, one_BF, length = _clip(source, work, "", None, cut)
    two_BEF, two_BF, _ = _clip(source, work, "_2", length, cut)
    clip_BEF, pooled_BF = np.concatenate([one_BEF, two_BEF], axis=-1), np.concatenate([one_BF, two_BF], axis=-1)
    _require_width(source, "the pooled text of both CLIP", pooled_BF.shape[-1], pooled_width)
    if (found := clip_BEF.shape[-1]) > width:
        _require_width(source, "the text of both CLIP", found, width)
    clip_BEF = np.pad(clip_BEF, ((0, 0), (0, 0), (0, width - found)))
    return Encoded({"text": np.concatenate([clip_BEF, _t5(source, work, width, cut)], axis=1), "pooled": pooled_BF}, cut)


PIPELINES: dict[str, Callable[[Source, Work], Encoded]] = {
    "PixArtAlphaPipeline": encode_pixart,
    "PixArtSigmaPipeline": encode_pixart,
    "StableDiffusion3Pipeline": encode_sd3,
}


def _clip(source: Source, work: Work, suffix: str, length: int | None, cut: dict[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
    """The last states but one of a CLIP, its pooled text, and how many tokens it took: those of the first, for both."""
    encoder, states, pooled, first = Encoder(source.folder, source.index, CLIP, suffix, work), [], [], 0
    length = length or encoder.longest
    for tokens in encoder.batches(length):
        said = encoder(tokens.ids, output_hidden_states=True)
        states.append(_host(said.hidden_states[-2]))
        pooled.append(_host(said.text_embeds))
        cut.update({first + place: length for place, short in enumerate(tokens.cut) if short})
        first += len(tokens.cut)
    return np.concatenate(states), np.concatenate(pooled), length


def _t5(source: Source, work: Work, width: int, cut: dict[int, int]) -> np.ndarray:
    length = source.tokens or T5_TOKENS
    if source.without_t5 or is_absent(source.index, "text_encoder_3"):
        return np.zeros((len(work.prompts), length, width), np.float32)
    encoder, states, first = Encoder(source.folder, source.index, T5, "_3", work), [], 0
    for tokens in encoder.batches(length):
        states.append(_host(encoder(tokens.ids)[0]))
        for place, short in enumerate(tokens.cut):
            if short:
                cut[first + place] = length
            else:
                cut.pop(first + place, None)  # T5 reads it whole, as it is meant to
        first += len(tokens.cut)
    found = np.concatenate(states)
    _require_width(source, encoder.name, found.shape[-1], width)
    return found


def _vae_factor(path: Path) -> int:
    """Pixels of an image's side for one of its latents."""
    blocks = read_config(path).get("block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        raise TeacherError(f"{path}: block_out_channels is {blocks!r}; a list was expected, which tells the size of an image.")
    return int(2 ** (len(blocks) - 1))


def _require_width(source: Source, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise TeacherError(
            f"{source.folder}: {what} has {found} features, and its transformer takes {wanted}: they do not belong together. Fetch the "
            "pipeline again, whole."
        )


def _host(states: Tensor) -> np.ndarray:
    return states.float().cpu().numpy()


def _first_bad(rows: np.ndarray) -> int:
    return int(np.argwhere(~np.isfinite(rows))[0][0])
