"""What distillation hands to a policy: learned importances and routers, and measured sensitivities. Needs numpy, no torch.

Shape suffixes: T sampling steps, L blocks, N tokens, 2 branches (0 attn, 1 mlp).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tc_lightning.errors import RunError
from tc_lightning.measure.cache_cases import REPEATED, CacheCases
from tc_lightning.plan.atomic import write_atomically
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.tensor_files import TensorFileError, read_tensors

_REQUIRED = ("importance_TLN", "sensitivity_TL2")
_OPTIONAL = ("router_TL2",)
FORMAT_VERSION = "2"
UNSTATED = "1"  # the version before, whose scores are of the step before, repeated


def sampler_digest(sampler: SamplerTable) -> str:
    """sha256 of a sampler's coefficients."""
    return hashlib.sha256(json.dumps(sampler.to_json(), sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Importances and sensitivities of every step and block; row i belongs to sampling step i, the noisiest being 0.

    Args:
        importance_TLN: the predictor's w in [0, 1] of the image's tokens, 1 meaning recompute; row 0 is all ones. Ones everywhere if no
            predictor of tokens was trained.
        sensitivity_TL2: mean squared change of the guided eps when one branch of one block comes from the cache and everything else
            is computed; row 0 is all zeros, since there is nothing to reuse.
        teacher: sha256 of the teacher's weights.
        sampler: `sampler_digest` of the sampler.
        router_TL2: a router's w in [0, 1] of each branch, 1 meaning compute; row 0 is all ones. None if no router was trained.
        selector: sha256 of the content predictor whose mean scores the importances are; empty if they do not depend on the image.
        cases: the caches for which importances and sensitivities were learned. (A router's is the step before, or its own.)

    Raises:
        RunError: if shapes disagree, a value is not finite or out of range.
    """

    importance_TLN: np.ndarray
    sensitivity_TL2: np.ndarray
    teacher: str
    sampler: str
    router_TL2: np.ndarray | None = None
    selector: str = ""
    cases: CacheCases = REPEATED

    def __post_init__(self) -> None:
        for name, given in self.arrays.items():
            array = np.array(given, dtype=np.float32, order="C")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        _validate(self)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are there, by name."""
        return {name: array for name in _REQUIRED + _OPTIONAL if (array := getattr(self, name)) is not None}

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of all arrays and of what they belong to."""
        cases = "" if self.cases == REPEATED else self.cases.in_words
        hasher = hashlib.sha256(" ".join(filter(None, (self.teacher, self.sampler, self.selector, cases))).encode())
        for name, array in self.arrays.items():
            hasher.update(f"\n{name} {array.shape}\n".encode() + array.tobytes())
        return hasher.hexdigest()

    def provenance(self, orders: Iterable[int]) -> dict[str, Any]:
        """What a plan that goes by these scores says of them: which they are, and, in words, if they are of another cache than its own.

        Args:
            orders: those at which it forecasts.
        """
        others = sorted({*orders} - {*self.cases.orders})
        if not others:
            return {"scores": self.digest}
        said = f"they were learned for a cache that {self.cases.in_words}, and this plan forecasts at order {others[0]}"
        return {"scores": self.digest, "scores_of_another_cache": said}

    def save(self, path: Path) -> None:
        """Write `.safetensors` atomically: a reader sees the old file or the new one."""
        from safetensors.numpy import save

        metadata = {"teacher": self.teacher, "sampler": self.sampler, "selector": self.selector, "format_version": FORMAT_VERSION}
        numbers = {name: " ".join(map(str, getattr(self.cases, name))) for name in ("orders", "gaps")}
        write_atomically(path, save(self.arrays, metadata | numbers | {"kv_order": str(self.cases.kv_order)}))

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote, now or before scores said for which cache they are.

        Raises:
            RunError: if the file is missing, damaged, of a later version, or does not hold valid scores.
        """
        try:
            arrays, metadata = read_tensors(path, "np")
        except TensorFileError as error:
            raise RunError(f"cannot read the scores {path}: {error}. Make them again with `lightning fit`.") from error
        if not set(_REQUIRED) <= set(arrays) <= {*_REQUIRED, *_OPTIONAL} or not {"teacher", "sampler"} <= set(metadata):
            raise RunError(f"{path} does not hold scores: found {', '.join(sorted(arrays)) or 'nothing'}.")
        try:
            selector, cases = metadata.get("selector", ""), _cases(metadata)
            return cls(**arrays, teacher=metadata["teacher"], sampler=metadata["sampler"], selector=selector, cases=cases)
        except RunError as error:
            raise RunError(f"{path}: {error}") from error


def _validate(scores: Scores) -> None:
    importance, sensitivity = scores.importance_TLN, scores.sensitivity_TL2
    if importance.ndim != 3 or 0 in importance.shape:
        raise RunError(f"importance has the shape {importance.shape}; [steps, blocks, tokens] was expected.")
    shape = (*importance.shape[:2], *sensitivity.shape[2:][:1])
    for name, array in scores.arrays.items():
        if name != "importance_TLN" and array.shape != shape:
            raise RunError(f"{_said(name)} has the shape {array.shape}; {shape} was expected.")
        if not np.isfinite(array).all():
            step, block = np.argwhere(~np.isfinite(array))[0][:2]
            raise RunError(f"{_said(name)} is not finite at step {step}, block {block}: training diverged, or the teacher is damaged.")
        if name != "sensitivity_TL2" and (array.min() < 0 or array.max() > 1):
            raise RunError(f"{_said(name)} must lie in [0, 1]; it reaches from {array.min():g} to {array.max():g}.")
    if sensitivity.min() < 0 or sensitivity[0].any():
        raise RunError("sensitivity must not be negative, and must be 0 at step 0, where nothing can be reused.")
    if scores.router_TL2 is not None and (scores.router_TL2[0] != 1).any():
        raise RunError("router must be 1 at step 0, where nothing can be reused.")


def _cases(metadata: Mapping[str, str]) -> CacheCases:
    """Those that a file names; one of the version before names none."""
    version = metadata.get("format_version", UNSTATED)
    if version == UNSTATED:
        return REPEATED
    if version != FORMAT_VERSION:
        raise RunError(f"format version {version} is not {FORMAT_VERSION}: use the release that wrote the scores, or distil again.")
    try:
        orders, gaps = (tuple(map(int, metadata[name].split())) for name in ("orders", "gaps"))
        return CacheCases(orders, gaps, int(metadata["kv_order"]))
    except (KeyError, ValueError) as error:
        raise RunError(f"the orders and gaps that the scores were learned for cannot be read ({error!r}): distil again.") from error


def _said(name: str) -> str:
    return name.partition("_")[0]
