"""One tokenizer and text encoder of a pipeline's folder, read with transformers.

Shape suffixes: B prompts, E tokens, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tc_lightning.errors import TeacherError, TokenCacheError, first_line
from tc_lightning.models.checkpoints.diffusers_config import CONFIG
from tc_lightning.models.checkpoints.pipeline import INDEX

T5, CLIP = "T5EncoderModel", "CLIPTextModelWithProjection"
TOKENIZERS = {T5: ("T5Tokenizer", "T5TokenizerFast"), CLIP: ("CLIPTokenizer", "CLIPTokenizerFast")}
_ENDLESS = 1 << 20  # transformers says 1e30 where a tokenizer says nothing


class Tokens(NamedTuple):
    """Numbers of the tokens of some prompts [B, E], their mask (1 is a token of the text), and which prompts were cut to fit."""

    ids: Tensor
    mask: Tensor
    cut: list[bool]


@dataclasses.dataclass(frozen=True)
class Work:
    """How prompts are encoded.

    Args:
        prompts: all of them.
        batch: how many at a time.
        dtype: precision of the encoders.
        device: where they run.
    """

    prompts: Sequence[str]
    batch: int = 8
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"


class Encoder:
    """A tokenizer and the encoder that understands it.

    Args:
        pipeline: folder of the pipeline.
        index: what its model_index.json holds.
        kind: class of the encoder that is expected.
        suffix: of the names of both in the index: none, `_2` or `_3`.
        work: precision and device.

    Raises:
        TokenCacheError: if transformers is not installed.
        TeacherError: if the pipeline has no such encoder, one of another class, or files of it are missing or damaged.
    """

    def __init__(self, pipeline: Path, index: dict[str, Any], kind: str, suffix: str, work: Work) -> None:
        self.name, self.work = f"text_encoder{suffix}", work
        tokenizer = _named(pipeline, index, f"tokenizer{suffix}", TOKENIZERS[kind])
        encoder = _named(pipeline, index, self.name, (kind,))
        if not (pipeline / self.name / CONFIG).is_file():
            raise TeacherError(
                f"{pipeline / INDEX} names a {self.name} ({encoder}), and {pipeline / self.name} holds no {CONFIG}: fetch the folder "
                "again, whole."
            )
        self.folder = pipeline / self.name
        self._tokenizer = _read(pipeline / f"tokenizer{suffix}", tokenizer)
        self._encoder, told = _read(self.folder, encoder, dtype=work.dtype, output_loading_info=True)
        if lost := sorted(told["missing_keys"]):
            raise TeacherError(f"{self.folder} has no weights {lost[0]} ({len(lost)} are missing): fetch the folder again, whole.")
        self._encoder.to(work.device).eval()

    @property
    def longest(self) -> int:
        """Tokens of a prompt at most, as the tokenizer says.

        Raises:
            TeacherError: if it does not.
        """
        if (length := int(self._tokenizer.model_max_length)) > _ENDLESS:
            raise TeacherError(f"the tokenizer of {self.folder} does not say its model_max_length: fetch the pipeline again, whole.")
        return length

    def batches(self, length: int) -> Iterator[Tokens]:
        """Tokens of all prompts, padded or cut to a length, batch by batch, with a bar that counts the prompts that are done."""
        prompts = list(self.work.prompts)
        with tqdm(total=len(prompts), desc=self.name, unit="prompt") as bar:
            for start in range(0, len(prompts), self.work.batch):
                part = prompts[start : start + self.work.batch]
                yield self._tokens(part, length)
                bar.update(len(part))

    @torch.inference_mode()
    def __call__(self, ids_BE: Tensor, mask_BE: Tensor | None = None, **options: Any) -> Any:
        """What the encoder says of tokens; see its class."""
        mask = {} if mask_BE is None else {"attention_mask": mask_BE.to(self.work.device)}
        return self._encoder(ids_BE.to(self.work.device), **mask, **options)

    def _tokens(self, prompts: list[str], length: int) -> Tokens:
        whole = self._tokenizer(prompts, verbose=False)["input_ids"]
        fit = self._tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return Tokens(fit["input_ids"], fit["attention_mask"], [len(ids) > length for ids in whole])


def is_absent(index: dict[str, Any], part: str) -> bool:
    """Whether a pipeline says that it is without a part."""
    return index.get(part) in (None, [None, None])


def _named(pipeline: Path, index: dict[str, Any], part: str, classes: Sequence[str]) -> str:
    """The class of a part of a pipeline, one of those expected."""
    said = index.get(part)
    if is_absent(index, part):
        raise TeacherError(f"{pipeline / INDEX} names no {part}: without it no prompt can be encoded. Fetch the pipeline whole.")
    if not isinstance(said, list) or len(said) != 2 or said[0] != "transformers" or said[1] not in classes:
        raise TeacherError(f"{pipeline / INDEX}: its {part} is {said!r}; of transformers, {' or '.join(classes)} was expected.")
    return str(said[1])


def _read(folder: Path, kind: str, **options: Any) -> Any:
    """A tokenizer or an encoder from its folder; nothing is fetched."""
    try:
        import transformers
    except ImportError as error:
        raise TokenCacheError(
            f"prompts are encoded with transformers, which cannot be imported ({first_line(error)}): `pip install -e '.[text]'`."
        ) from error
    if not folder.is_dir():
        raise TeacherError(f"no folder {folder}, which the pipeline names: fetch the pipeline again, whole.")
    try:
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # of several libraries, with no class in common
        raise TeacherError(f"{folder} cannot be read as a {kind} ({first_line(error)}): fetch the folder again, whole.") from error
