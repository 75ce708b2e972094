"""One request, or a part of one that is not larger than the batch: fills its buffers, runs its layout, and counts what ran.

Shape suffixes: B images, C H W latent, M rows of the (doubled) batch, U distinct rows of conditions.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from export.runtime.buffers import Workspace
from export.runtime.distinct import DistinctRows
from export.runtime.layout import BYTES, CONSTANT, GIVEN, SLOT, Layout, ProgramRun, read_first
from export.runtime.sessions import arena_is_ours, is_int
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import Conditions, class_label
from tc_lightning.plan.given import Arrays, checked
from tc_lightning.rollout.noise import initial_noise


@dataclasses.dataclass(frozen=True)
class Row:
    """What an image depends on beside its conditions: seed, index and guidance scale of its own, and nothing of the batch that it is
    computed in."""

    seed: int
    index: int
    scale: float


@dataclasses.dataclass(frozen=True)
class Part:
    """What is asked for: image j depends on row j of the conditions and on rows[j] alone.

    Args:
        given: conditions, [B, ...] each.
        rows: the images' seeds, indices and scales.
        full: run the reference instead of the plan.
        nulls: null values that are no numbers, [B, ...] each, or [1, ...] for all images.
    """

    given: Arrays
    rows: tuple[Row, ...]
    full: bool
    nulls: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def images(self) -> int:
        """B, how many there are."""
        return len(self.rows)

    def split(self, size: int) -> list[Part]:
        """Parts of at most so many images."""
        cuts = [slice(start, start + size) for start in range(0, self.images, size)]
        return [Part(_cut(self.given, cut), self.rows[cut], self.full, self.nulls | _cut(self._own, cut)) for cut in cuts]

    @property
    def own_nulls(self) -> bool:
        """Whether images have null values of their own."""
        return bool(self._own)

    @property
    def _own(self) -> dict[str, np.ndarray]:
        return {name: value for name, value in self.nulls.items() if len(value) > 1}


def _cut(arrays: Arrays, rows: slice) -> dict[str, np.ndarray]:
    return {name: value[rows] for name, value in arrays.items()}


@dataclasses.dataclass
class Tally:
    """What ran in a request, over all its parts; bytes are those of the largest part."""

    ran: Counter[str] = dataclasses.field(default_factory=Counter)
    guidance: Counter[str] = dataclasses.field(default_factory=Counter)
    graphs: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    cached_steps: int = 0
    computed: float = 0  # of the whole batch: a step that computes half of it counts half
    cache_bytes: int = 0
    modulation_bytes: int = 0
    constant_bytes: int = 0

    def add(self, other: Tally) -> None:
        """Take over what ran in a part."""
        self.ran.update(other.ran)
        self.guidance.update(other.guidance)
        self.graphs.update(other.graphs)
        for name, value in other.seconds.items():
            self.seconds[name] += value
        self.cached_steps += other.cached_steps
        self.computed += other.computed
        self.cache_bytes = max(self.cache_bytes, other.cache_bytes)
        self.modulation_bytes = max(self.modulation_bytes, other.modulation_bytes)
        self.constant_bytes = max(self.constant_bytes, other.constant_bytes)


def rows_in(given: Arrays) -> int:
    """How many images there are conditions of."""
    return len(next(iter(given.values())))


def asked_for(conditions: Conditions, labels: Sequence[int] | None, named: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The conditions of a request by name, [B, ...] each, checked.

    Args:
        conditions: of the model.
        labels: classes, for a class-conditional model; None if conditions are named.
        named: conditions by name.

    Raises:
        TokenCacheError: if nothing is asked for, a condition is missing or unknown, or a value is not one that it can have.
    """
    if labels is not None:
        label = class_label(conditions)
        if named:
            raise TokenCacheError(f"labels and {', '.join(named)} were given: labels are the condition {label.name}, give it once.")
        for value in labels:
            if not is_int(value) or not 0 <= value < label.classes:
                raise TokenCacheError(f"label {value!r} is not a class: this artefact has {label.in_words}.")
        named = {label.name: np.asarray(labels, dtype=np.int64)}
    given = checked(conditions, named)
    if rows_in(given) == 0:
        what = "labels were given: name one class" if labels is not None else "images were asked for: give one row of every condition"
        raise TokenCacheError(f"no {what} for each image.")
    return given


