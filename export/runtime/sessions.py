"""ONNX Runtime sessions as the runtime wants them: providers, threads, scratch memory, and one copy of the weights for all.

Needs numpy and onnxruntime alone.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from export.runtime.buffers import NUMPY_TYPES, place
from export.runtime.cuda_provider import CUDA, RuntimeUnavailableError, cuda_error, provider_options, require_cuda
from export.runtime.decoder_contract import DATA
from export.runtime.layout import BYTES, CONDITION, ELEMENT_TYPES, FULL
from export.runtime.manifest import WEIGHTS, ArtefactError
from tc_lightning.errors import first_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": CUDA}
_arena: list[bool] = []  # once a sampler was loaded: whether the process-wide arena is ours
_arena_lock = threading.Lock()


def prepare(provider: str, threads: int | None, device: int = 0) -> None:
    """What has to be so before the first session of a process.

    Raises:
        RuntimeUnavailableError: if the provider or its device cannot be used, or `threads` is not a number of threads.
    """
    if threads is not None and (not is_int(threads) or threads < 1):
        raise RuntimeUnavailableError(f"threads is {threads!r}: give 1 or more, or None to let ONNX Runtime choose.")
    if not is_int(device) or device < 0:
        raise RuntimeUnavailableError(f"device is {device!r}: give the number of a GPU, 0 or more, as nvidia-smi lists them.")
    if provider == "cuda":
        require_cuda(device)
        return
    if device:
        raise RuntimeUnavailableError(
            f"device {device} was asked for, but provider {provider} has no other than 0: ask for provider cuda."
        )
    with _arena_lock:
        _share_arena()


def session_options(provider: str, threads: int | None, packed: bool, profile: str | None) -> ort.SessionOptions:
    """Options of one session; `packed` lets it keep a repacked copy of its weights, `profile` begins the name of its profile."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    # Every session has its threads. Those of the program that ran last must not spin on the cores that the next one needs: on two
    # cores the first full step after a cheap one took twice its time. (One pool for the process would bar all other sessions
    # in it that do not ask for that pool.)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if provider == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    else:
        options.add_session_config_entry("session.use_env_allocators", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return options


def packed_graphs(manifest: dict[str, Any], memory: float) -> set[str]:
    """The graphs that get a repacked copy of their weights, within `memory` times the weights' size.

    What is in memory: the copies, and of the mapped file what the other graphs of the plan and the conditioning read. Graphs that save
    the most come first: those that run most often over most weights. `step_full` runs for comparison only, and always gets its copy,
    so that the comparison is with the best that full compute can do.
    """
    size = {name: entry[3] for name, entry in manifest["weights"].items()}
    room = memory * max(entry[2] + entry[3] for entry in manifest["weights"].values())
    programs = manifest["programs"]
    runs = Counter(programs[bound["program"]]["graph"] for bound in manifest["schedule"])
    reads = {program["graph"]: program["weights"] for program in programs.values() if program["graph"] in runs}
    cost = {name: sum(map(size.__getitem__, weights)) for name, weights in reads.items()}
    packed: set[str] = set()
    for name in sorted(runs, key=lambda name: (-runs[name] * cost[name], name)):
        chosen = packed | {name}
        mapped = {*manifest[CONDITION]["weights"], *(w for other in runs if other not in chosen for w in reads[other])}
        if sum(cost[other] for other in chosen) + sum(map(size.__getitem__, mapped)) <= room:
            packed = chosen
    return packed | ({FULL} - runs.keys())


class SharedWeights:
    """The weights as initialisers that all sessions share.

    On the CPU these are views of the mapped weights file: pages that no program reads take no memory. On CUDA they are one copy on
    the device.

    Args:
        folder: the artefact.
        manifest: what is in its weights file.
        provider: where the sessions run.
        device: on which of its devices.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], provider: str, device: int = 0) -> None:
        # They stay open: these files are what is mapped, whatever takes their names.
        self._files = {name: (folder / name).open("rb") for name in (WEIGHTS, DATA) if (folder / name).exists()}
        self._read_from_files, self._at_first = provider == "cpu", self._now()
        self._mapped = mmap.mmap(self._files[WEIGHTS].fileno(), 0, access=mmap.ACCESS_READ)
        self._values: dict[str, Any] = {}
        for name in {*manifest[CONDITION]["weights"], *(w for p in manifest["programs"].values() for w in p["weights"])}:
            dtype, shape, offset, nbytes = manifest["weights"][name]
            count = nbytes // BYTES[dtype]
            array = np.frombuffer(self._mapped, NUMPY_TYPES[dtype], count, offset).reshape(shape)
            self._values[name] = _mapped(array, dtype) if provider == "cpu" else on_device(array, dtype, provider, device)

    def give(self, options: ort.SessionOptions) -> None:
        """Let the session that is made with these options use them; this object must live as long as it."""
        for name, value in self._values.items():
            options.add_initializer(name, value)

    def require_unchanged(self) -> None:
        """Refuse weights, the decoder's too, that were written to since they were mapped.

        Images would be others, and a file that was cut short ends the process.
        A new file that took the old one's place is no change: the old one stays mapped.

        Raises:
            ArtefactError: if size or time of change are not those of then.
        """
        if self._read_from_files and (now := self._now()) != self._at_first:
            changed = next(name for name, file in self._files.items() if now[name] != self._at_first[name])
            raise ArtefactError(
                f"{changed} was changed while a sampler was using it: it is not what its manifest says any more. "
                "Put an artefact in the place of another by renaming its folder, never by writing into it; export it again, and make "
                "a new sampler."
            )

    def _now(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of each file."""
        found = {name: os.fstat(file.fileno()) for name, file in self._files.items()}
        return {name: (said.st_size, said.st_mtime_ns) for name, said in found.items()}

    def forget(self) -> None:
        """Drop from memory the pages that were read to be repacked, or for conditioning; those that are needed come back."""
        with contextlib.suppress(OSError):  # a process may have locked all its memory
            self._mapped.madvise(mmap.MADV_DONTNEED)


def _mapped(array: np.ndarray, dtype: str) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ELEMENT_TYPES[dtype])


