"""The digits with captions: short texts that say which digit an image shows, in numbers for a network that reads text.

A word is a fixed row of +1 and -1, the first bits of its sha256; there is no encoder to learn, to ship or to run.

Shape suffixes: E tokens of a text, F features of a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.digits import DigitsDataModule, load_digits
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.given import Arrays

TOKENS, WIDTH = 8, 32  # E and F
END = "."  # ends every text; alone, it is the empty text
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FORMS = ("{a} {word}", "the digit {word}", "number {digit}", "a picture of the number {word}")


def captions_of(digit: int) -> list[str]:
    """All texts that ask for a digit: its name, its figure, and every sum that comes to it."""
    said = [form.format(a="an" if DIGITS[digit] == "eight" else "a", word=DIGITS[digit], digit=digit) for form in _FORMS]
    return said + [f"{DIGITS[first]} plus {DIGITS[digit - first]}" for first in range(digit + 1)]


_STRIDE = 86  # such that neighbours in a table of all captions, and also every fourth of them, are of all digits
_BY_DIGIT = [(caption, digit) for digit in range(10) for caption in captions_of(digit)]
CAPTIONS = dict(_BY_DIGIT[row * _STRIDE % len(_BY_DIGIT)] for row in range(len(_BY_DIGIT)))
_WORDS = {word for caption in CAPTIONS for word in caption.split()} | {END}


def encode(captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Texts as a network takes them: `text` [rows, E, F] float32, zero in the padding, and `text_mask` [rows, E] int64, 0 there.

    Raises:
        TokenCacheError: if a text has a word that none of the captions has, or is too long.
    """
    text, mask = np.zeros((len(captions), TOKENS, WIDTH), np.float32), np.zeros((len(captions), TOKENS), np.int64)
    for row, caption in enumerate(captions):
        words = [*caption.split(), END]
        if unknown := [word for word in words if word not in _WORDS]:
            raise TokenCacheError(f"the caption {caption!r} has unknown words ({', '.join(unknown)}): use {', '.join(sorted(_WORDS))}.")
        if len(words) > TOKENS:
            raise TokenCacheError(f"the caption {caption!r} has {len(words) - 1} words: {TOKENS - 1} are the most.")
        text[row, : len(words)], mask[row, : len(words)] = [_embedding(word) for word in words], 1
    return {"text": text, "text_mask": mask}


def _embedding(word: str) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(hashlib.sha256(word.encode()).digest(), np.uint8))[:WIDTH]
    return bits.astype(np.float32) * 2 - 1


class Captioned(Dataset):
    """Images, each with a text that asks for its digit: at random, or, to compare epochs, always the same one.

    Args:
        images: [N, 1, S, S].
        labels: [N].
        drawn: whether the text is drawn anew every time.
    """

    def __init__(self, images: Tensor, labels: Tensor, drawn: bool) -> None:
        self.images, self.labels, self.drawn = images, labels.tolist(), drawn
        self._rows = [[row for row, digit in enumerate(CAPTIONS.values()) if digit == one] for one in range(10)]
        self._encoded = {name: torch.from_numpy(values) for name, values in encode(list(CAPTIONS)).items()}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """An image [1, S, S] and its conditions."""
        rows = self._rows[self.labels[index]]
        row = rows[int(torch.randint(len(rows), ())) if self.drawn else index % len(rows)]
        return self.images[index], {name: values[row] for name, values in self._encoded.items()}


class CaptionsDataModule(DigitsDataModule):
    """Digits and captions for training a teacher that reads text; the last `num_val` images are held out.

    Args:
        size: height and width to upsample to.
        batch_size: images per process and step.
        num_val: images held out for validation.
    """

    def __init__(self, size: int = 16, batch_size: int = 64, num_val: int = 128) -> None:
        super().__init__(size, batch_size, num_val)
        self.examples: Arrays = encode(list(CAPTIONS))
        self.nulls: Arrays = encode([""])

    def setup(self, stage: str) -> None:
        """Load and split."""
        images, labels = load_digits(self.size)
        self._captioned = Captioned(images[: -self.num_val], labels[: -self.num_val], drawn=True)
        self._held_out = Captioned(images[-self.num_val :], labels[-self.num_val :], drawn=False)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of (images [B, 1, S, S], conditions by name, [B, ...] each)."""
        return DataLoader(self._captioned, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Held-out batches."""
        return DataLoader(self._held_out, self.batch_size)
