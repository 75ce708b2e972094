"""The sessions of an artefact's graphs, over one copy of the weights: opened when first needed, and kept until they are dropped."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnxruntime as ort

from export.runtime.contract import graph_file
from export.runtime.layout import CONDITION, DECODER
from export.runtime.sessions import SharedWeights, open_session, packed_graphs, session_options


class LoadedGraphs:
    """Graphs of an artefact, ready to run. Several threads may ask for one.

    Args:
        folder: the artefact's.
        manifest: what it says of itself.
        provider: `cpu` or `cuda`.
        device: on CUDA, the number of the GPU.
        threads: threads on the CPU; None lets ONNX Runtime choose.
        memory: room for weights on the CPU, as a multiple of their size.
        profile: write ONNX Runtime's own profiles to files that begin so.
        cuda_graphs: capture step programs as CUDA graphs; may be changed before `drop`.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        provider: str,
        device: int,
        threads: int | None,
        memory: float,
        profile: Path | None,
        cuda_graphs: bool,
    ) -> None:
        self._folder, self._manifest, self._provider, self._device = folder, manifest, provider, device
        self._threads, self._profile, self.cuda_graphs = threads, profile, cuda_graphs
        self._packed = {*(packed_graphs(manifest, memory) if provider == "cpu" else ()), DECODER}
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._changing = threading.Lock()

    def load(self, names: Iterable[str] = ()) -> None:
        """Map the weights, and open these graphs, in the thread that they are to run in."""
        self.weights = SharedWeights(self._folder, self._manifest, self._provider, self._device)
        for name in names:
            self.session(name)

    def graph_of(self, name: str) -> str:
        """The graph of `condition`, `decoder` or a step program."""
        return name if name in (CONDITION, DECODER) else self._manifest["programs"][name]["graph"]

    def session(self, name: str) -> ort.InferenceSession:
        """The session of `condition`, `decoder` or a step program's graph."""
        name = self.graph_of(name)
        with self._changing:
            if name not in self._sessions:
                self._sessions[name] = self._open(name)
            return self._sessions[name]

    def end_profiling(self) -> dict[str, str]:
        """The profile of each graph that was opened, by its name."""
        with self._changing:
            return {name: session.end_profiling() for name, session in self._sessions.items()}

    def drop(self) -> None:
        """Forget all sessions; they are opened again when needed. Who holds one keeps it."""
        with self._changing:
            self._sessions.clear()

    def _open(self, name: str) -> ort.InferenceSession:
        profile = None if self._profile is None else f"{self._profile}-{name}"
        options = session_options(self._provider, self._threads, name in self._packed, profile)
        captured = self.cuda_graphs and name not in (CONDITION, DECODER)
        self.weights.give(options)
        session = open_session(graph_file(self._folder, self._manifest, name), self._provider, options, captured, self._device)
        self.weights.forget()
        return session
