"""A classifier of real images as a judge: how many of a plan's images it takes for the class that was asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
from torch import Tensor

from export.report.quality import visible
from tc_lightning.errors import TokenCacheError, first_line
from tc_lightning.plan.signature import ModelSignature

# Real images of teachers that ship, by the sha256 of their weights; for any other teacher the user names some with --real.
SHIPPED = {"8db424b0b628ee0bb22d8504d4f47ff15e5dd8e5d69754b5741fd645599e5f9a": "data.digits:load_digits"}


class Judge:
    """A support vector classifier (RBF kernel) over pixels, fitted on real images.

    Args:
        images: real images [n, C, H, W] in [-1, 1].
        labels: their classes [n].
        output: what the model makes, `pixels` or `latents`.

    Raises:
        TokenCacheError: if there are too few images or classes to fit one.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, output: str) -> None:
        from sklearn.svm import SVC

        self._output = output
        flat, half = images.reshape(len(images), -1), len(images) // 2
        try:
            self.held_out = float(SVC(C=10.0).fit(flat[:half], labels[:half]).score(flat[half:], labels[half:]))
            self._classifier = SVC(C=10.0).fit(flat, labels)
        except ValueError as error:
            raise TokenCacheError(f"no classifier can be fitted to the real images: {first_line(error)}.") from error

    def accuracy(self, latents_BCHW: np.ndarray, labels_B: np.ndarray) -> float:
        """Share of the images that are recognised as their class."""
        predicted = self._classifier.predict(visible(latents_BCHW, self._output).reshape(len(latents_BCHW), -1))
        return float((predicted == labels_B).mean())


def find_judge(signature: ModelSignature, real: str | None) -> Judge | None:
    """The judge for a teacher: from the images that the user names, else from those known for a teacher that ships, else none.

    Args:
        signature: the teacher.
        real: `module:function`; the function takes the image size and returns images [n, C, size, size] in [-1, 1] and classes [n].

    Raises:
        TokenCacheError: if the function cannot be imported or called, or its images are not of the teacher's shape.
    """
    name = real or SHIPPED.get(signature.teacher)
    if name is None:
        return None
    try:
        images, labels = (_array(values) for values in _load(name)(signature.input_size))
    except Exception as error:  # the user's own code
        raise TokenCacheError(f"--real {name}: no images and classes came from it: {first_line(error)}.") from error
    shape = (signature.in_channels, signature.input_size, signature.input_size)
    if images.shape[1:] != shape or labels.shape != images.shape[:1]:
        raise TokenCacheError(f"--real {name}: images {images.shape} and classes {labels.shape}; [n, {shape}] and [n] were expected.")
    return Judge(images, labels, signature.output)


def _load(name: str) -> Callable[[int], tuple[object, object]]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _array(values: object) -> np.ndarray:
    return values.numpy() if isinstance(values, Tensor) else np.asarray(values)
