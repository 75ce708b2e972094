"""Proof that an artefact computes what the torch reference computes: program by program, and over whole trajectories.

This is the export error. The method's error, cached against full compute, is another number (`export.compiler.fidelity`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from export.compiler.weights import TORCH_DTYPES
from export.runtime.buffers import place, run_once
from export.runtime.layout import CONDITION, ELEMENT_TYPES, GIVEN, PAST
from export.runtime.programs import FULL, LoweredPlan, Program
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.conditions import Given
from tc_lightning.models.content_predictor import Selector
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import entry_dtype, entry_rows, entry_shape
from tc_lightning.plan.given import REPORTING, Arrays
from tc_lightning.rollout.sampling import SamplingStep, device_of, given_for, noise_for, reference_plan, sample_steps

# Relative L2 errors that are accepted: of a whole trajectory, and of every output of one program.
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 2e-1}
SEED = 20240923  # of the proof's images; `verify` takes fresh ones


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
    model: Network,
    plan: CachePlan,
    lowered: LoweredPlan,
    sampler: CachedSampler,
    images: int,
    seed: int = SEED,
    selector: Selector | None = None,
) -> list[Check]:
    """Run the reference once and compare the artefact with it.

    Args:
        model: the teacher, on any device.
        plan: the plan that was exported.
        lowered: its programs.
        sampler: the artefact.
        images: images in the proof.
        seed: their seed.
        selector: the content predictor that the plan names, if it does, on the teacher's device.

    Returns:
        One check for each output of each program at its first and last step (of `step_full`, at the first of the reference), and one
        for the latents of the whole trajectory.
    """
    device, given = device_of(model), given_for(seed, range(images), model, use=REPORTING)
    chosen = {i: p for p in lowered.programs for i in {*p.steps[:1], *p.steps[-1:]}}
    x_T, y = noise_for(seed, range(images), model, device), given.to(device)
    checks: list[Check] = []
    final: Tensor | None = None
    for state in sample_steps(model, plan, x_T, y, selector=selector):
        if state.step in chosen:
            checks += check_program(plan, chosen[state.step], sampler, _on_host(state), given, model.nulls)
        final = state.x_next
    full = next(p for p in lowered.programs if p.name == FULL)
    if not full.steps:  # no step of the plan runs it: take those of the reference, until its sampler uses all that it may
        for state in itertools.islice(sample_steps(model, reference_plan(plan), x_T, y), plan.reference.history + 1):
            checks += check_program(plan, full, sampler, _on_host(state), given, model.nulls)
    assert final is not None
    latents = sampler.sample(conditions={name: value.numpy() for name, value in given.items()}, seed=seed, pixels=False).latents
    worst = max(relative_l2(a, b) for a, b in zip(latents, final.cpu().numpy(), strict=True))
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


def _on_host(state: SamplingStep) -> SamplingStep:
    """The same with every tensor on the CPU."""
    return SamplingStep(
        state.step,
        state.x.cpu(),
        state.eps.cpu(),
        state.x_next.cpu(),
        tuple(value.cpu() for value in state.past),
        state.m.cpu(),
        {key: value.cpu() for key, value in state.store.items()},
        {entry: value.cpu() for entry, value in state.writes.items()},
    )


def check_program(
    plan: CachePlan, program: Program, sampler: CachedSampler, state: SamplingStep, given: Given, nulls: Arrays | None
) -> list[Check]:
    """Run one program at one step, and compare what it gives with what the step gave.

    Args:
        plan: the plan that was exported.
        program: the program.
        sampler: the artefact.
        state: what the step goes on from, and what it leads to, on the host.
        given: conditions of its images, on the host.
        nulls: those that guidance leads away from.
    """
    doubled = plan.guidance.doubles_batch and not program.guidance.single
    rows = given.with_nulls(plan.model.conditions, nulls) if doubled else given
    precision = sampler.manifest["precision"]
    offset = sampler.manifest["full_offset"] if program.name == FULL else 0
    feed = {"steps": np.array([state.step]), "offset": np.int64(offset), "step": np.int64(state.step)}
    feed |= {"first_bad": np.full(given.images, state.step + 1), "rows": np.arange(rows.images), "numbers": np.arange(rows.images)}
    values = {name: place(np.asarray(value), "int64", sampler.provider, sampler.device) for name, value in feed.items()}
    values |= {GIVEN + c.name: place(rows[c.name].numpy(), c.dtype, sampler.provider, sampler.device) for c in plan.model.conditions}
    values |= run_once(sampler.session(CONDITION), values, sampler.provider)
    past = [*state.past, *[torch.zeros_like(state.x)] * (len(PAST) - len(state.past))]
    floats = {"x": state.x, "guidance": torch.full((given.images, 1, 1, 1), plan.guidance.scale)} | dict(zip(PAST, past, strict=True))
    values |= {name: _place(tensor, "fp32", sampler) for name, tensor in floats.items()}
    values |= {name: _place(tensor, dtype, sampler) for name, dtype, tensor in _cache_inputs(plan, program, state, precision)}
    session = sampler.session(program.name)
    unread = _unread(plan, program, given.images, precision, {given.name for given in session.get_inputs()} - values.keys())
    values |= {name: _place(tensor, dtype, sampler) for name, dtype, tensor in unread}
    results = run_once(session, values, sampler.provider)
    expected = {"x_next": state.x_next, "m": state.m} | {f"{entry.name}.new": value for entry, value in state.writes.items()}
    where = f"{program.name}, step {state.step}"
    return [Check(where, name, relative_l2(to_numpy(results[name]), expected[name].numpy())) for name in results if name in expected]


def _cache_inputs(plan: CachePlan, program: Program, state: SamplingStep, precision: str) -> list[tuple[str, str, Tensor]]:
    """Past values of every entry that the program reads, latest first, padded as at run time, and the precision of each."""
    inputs, sources = [], {read.entry: read.sources for read in plan.flows[state.step].reads}
    for entry, count in program.reads:
        padded = (*sources[entry], *sources[entry][-1:] * (count - len(sources[entry])))
        dtype = entry_dtype(entry, precision)
        inputs += [(f"{entry.name}.{j}", dtype, state.store[entry, step]) for j, step in enumerate(padded)]
    return inputs


def to_numpy(value: ort.OrtValue) -> np.ndarray:
    """What is in a buffer, on the host; bfloat16, which numpy has not, as float32."""
    if value.element_type() == ELEMENT_TYPES["bf16"]:
        return torch.from_dlpack(value).float().cpu().numpy()
    return value.numpy()


def _unread(plan: CachePlan, program: Program, images: int, precision: str, names: set[str]) -> Iterator[tuple[str, str, Tensor]]:
    """What its graph takes for other programs that share it: NaN, which would show if this program used it."""
    entries = {entry.name: entry for entry in program.writes}
    for name in sorted(names):
        entry = entries[name.rpartition(".")[0]]
        shape = (images * entry_rows(plan, entry), *entry_shape(plan, entry))
        yield name, entry_dtype(entry, precision), torch.full(shape, torch.nan)


def _place(tensor: Tensor, precision: str, sampler: CachedSampler) -> ort.OrtValue:
    """A tensor in a precision on the sampler's device."""
    rounded = tensor.to(TORCH_DTYPES[precision]).contiguous()
    bits = (rounded.view(torch.uint16) if precision == "bf16" else rounded).numpy()
    return place(bits, precision, sampler.provider, sampler.device)
