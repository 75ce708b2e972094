"""What full-compute trajectories of a teacher tell about caching, whatever the policy. Needs numpy, no torch.

Shape suffixes: T sampling steps, G gaps (index g - 1 is a distance of g steps), S spacings of sources (index s - 1 likewise), L
blocks, 2 branches (0 attn, 1 mlp), O forecast orders.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np

from tc_lightning.errors import RunError
from tc_lightning.measure.residuals import ARRAYS as OF_RESIDUALS
from tc_lightning.measure.residuals import Residuals
from tc_lightning.plan.atomic import write_atomically
from tc_lightning.plan.forecasts import MAX_ORDER
from tc_lightning.plan.tensor_files import TensorFileError, read_tensors

MAX_GAP = 8  # steps between a computation and its reuse that are measured, unless told otherwise
_ARRAYS = ("drift_TGL2", "gap_error_TGSO", "effect_T")
_TEXTS = ("teacher", "sampler", "made_of")


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Measured changes and their consequences; row i belongs to sampling step i, the noisiest being 0.

    Args:
        drift_TGL2: relative L1 change of a branch's output (before the gate) between step i and step i - g; 0 where i < g.
        gap_error_TGSO: mean squared error of the guided eps of step i when the residual of all blocks is forecast from full
            computations at steps i - g, i - g - s and i - g - 2s, as many of them as the order needs and as exist; 0 where i < g.
        effect_T: mean squared error of the final latents over that of the guided eps of step i (`tc_lightning.measure.step_effect`).
        teacher: sha256 of the teacher's weights.
        sampler: `sampler_digest` of the sampler.
        made_of: what else it depends on, in words: guidance, and which images (`tc_lightning.measure.calibrate.run_calibration`).
        residuals: what the summed residual of all blocks does; None in files of before it was measured.

    Raises:
        RunError: if shapes disagree, or a value is not finite or negative.
    """

    drift_TGL2: np.ndarray
    gap_error_TGSO: np.ndarray
    effect_T: np.ndarray
    teacher: str
    sampler: str
    made_of: str = ""
    residuals: Residuals | None = None

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            array = np.array(getattr(self, name), dtype=np.float64, order="C")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        _validate(self)

    @property
    def max_gap(self) -> int:
        """Largest distance that was measured."""
        return self.drift_TGL2.shape[1]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, those of residuals among them."""
        return {name: getattr(self, name) for name in _ARRAYS} | (self.residuals.arrays if self.residuals else {})

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of all arrays and of what they belong to."""
        hasher = hashlib.sha256(f"{self.teacher} {self.sampler} {self.made_of}".encode())
        for name, array in self.arrays.items():
            hasher.update(f"\n{name} {array.shape}\n".encode() + array.tobytes())
        return hasher.hexdigest()

    def save(self, path: Path) -> None:
        """Write `.safetensors` atomically: a reader sees the old file or the new one."""
        from safetensors.numpy import save

        metadata = {name: getattr(self, name) for name in _TEXTS}
        write_atomically(path, save(self.arrays, metadata))

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            RunError: if the file is missing, damaged, or does not hold a valid calibration.
        """
        try:
            arrays, metadata = read_tensors(path, "np")
        except TensorFileError as error:
            raise RunError(f"cannot read the calibration {path}: {error}. Delete it, and it is measured again.") from error
        if set(arrays) not in ({*_ARRAYS}, {*_ARRAYS, *OF_RESIDUALS}) or not {"teacher", "sampler"} <= set(metadata):
            raise RunError(f"{path} does not hold a calibration: found {', '.join(sorted(arrays)) or 'nothing'}.")
        try:
            residuals = Residuals.of(arrays) if {*OF_RESIDUALS} <= set(arrays) else None
            found = cls(*(arrays[name] for name in _ARRAYS), *(metadata.get(name, "") for name in _TEXTS))
            return dataclasses.replace(found, residuals=residuals)
        except RunError as error:
            raise RunError(f"{path}: {error}") from error


def _validate(calibration: Calibration) -> None:
    drift, error, effect = (getattr(calibration, name) for name in _ARRAYS)
    if drift.ndim != 4 or 0 in drift.shape:
        raise RunError(f"drift has the shape {drift.shape}; [steps, gaps, blocks, branches] was expected.")
    steps, gaps = drift.shape[:2]
    if error.shape != (steps, gaps, gaps, MAX_ORDER + 1):
        raise RunError(f"gap_error has the shape {error.shape}; {(steps, gaps, gaps, MAX_ORDER + 1)} was expected.")
    if effect.shape != (steps,):
        raise RunError(f"effect has the shape {effect.shape}; {(steps,)} was expected.")
    if calibration.residuals and calibration.residuals.change_TG.shape != (steps, gaps):
        raise RunError(f"residuals are of {calibration.residuals.change_TG.shape} steps and gaps; {(steps, gaps)} were expected.")
    for name, array in (("drift", drift), ("gap_error", error), ("effect", effect)):
        if not np.isfinite(array).all() or (array < 0).any():
            step = int(np.argwhere(~np.isfinite(array) | (array < 0))[0][0])
            raise RunError(f"{name} is negative or not finite at step {step}: the teacher is damaged, or its trajectories diverge.")
