"""A request laid out ahead: what runs, in order, and which buffers each program reads and writes. Plain data, standard library only.

Buffers go by name:

    x.0 x.1                     latents: a step reads one and writes the other
    step.0 step.1               number of the step, likewise
    first_bad.0 .1              of each image the first step whose latents were not finite, likewise; the number of steps while none is
    m.0 m.1 ...                 outputs of the solver, in a ring as long as the sampler looks back, and one more
    ENTRY@SLOT                  a slot of a cache entry
    mods, first_step            modulations of a chunk of steps, and the chunk's first step: what the condition program writes
    constant.NAME               and what it makes of conditions alone, the same for every chunk
    steps.J, offset             what it reads: the steps of chunk J, and where the run's first one is among the times that it knows
    given.NAME                  and the distinct rows of each condition
    rows.both, numbers.both     row of conditions and number of every row of the batch; rows.half, numbers.half of the conditional half
    guidance                    its scale, of each image
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

CONDITION, FULL, DECODER = "condition", "step_full", "decoder"
PAST = ("m_prev", "m_prev2")  # the solver's last outputs, latest first; the sampler weighs them with next_m_prev, next_m_prev2
SLOT, GIVEN, CONSTANT = "@", "given.", "constant."
ELEMENT_TYPES = {"fp32": 1, "fp16": 10, "bf16": 16, "int64": 7}  # ONNX's numbers of the types of buffers and weights
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int64": 8}


@dataclass(frozen=True)
class ProgramRun:
    """One run of a program: the buffer of each graph input and output. Runs are equal if they can share a CUDA graph.

    Args:
        program: its name.
        inputs: pairs of graph input and buffer.
        outputs: pairs of graph output and buffer.
        step: the sampling step; None for the condition program.
        unread: further inputs, which are there for other programs that share the graph, and buffers that this run writes: it replaces
            whole what it finds there.
    """

    program: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    step: int | None = field(default=None, compare=False)
    unread: tuple[tuple[str, str], ...] = ()

    @property
    def reads(self) -> set[str]:
        """Buffers that it reads."""
        return {buffer for _, buffer in self.inputs}

    @property
    def writes(self) -> set[str]:
        """Buffers that it writes."""
        return {buffer for _, buffer in self.outputs}

    @property
    def reads_cache(self) -> bool:
        """Whether it reads a value that an earlier step left."""
        return any(SLOT in buffer for buffer in self.reads)


class Spec(NamedTuple):
    """Type (`fp32`, `fp16`, `bf16` or `int64`) and shape of a buffer."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """How many values it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """A request of a given size.

    Args:
        runs: what runs, in order.
        buffers: the buffers it takes.
        chunks: steps that each run of the condition program covers, all equally many, so that its shapes never change.
    """

    runs: tuple[ProgramRun, ...]
    buffers: dict[str, Spec]
    chunks: tuple[range, ...]


