"""What a scheduler of diffusers says of the diffusion that a network was trained for: a schedule of ours, or why there is none.

The forward process and what the output predicts belong to the network, and are read. How the pipeline steps along it (its solver, the
solver's order, the places of its times) is the run's own choice here, `sampler` and `spacing`, and is passed over. What changes an
image beyond both has no place in a table of coefficients, or in our schedules, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tc_lightning.diffusion.flow import CLOCK, SHIFT, SHIFT_TWICE, Flow
from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import TeacherError, TokenCacheError
from tc_lightning.models.checkpoints.diffusers_config import ConfigFields, read_config

SCHEDULER_CONFIG = "scheduler_config.json"
_PREDICTIONS: dict[str, Literal["eps", "v"]] = {"epsilon": "eps", "v_prediction": "v"}
_FLOW = "flow_prediction"
_TIMES = {"num_train_timesteps": 1000}
_BETAS = _TIMES | {"beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon"}
_NO_BETAS_OF_OTHERS = {"beta_schedule": "linear", "trained_betas": None, "rescale_betas_zero_snr": False, "thresholding": False}
_NO_TIMES_OF_OTHERS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_NO_DYNAMIC_SHIFT = {"use_dynamic_shifting": False, "shift_terminal": None}
_STEPPING = ("dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "steps_offset", "variance_type", "time_shift_type")
_SOLVER = ("solver_order", "solver_type", "lower_order_final", "final_sigmas_type")


class ReadSchedule(NamedTuple):
    """A schedule, and what else its scheduler says that a user wants to know."""

    schedule: Schedule
    notes: list[str]


class _Class(NamedTuple):
    """The fields of a scheduler, and the values that diffusers gives to those that a file leaves out, where these are not allowed."""

    fields: ConfigFields
    unsaid: Mapping[str, Any] = {}


def _with_betas(name: str, free: tuple[str, ...], fixed: Mapping[str, Any], **read: Any) -> ConfigFields:
    return ConfigFields(_BETAS | read, {**_NO_BETAS_OF_OTHERS, **fixed}, (*_STEPPING, *free), name)


_CLIPPED = {"clip_sample": True}  # of x_0, at every step
_FLOWS: dict[str, Any] = {"use_flow_sigmas": False, "flow_shift": 1.0}
_CLASSES = {
    "DDIMScheduler": _Class(_with_betas("DDIMScheduler", ("clip_sample_range", "set_alpha_to_one"), {"clip_sample": False}), _CLIPPED),
    "DDPMScheduler": _Class(_with_betas("DDPMScheduler", ("clip_sample_range",), {"clip_sample": False}), _CLIPPED),
    "DPMSolverMultistepScheduler": _Class(
        _with_betas(
            "DPMSolverMultistepScheduler",
            (*_SOLVER, "algorithm_type", "euler_at_final", "lambda_min_clipped"),
            _NO_TIMES_OF_OTHERS | _NO_DYNAMIC_SHIFT | {"use_lu_lambdas": False},
            **_FLOWS,
        )
    ),
    "UniPCMultistepScheduler": _Class(
        _with_betas(
            "UniPCMultistepScheduler",
            (*_SOLVER, "predict_x0", "disable_corrector", "solver_p"),
            _NO_TIMES_OF_OTHERS | _NO_DYNAMIC_SHIFT | {"sigma_min": None, "sigma_max": None},
            **_FLOWS,
        )
    ),
    "FlowMatchEulerDiscreteScheduler": _Class(
        ConfigFields(
            _TIMES | {"shift": 1.0},
            _NO_TIMES_OF_OTHERS | _NO_DYNAMIC_SHIFT | {"invert_sigmas": False, "stochastic_sampling": False},
            ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"),
            "FlowMatchEulerDiscreteScheduler",
        )
    ),
}


def read_schedule(folder: Path, name: str) -> ReadSchedule:
    """The schedule that a scheduler's folder describes.

    Args:
        folder: the pipeline's folder of its scheduler.
        name: the class that the pipeline makes of it.

    Raises:
        TeacherError: if the class is not known, or its configuration is damaged or says what our schedules cannot.
    """
    path = folder / SCHEDULER_CONFIG
    if name not in _CLASSES:
        raise TeacherError(
            f"{path} is of a {name}, whose schedule is not known here: one of {', '.join(_CLASSES)} was expected. {_ALONE}"
        )
    fields, unsaid = _CLASSES[name]
    try:
        said = fields.of({**unsaid, **read_config(path)}, path)
        return _schedule(said, path)
    except TokenCacheError as error:
        raise TeacherError(f"{str(error) if str(path) in str(error) else f'{path}: {error}'} {_ALONE}") from error


_ALONE = "To use the network alone, with its family's own schedule, set `weights` to the folder of the transformer."


def _schedule(said: dict[str, Any], path: Path) -> ReadSchedule:
    steps = said["num_train_timesteps"]
    if "beta_start" not in said:
        return _flow(steps, said["shift"], path, SHIFT_TWICE if steps == CLOCK else SHIFT)
    prediction, flows = said["prediction_type"], said.get("use_flow_sigmas", False)
    if flows != (prediction == _FLOW):
        raise TeacherError(f"{path}: prediction_type is {prediction!r} and use_flow_sigmas {flows}, which contradict each other.")
    if flows:
        return _flow(steps, said["flow_shift"], path, SHIFT)
    if prediction not in _PREDICTIONS:
        raise TeacherError(f"{path}: prediction_type is {prediction!r}; {', '.join(_PREDICTIONS)} or {_FLOW} was expected.")
    schedule = LinearBetas(steps, float(said["beta_start"]), float(said["beta_end"]), _PREDICTIONS[prediction])
    told = f"{steps} linear betas from {schedule.beta_start:g} to {schedule.beta_end:g}, predicting {schedule.predicts}"
    return ReadSchedule(schedule, [f"its scheduler says: {told}"])


def _flow(steps: int, shift: float, path: Path, spacing: str) -> ReadSchedule:
    if not 0.0 < shift < float("inf"):
        raise TeacherError(f"{path}: the shift of times is {shift!r}; a number above 0 was expected.")
    told = f"a flow with noise at {steps} and data at 0" + ("" if shift == 1 else f"; it samples with `spacing: {spacing}{shift:g}`")
    return ReadSchedule(Flow(noise_at=float(steps), data_at=0.0), [f"its scheduler says: {told}"])