def echoed(conditions: Conditions, given: Arrays, negative: Arrays) -> dict[str, Any]:
    """What a receipt says of a request's conditions: labels of a class-conditional model; else classes, and of others shapes; and of
    null values that it brings the same."""
    said, against = (
        {c.name: rows[c.name].tolist() if c.classes else list(rows[c.name].shape) for c in conditions if c.name in rows}
        for rows in (given, negative)
    )
    asked = {"labels": said[conditions[0].name]} if len(said) == 1 and conditions[0].classes else {"conditions": said}
    return asked | ({"negative": against} if against else {})


def rows_asked_for(
    manifest: dict[str, Any],
    images: int,
    seed: int | Sequence[int],
    indices: int | Sequence[int],
    guidance: float | Sequence[float] | None,
) -> tuple[Row, ...]:
    """What is asked for beside conditions, image by image, checked.

    Args:
        manifest: the artefact's.
        images: how many there are.
        seed: of all, or of each.
        indices: of the first, from which the others count on, or of each.
        guidance: scale of all, or of each; None takes the plan's.

    Raises:
        TokenCacheError: if seeds, indices or scales are not one for each image, or cannot be used.
    """
    planned = manifest["guidance"]["scale"]
    seeds = _for_each("seed", seed, images)
    places = [indices + image for image in range(images)] if isinstance(indices, int) else _for_each("index", indices, images)
    scales = [planned] * images if guidance is None else _for_each("guidance", guidance, images)
    for name, numbers in (("seed", seeds), ("index", places)):
        for number in numbers:
            if not is_int(number) or not 0 <= number < 2**63:
                raise TokenCacheError(f"{name} {number!r} is out of range: choose integers, 0 to 2**63 - 1.")
    return tuple(
        Row(int(one), int(place), _usable_scale(planned, scale)) for one, place, scale in zip(seeds, places, scales, strict=True)
    )


def _for_each(name: str, value: Any, images: int) -> list[Any]:
    """A value for each image, from one for all or a list."""
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return [value] * images
    if len(value) != images:
        raise TokenCacheError(f"{len(value)} values of {name} were given for {images} images: give one, or one for each.")
    return list(value)


def _usable_scale(planned: float, scale: Any) -> float:
    try:
        number = float(scale)
    except (TypeError, ValueError, OverflowError):
        number = np.nan
    if not np.isfinite(number):
        raise TokenCacheError(f"guidance {scale!r} is not a number that can be used.")
    if planned == 1.0 and number != 1.0:
        raise TokenCacheError(
            f"guidance {number:g} was asked for, but this artefact was planned at scale 1 and holds no unconditional half. "
            "Fit with model.guidance_scale set, and export again."
        )
    return number


def fill(workspace: Workspace, manifest: dict[str, Any], part: Part, distinct: DistinctRows) -> None:
    """Write everything that the layout reads before it writes it: of what was in these buffers, nothing is left to read.

    Args:
        workspace: the buffers.
        manifest: the artefact's.
        part: what is asked for.
        distinct: its conditions without repetition.
    """
    layout, rows_M = workspace.layout, distinct.places_M
    x = layout.buffers["x.0"].shape
    half_B = rows_M[: part.images]  # the conditional half, which is all that some programs compute
    values: dict[str, Any] = {
        "x.0": np.concatenate([initial_noise(row.seed, (row.index,), x[1:]) for row in part.rows]),
        "step.0": np.int64(0),
        "first_bad.0": np.full(part.images, manifest["full_steps" if part.full else "steps"]),
        "rows.both": rows_M,
        "rows.half": half_B,
        "numbers.both": np.arange(len(rows_M)),
        "numbers.half": np.arange(len(half_B)),
        "offset": np.int64(manifest["full_offset"] if part.full else 0),
        "guidance": np.array([row.scale for row in part.rows]),
    }
    for name, rows_U in distinct.rows.items():
        padding = layout.buffers[GIVEN + name].shape[0] - len(rows_U)
        values[GIVEN + name] = np.concatenate([rows_U, np.repeat(rows_U[-1:], padding, axis=0)])
    values |= {f"steps.{j}": np.arange(chunk.start, chunk.stop) for j, chunk in enumerate(layout.chunks)}
    values |= {name: np.zeros(spec.shape) for name, spec in layout.buffers.items() if name.startswith("m.")}  # before the first step
    for name in sorted(read_first(layout.runs)):
        workspace.fill(name, values[name])