def lay_out(manifest: dict[str, Any], images: int, given: int, full: bool = False) -> Layout:
    """The layout of a request.

    Args:
        manifest: the artefact's.
        images: images in it, B.
        given: distinct rows of conditions in it, the unconditional one counted, U.
        full: run the reference, which computes everything at every step, rather than the plan.
    """
    model, sampling = manifest["model"], sampling_runs(manifest, full)
    table = (given, manifest["modulations"], model["width"])
    chunks = split_steps(len(sampling), manifest["condition_values"] // math.prod(table))
    runs = _with_condition(sampling, chunks, [condition["name"] for condition in model["conditions"]], list(manifest["constants"]))
    latent = Spec("fp32", (images, model["in_channels"], model["input_size"], model["input_size"]))
    batch = images * (2 if manifest["guidance"]["scale"] != 1.0 else 1)
    buffers = {"x.0": latent, "x.1": latent} | {f"m.{j}": latent for j in range(len(PAST) + 1)}
    buffers |= {f"step.{j}": Spec("int64", ()) for j in range(2)} | {f"first_bad.{j}": Spec("int64", (images,)) for j in range(2)}
    buffers |= {f"{name}.{half}": Spec("int64", (rows,)) for name in ("rows", "numbers") for half, rows in _halves(images, batch)}
    buffers |= {"first_step": Spec("int64", ()), "offset": Spec("int64", ()), "guidance": Spec("fp32", (images, 1, 1, 1))}
    buffers |= {GIVEN + c["name"]: Spec(c["dtype"], (given, *c["shape"])) for c in model["conditions"]}
    buffers |= {"mods": Spec(manifest["precision"], (len(chunks[0]), *table))}
    buffers |= {name: Spec(manifest["precision"], (given, *shape)) for name, shape in manifest["constants"].items()}
    buffers |= {f"steps.{j}": Spec("int64", (len(chunk),)) for j, chunk in enumerate(chunks)}
    for name, entry in {} if full else manifest["entries"].items():
        spec = Spec(entry["dtype"], (images * entry["rows"], *entry["shape"]))
        buffers |= {f"{name}{SLOT}{slot}": spec for slot in range(entry["slots"])}
    used = set().union(*(run.reads | run.writes for run in runs))
    return Layout(runs, {name: spec for name, spec in buffers.items() if name in used}, chunks)


def _halves(images: int, batch: int) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("half", images), ("both", batch)


def sampling_runs(manifest: dict[str, Any], full: bool = False) -> tuple[ProgramRun, ...]:
    """The step programs of the plan, or of the reference, in order."""
    everything = {"program": FULL, "reads": {}, "writes": {}}
    schedule = [everything] * manifest["full_steps"] if full else manifest["schedule"]
    programs = [manifest["programs"][bound["program"]] for bound in schedule]
    ring = 1 + sum(any(name in program["inputs"] for program in programs) for name in PAST)
    return tuple(_bind(program, bound, step, ring) for step, (program, bound) in enumerate(zip(programs, schedule, strict=True)))


def split_steps(steps: int, most: int) -> tuple[range, ...]:
    """Chunks of at most `most` steps (one at least) that cover all: equally long, so the last may begin within the one before."""
    size = max(1, min(steps, most))
    return tuple(range(min(first, steps - size), min(first, steps - size) + size) for first in range(0, steps, size))


def read_first(runs: Iterable[ProgramRun]) -> set[str]:
    """Buffers that are read before anything has written them: what a request has to fill in itself."""
    written: set[str] = set()
    unwritten: set[str] = set()
    for run in runs:
        unwritten |= run.reads - written
        written |= run.writes
    return unwritten


def graphed(runs: Sequence[ProgramRun], most: int) -> list[ProgramRun]:
    """The different step runs, those that occur most often first, `most` at most: each can be a CUDA graph.

    The condition program is none: it runs once or a few times in a request.
    """
    return [run for run, _ in Counter(run for run in runs if run.step is not None).most_common(most)]


def _bind(program: dict[str, Any], bound: dict[str, Any], step: int, ring: int) -> ProgramRun:
    now, then = step % 2, (step + 1) % 2
    source = {name: f"{name}.{now}" for name in ("x", "step", "first_bad")}
    source |= {name: f"m.{(step - 1 - j) % ring}" for j, name in enumerate(PAST)}
    half = "both" if program["guidance"] == "both" else "half"
    source |= {"rows": f"rows.{half}", "numbers": f"numbers.{half}"}
    source |= {f"{entry}.{j}": f"{entry}{SLOT}{slot}" for entry, slots in bound["reads"].items() for j, slot in enumerate(slots)}
    target = {f"{name}_next": f"{name}.{then}" for name in ("x", "step", "first_bad")} | {"m": f"m.{step % ring}"}
    target |= {f"{entry}.new": f"{entry}{SLOT}{slot}" for entry, slot in bound["writes"].items()}
    spare = {name: f"{name.rpartition('.')[0]}.new" for name in program["inputs"] if name not in source}
    unread = tuple((name, target[written]) for name, written in spare.items() if written in target)
    inputs = tuple((name, source.get(name, name)) for name in program["inputs"] if name not in dict(unread))
    return ProgramRun(
        bound["program"], inputs, tuple((name, target[name]) for name in program["outputs"] if name in target), step, unread
    )


def _with_condition(
    sampling: tuple[ProgramRun, ...], chunks: tuple[range, ...], conditions: list[str], constants: list[str]
) -> tuple[ProgramRun, ...]:
    """Put the condition program before the first step of each chunk."""
    runs: list[ProgramRun] = []
    covered = 0
    for j, chunk in enumerate(chunks):
        inputs = (("steps", f"steps.{j}"), ("offset", "offset"), *((GIVEN + name, GIVEN + name) for name in conditions))
        runs.append(ProgramRun(CONDITION, inputs, tuple((name, name) for name in ("mods", "first_step", *constants))))
        runs += sampling[covered : chunk.stop]
        covered = chunk.stop
    return tuple(runs)