def on_device(array: np.ndarray, dtype: str, provider: str, device: int = 0) -> ort.OrtValue:
    """A copy on the device. Initialisers must not own their memory: a view through DLPack does not, and keeps alive what does."""
    return ort.OrtValue.from_dlpack(place(array, dtype, provider, device))


def _share_arena() -> None:
    """Let all our sessions in the process take their scratch memory from one arena: the programs of a request run in turn."""
    if not _arena:
        info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        try:
            ort.create_and_register_allocator(info, ort.OrtArenaCfg(0, -1, -1, -1))
            _arena.append(True)
        except Exception:  # someone else has registered one already: then that one is shared, and is not ours to shrink
            _arena.append(False)


def arena_is_ours() -> bool:
    """Whether scratch memory comes from an arena that was made here, and may be shrunk."""
    return _arena == [True]


def open_session(path: Path, provider: str, options: ort.SessionOptions, graphs: bool = False, device: int = 0) -> ort.InferenceSession:
    """Load a graph on a provider and on no other.

    Args:
        path: its file.
        provider: `cpu` or `cuda`.
        options: its options.
        graphs: whether its runs may be captured as CUDA graphs.
        device: the GPU.

    Raises:
        RuntimeUnavailableError: if the provider cannot run it.
        ArtefactError: if the graph cannot be loaded.
    """
    name = PROVIDERS[provider]
    try:
        chosen = (name, provider_options(graphs, device)) if provider == "cuda" else name
        session = ort.InferenceSession(str(path), options, providers=[chosen])
    except Exception as error:
        if provider == "cuda":
            raise cuda_error(f"{path.name} cannot run on CUDA", error) from error
        raise ArtefactError(f"{path} cannot be loaded: {first_line(error)} Export it again with `python export/to_onnx.py`.") from error
    if name not in session.get_providers():
        raise RuntimeUnavailableError(f"{path.name} was to run on {name}, but ONNX Runtime gave {session.get_providers()}.")
    return session


def nodes_per_provider(session: ort.InferenceSession) -> dict[str, int]:
    """How many nodes of a session run on each provider."""
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)


def is_int(value: object) -> bool:
    """Whether a value is an integer of Python or numpy, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