def run_part(
    workspace: Workspace, manifest: dict[str, Any], on_cpu: bool, timing: bool, on_step: Callable[[int], None]
) -> tuple[np.ndarray, dict[int, str], Tally]:
    """Run the layout of a workspace that is filled.

    Args:
        workspace: its buffers.
        manifest: the artefact's.
        on_cpu: whether each run has ended when it returns. Then nothing more is computed once the latents of all images have become NaN
            or infinite; on a device they are looked at at the end, since to look would be to wait.
        timing: wait for each program, to measure it.
        on_step: called with the number of steps done, or in the device's queue, after each.

    Returns:
        Latents [B, C, H, W], what went wrong with which of the images, and what ran.
    """
    runs = workspace.layout.runs
    tally = _sized(workspace.layout)
    for place, run in enumerate(runs):
        started = time.perf_counter()
        how = workspace.run(run, shrink=on_cpu and arena_is_ours() and place == len(runs) - 1)  # an idle sampler holds little
        if timing and not on_cpu:
            workspace.wait()
        if timing or on_cpu:
            tally.seconds[run.program] += time.perf_counter() - started
        tally.ran[run.program] += 1
        if run.step is None:
            continue
        tally.graphs[how] += 1
        tally.cached_steps += run.reads_cache
        program = manifest["programs"][run.program]
        tally.computed += program["blocks_x_tokens"]
        tally.guidance[program["guidance"]] += 1
        on_step(run.step + 1)
        if on_cpu and len(failed := _not_finite(workspace, run)) == len(workspace.read(dict(run.outputs)["first_bad_next"])):
            return np.array(workspace.read(dict(run.outputs)["x_next"])), failed, tally
    workspace.wait()
    return np.array(workspace.read(dict(runs[-1].outputs)["x_next"])), _not_finite(workspace, runs[-1]), tally


def _sized(layout: Layout) -> Tally:
    held = {name: spec.values * BYTES[spec.dtype] for name, spec in layout.buffers.items()}
    cache = sum(nbytes for name, nbytes in held.items() if SLOT in name)
    constants = sum(nbytes for name, nbytes in held.items() if name.startswith(CONSTANT))
    return Tally(cache_bytes=cache, modulation_bytes=held["mods"], constant_bytes=constants)


def _not_finite(workspace: Workspace, run: ProgramRun) -> dict[int, str]:
    """After a step: of which images the latents became NaN or infinite so far, and where."""
    programs = {other.step: other.program for other in workspace.layout.runs if other.step is not None}
    first_bad_B = workspace.read(dict(run.outputs)["first_bad_next"]).tolist()
    return {
        image: f"latents became NaN or infinite at step {step} in program {programs[step]}: "
        "lower the guidance scale, or export with --precision fp32."
        for image, step in enumerate(first_bad_B)
        if step in programs
    }


def outside_the_fit(fit: dict[str, Any] | None, scales: Sequence[float], labels: Sequence[int]) -> list[str]:
    """In what a request leaves the range that the sampler's coefficients were fitted in; empty where none were, or it does not.

    Args:
        fit: the manifest's word of it: the guidance scale, and the classes of the images.
        scales: the request's guidance scales.
        labels: the request's classes.
    """
    if fit is None:
        return []
    found = [f"guidance {scale:g}: fitted at {fit['guidance']:g}" for scale in sorted(set(scales)) if scale != fit["guidance"]]
    unseen = sorted(set(labels) - set(fit["labels"]))
    return [*found, *([f"{len(unseen)} of its classes: no image of them was fitted on"] if unseen else [])]
