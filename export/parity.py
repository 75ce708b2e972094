"""Proof that an artefact computes what the torch reference computes: program by program, and over whole trajectories.

This is the export error. The method's error, cached against full compute, is another number (`export.fidelity`).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from export.emit import PAST
from export.programs import FULL, LoweredPlan, Program
from export.runtime import CachedSampler
from tc_lightning.content_predictor import Selector
from tc_lightning.costs import entry_dtype
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.dit import DiT
from tc_lightning.plan import CachePlan
from tc_lightning.sampling import SamplingStep, noise_for, reference_plan, sample_steps

# Relative L2 errors that are accepted: of a whole trajectory, and of every output of one program.
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 2e-1}
SEED = 20240923  # of the proof's images; `verify` takes fresh ones
_NUMPY = {"fp32": np.float32, "fp16": np.float16}


@dataclasses.dataclass(frozen=True)
class Check:
    """One compared output: where, and its relative L2 error."""

    where: str
    output: str
    rel_l2: float


class ParityError(TokenCacheError):
    """An artefact disagrees with the torch reference."""

    exit_status = 3


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    """|actual - expected| / |expected|; infinite if anything is not finite."""
    difference = float(np.linalg.norm((actual.astype(np.float64) - expected).ravel()))
    value = difference / max(float(np.linalg.norm(expected.astype(np.float64).ravel())), 1e-30)
    return value if np.isfinite(value) else float("inf")


def prove(
    model: DiT,
    plan: CachePlan,
    lowered: LoweredPlan,
    sampler: CachedSampler,
    images: int,
    seed: int = SEED,
    selector: Selector | None = None,
) -> list[Check]:
    """Run the reference once and compare the artefact with it.

    Args:
        model: the teacher.
        plan: the plan that was exported.
        lowered: its programs.
        sampler: the artefact.
        images: images in the proof.
        seed: their seed.
        selector: the content predictor that the plan names, if it does.

    Returns:
        One check for each output of each program at its first and last step (of `step_full`, at the first of the reference), and one
        for the latents of the whole trajectory.
    """
    labels = (torch.arange(images) * 7) % plan.model.num_classes
    chosen = {i: p for p in lowered.programs for i in {*p.steps[:1], *p.steps[-1:]}}
    x_T = noise_for(seed, range(images), model)
    checks: list[Check] = []
    final: Tensor | None = None
    for state in sample_steps(model, plan, x_T, labels, selector=selector):
        if state.step in chosen:
            checks += _check_program(plan, chosen[state.step], sampler, state, labels)
        final = state.x_next
    full = next(p for p in lowered.programs if p.name == FULL)
    if not full.steps:  # no step of the plan runs it: take those of the reference, until its sampler uses all that it may
        for state in itertools.islice(sample_steps(model, reference_plan(plan), x_T, labels), plan.baseline.history + 1):
            checks += _check_program(plan, full, sampler, state, labels)
    assert final is not None
    latents = sampler.sample(labels.tolist(), seed=seed).latents
    worst = max(relative_l2(a, b) for a, b in zip(latents, final.numpy(), strict=True))
    return [*checks, Check("trajectory", "latents (worst image)", worst)]


def require_parity(checks: list[Check], precision: str, remedy: str) -> None:
    """Accept or refuse.

    Raises:
        ParityError: with a table of every check that failed.
    """
    failed = [c for c in checks if not c.rel_l2 <= TOLERANCE[precision]]
    if failed:
        table = "\n".join(f"  {c.where:<24} {c.output:<28} {c.rel_l2:.2e}" for c in failed)
        raise ParityError(
            f"the artefact disagrees with the torch reference (relative L2 above {TOLERANCE[precision]:g} in {precision}):\n{table}\n"
            f"{remedy}"
        )


def trajectory_error(checks: list[Check]) -> float:
    """Relative L2 of the whole trajectory, worst image."""
    return next(c.rel_l2 for c in checks if c.where == "trajectory")


def _check_program(plan: CachePlan, program: Program, sampler: CachedSampler, state: SamplingStep, labels: Tensor) -> list[Check]:
    doubled = plan.guidance.doubles_batch and not program.guidance.single
    y = torch.cat([labels, torch.full_like(labels, plan.model.num_classes)]) if doubled else labels
    precision = sampler.manifest["precision"]
    offset = sampler.manifest["full_offset"] if program.name == FULL else 0
    mods = _modulations(sampler, offset + state.step, y.numpy())
    feed = {"x": state.x.numpy(), "step": np.int64(state.step), "first_step": np.int64(state.step), "rows": np.arange(len(y))}
    past = [m.numpy() for m in state.past]
    feed |= dict(zip(PAST, past + [np.zeros_like(feed["x"])] * (len(PAST) - len(past)), strict=True))
    feed |= {"guidance": np.float32(plan.guidance.scale), "numbers": np.arange(len(y))}
    values: dict[str, Any] = {name: _place(value, sampler.provider) for name, value in feed.items()} | {"mods": mods}
    for name, dtype, tensor in _cache_inputs(program, state, precision):
        values[name] = _cast(tensor, dtype, sampler.provider)
    session = sampler.session(program.name)
    outputs = [o.name for o in session.get_outputs()]
    inputs = {i.name: values[i.name] for i in session.get_inputs()}
    results = dict(zip(outputs, session.run_with_ort_values(outputs, inputs), strict=True))
    expected = {"x_next": state.x_next, "m": state.m} | {f"{entry.name}.new": value for entry, value in state.writes.items()}
    readable = [
        n for n in outputs if n in expected and (precision != "bf16" or n in ("x_next", "m", "guidance.new"))
    ]  # numpy has no bfloat16
    where = f"{program.name}, step {state.step}"
    return [Check(where, name, relative_l2(results[name].numpy(), expected[name].numpy())) for name in readable]


def _cache_inputs(program: Program, state: SamplingStep, precision: str) -> list[tuple[str, str, Tensor]]:
    """Past values of every entry that the program reads, latest first, padded as at run time, and the precision of each."""
    inputs = []
    for entry, count in program.reads:
        written = sorted((step for e, step in state.store if e == entry), reverse=True)[:count]
        padded = written + written[-1:] * (count - len(written))
        dtype = entry_dtype(entry, precision)
        inputs += [(f"{entry.name}.{j}", dtype, state.store[entry, step]) for j, step in enumerate(padded)]
    return inputs


def _modulations(sampler: CachedSampler, step: int, labels_M: np.ndarray) -> Any:
    feed = {"steps": _place(np.array([step]), sampler.provider), "labels": _place(labels_M, sampler.provider)}
    return sampler.session("condition").run_with_ort_values(["mods"], feed)[0]


def _place(array: Any, provider: str) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(np.asarray(array), provider, 0)


def _cast(tensor: Tensor, precision: str, provider: str) -> Any:
    if precision == "bf16":
        bits = tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
    return _place(tensor.numpy().astype(_NUMPY[precision]), provider)
