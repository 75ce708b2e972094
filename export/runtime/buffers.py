"""Buffers of a request on its device, and the bindings of programs to them. Needs numpy and onnxruntime alone.

Where CUDA graphs replay a program they do so on the addresses that it was captured with. So there a set of buffers outlives its
request and is lent to the next one of that size: to one request at a time, which writes before it reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import onnxruntime as ort

from export.runtime.cuda_provider import in_short
from export.runtime.layout import ELEMENT_TYPES, Layout, ProgramRun, graphed
from tc_lightning.errors import TokenCacheError

NUMPY_TYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int64": np.int64}  # of bfloat16 the bits
NO_GRAPH = -1  # ONNX Runtime's mark of a run that is neither captured as a CUDA graph nor replayed
GRAPH_ID, NO_WAIT, SHRINK = "gpu_graph_id", "disable_synchronize_execution_providers", "memory.enable_memory_arena_shrinkage"
MOST_GRAPHS = 64  # for one size of request: a binding takes a slot of each entry, so there are few, but a plan may be irregular
MOST_SIZES = 4  # sizes of request whose buffers and graphs are kept; others run without graphs

OpenSession = Callable[[str], ort.InferenceSession]


def place(array: np.ndarray, dtype: str, provider: str, device: int = 0) -> ort.OrtValue:
    """A copy of an array on a device of a provider, in a buffer of its own; bfloat16 comes as its bits, uint16."""
    value = empty(dtype, array.shape, provider, device)
    fill(value, array, dtype)
    return value


def empty(dtype: str, shape: tuple[int, ...], provider: str, device: int = 0) -> ort.OrtValue:
    """A buffer with nothing in particular in it."""
    return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), ELEMENT_TYPES[dtype], provider, device)


def fill(value: ort.OrtValue, array: np.ndarray | np.generic, dtype: str) -> None:
    """Copy an array to a buffer; it is there when this returns. ONNX Runtime copies bytes, whatever they mean: the types must agree."""
    value.update_inplace(np.ascontiguousarray(array, dtype=NUMPY_TYPES[dtype]).reshape(value.shape()))


def run_once(session: ort.InferenceSession, values: dict[str, ort.OrtValue], provider: str) -> dict[str, ort.OrtValue]:
    """All outputs of a program, in new buffers, from those of `values` that it takes; no CUDA graph is captured or replayed."""
    outputs = [output.name for output in session.get_outputs()]
    inputs = {given.name: values[given.name] for given in session.get_inputs()}
    options = ort.RunOptions()
    if provider == "cuda":
        options.add_run_config_entry(GRAPH_ID, str(NO_GRAPH))
    return dict(zip(outputs, session.run_with_ort_values(outputs, inputs, options), strict=True))


class ProgramError(TokenCacheError):
    """A program failed while running.

    Args:
        program: its name.
        provider: where it ran.
        graph: whether it was captured as a CUDA graph, or replayed.
        error: what ONNX Runtime said.
    """

    def __init__(self, program: str, provider: str, graph: bool, error: Exception) -> None:
        self.graph = graph
        remedy = "ask for fewer images at a time (max_batch)" if provider == "cpu" else "look at nvidia-smi, and lower max_batch"
        super().__init__(f"program {program} failed on {provider}: {in_short(error)} If memory ran out, {remedy}.")


class Workspace:
    """The buffers of a layout, and a binding for each different run.

    Args:
        layout: what runs, and which buffers it takes.
        session: gives the session of a program.
        provider: where the buffers are.
        device: on which of its devices.
        graph_ids: where to take the numbers of CUDA graphs from, which no two bindings may share; None for no graphs.
    """

    def __init__(
        self, layout: Layout, session: OpenSession, provider: str, device: int = 0, graph_ids: Iterator[int] | None = None
    ) -> None:
        self.layout, self.has_graphs, self._session, self._provider = layout, graph_ids is not None, session, provider
        self._values = {name: empty(spec.dtype, spec.shape, provider, device) for name, spec in layout.buffers.items()}
        # With the session that each was made for, which may be dropped by others while this request runs.
        self._bindings: dict[ProgramRun, tuple[ort.InferenceSession, ort.IOBinding]] = {}
        self._graphs = {} if graph_ids is None else dict(zip(graphed(layout.runs, MOST_GRAPHS), graph_ids, strict=False))
        self._captured: set[ProgramRun] = set()

    def fill(self, name: str, array: np.ndarray | np.generic) -> None:
        """Copy an array to a buffer."""
        fill(self._values[name], array, self.layout.buffers[name].dtype)

    def read(self, name: str) -> np.ndarray:
        """What is in a buffer, on the host; on CUDA, `wait` first. On the CPU a view, which later runs write into."""
        return self._values[name].numpy()

    def run(self, run: ProgramRun, shrink: bool = False) -> str:
        """Run one program; on CUDA this only puts it in the queue.

        Args:
            run: one of the layout's.
            shrink: give scratch memory that the program does not hold any more back to the system (CPU).

        Returns:
            `captured` if this run made a CUDA graph, `replayed` if it was one, `plain` otherwise.

        Raises:
            ProgramError: if ONNX Runtime cannot run it.
        """
        if run not in self._bindings:
            self._bindings[run] = self._bind(run)
        graph = self._graphs.get(run, NO_GRAPH)
        session, binding = self._bindings[run]
        try:
            session.run_with_iobinding(binding, self._options(graph, shrink))
        except Exception as error:
            raise ProgramError(run.program, self._provider, graph != NO_GRAPH, error) from error
        if graph == NO_GRAPH:
            return "plain"
        seen = run in self._captured
        self._captured.add(run)
        return "replayed" if seen else "captured"

    def wait(self) -> None:
        """Until the device has done everything that was put in its queue."""
        for _, binding in list(self._bindings.values())[:1]:  # one stream: any binding will do
            binding.synchronize_outputs()

    def _bind(self, run: ProgramRun) -> tuple[ort.InferenceSession, ort.IOBinding]:
        session = self._session(run.program)
        binding = session.io_binding()
        for name, buffer in (*run.inputs, *run.unread):
            binding.bind_ortvalue_input(name, self._values[buffer])
        for name, buffer in run.outputs:
            binding.bind_ortvalue_output(name, self._values[buffer])
        return session, binding

    def _options(self, graph: int, shrink: bool) -> ort.RunOptions | None:
        if self._provider == "cpu" and not shrink:
            return None
        options = ort.RunOptions()
        if shrink:
            options.add_run_config_entry(SHRINK, "cpu:0")
        if self._provider == "cuda":
            options.add_run_config_entry(GRAPH_ID, str(graph))
            options.add_run_config_entry(NO_WAIT, "1")
        return options


class Pool:
    """Workspaces that are kept between requests, so that CUDA graphs captured in one are replayed in the next.

    A request takes one out and puts it back. One that finds none of its size (a request within another, or the fifth size) gets
    buffers of its own without graphs.

    Args:
        session: gives the session of a program.
        provider: where the buffers are.
        keep: whether to keep any: CUDA graphs need it, and without them memory that nobody uses is better given back.
        device: on which of its devices.
    """

    def __init__(self, session: OpenSession, provider: str, keep: bool, device: int = 0) -> None:
        self._session, self._provider, self._keep, self._device = session, provider, keep, device
        self._kept: dict[object, Workspace | None] = {}  # None while it is lent
        self._graph_ids = itertools.count(1)

    def take(self, key: object, layout: Layout) -> Workspace:
        """A workspace for the layout; layouts with the same key are the same."""
        if kept := self._kept.get(key):
            self._kept[key] = None
            return kept
        if not self._keep or key in self._kept or len(self._kept) == MOST_SIZES:
            return Workspace(layout, self._session, self._provider, self._device)
        workspace = Workspace(layout, self._session, self._provider, self._device, self._graph_ids)
        self._kept[key] = None
        return workspace

    def put_back(self, key: object, workspace: Workspace) -> None:
        """Give a workspace back; one that is not to be kept, or that was lent before all were dropped, goes."""
        if workspace.has_graphs and key in self._kept:
            self._kept[key] = workspace

    def clear(self, keep: bool | None = None) -> None:
        """Drop all; they are made again when needed, and `keep` says whether to keep any from now on (None: as before)."""
        self._kept.clear()
        self._keep = self._keep if keep is None else keep
