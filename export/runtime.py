"""Runs an artefact: numpy and onnxruntime are all it needs.

    sampler = CachedSampler("artefacts/digits", provider="cpu")
    result = sampler.sample([0, 1, 2], seed=7)
    result.images, result.receipt

Shape suffixes: B images, C H W latent, M rows of the (doubled) batch, U distinct labels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import mmap
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from export.manifest import ArtefactError, read_manifest
from tc_lightning.errors import TokenCacheError, first_line
from tc_lightning.noise import initial_noise

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# ONNX element types that buffers have; numpy has no bfloat16, so types go by number.
ELEMENT_TYPES = {"fp32": 1, "fp16": 10, "bf16": 16, "int64": 7}
NUMPY_TYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
CONDITION, WEIGHTS = "condition", "weights.data"
_arena: list[bool] = []  # once a sampler was loaded: whether the process-wide arena is ours
FULL = "step_full"


class RuntimeUnavailableError(TokenCacheError):
    """The provider that was asked for cannot be used."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a request returns.

    Args:
        latents: the model's own output, [B, C, H, W] float32.
        images: pixels in [-1, 1], [B, 3 or 1, H, W] float32; None for a model of latents, which its own decoder turns into images.
        receipt: what ran, in plain JSON values.
    """

    latents: np.ndarray
    images: np.ndarray | None
    receipt: dict[str, Any]


class CachedSampler:
    """An artefact, loaded and ready. Requests share no data but the weights.

    Args:
        path: artefact folder.
        provider: `cpu` or `cuda`; there is no fallback from one to the other.
        threads: threads on the CPU; None lets ONNX Runtime choose.
        memory: room for weights on the CPU, as a multiple of their size. A program is some percent faster with a repacked copy of
            its own; without one it reads the mapped file that all share. As many programs get one as there is room for, and
            full compute (`full=True`) gets one besides when it is first used.
        max_batch: images computed at a time; larger requests are split. It bounds the memory of a request.
        preload: load the programs of the plan now, rather than at their first use. Full compute, the baseline, waits for its own.
        profile: write ONNX Runtime's own profiles to files that begin so; `end_profiling` names them.
        manifest: for the exporter alone, which runs an artefact to prove it before its manifest is written.

    Raises:
        ArtefactError: if a file is missing, truncated or changed.
        RuntimeUnavailableError: if the provider cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        provider: str = "cpu",
        threads: int | None = None,
        max_batch: int = 32,
        preload: bool = True,
        memory: float = 1.25,
        profile: Path | None = None,
        manifest: dict[str, Any] | None = None,
    ) -> None:
        if provider not in PROVIDERS:
            raise RuntimeUnavailableError(f"unknown provider {provider!r}: choose one of {', '.join(PROVIDERS)}.")
        if not _is_int(max_batch) or max_batch < 1:
            raise TokenCacheError(f"max_batch is {max_batch!r}: give 1 or more.")
        self.path, self.provider, self.max_batch = Path(path), provider, max_batch
        self.manifest = manifest or read_manifest(self.path)
        if not memory >= 1.0:
            raise TokenCacheError(f"memory is {memory!r}: the weights themselves need 1; give 1 or more.")
        _prepare(provider, threads)
        self._weights = SharedWeights(self.path / WEIGHTS, self.manifest, provider)
        self._packed = packed_programs(self.manifest, memory) if provider == "cpu" else set()
        self._profile, self._threads = profile, threads
        self._sessions: dict[str, ort.InferenceSession] = {}
        if preload:
            for name in sorted({CONDITION, *(bound["program"] for bound in self.manifest["schedule"])}):
                self.session(name)

    def session(self, name: str) -> ort.InferenceSession:
        """The session of `condition` or of a step program, loaded on first use; it lives as long as the sampler."""
        if name not in self._sessions:
            profile = None if self._profile is None else f"{self._profile}-{name}"
            options = _session_options(self.provider, self._threads, name in self._packed, profile)
            self._weights.give(options)
            self._sessions[name] = _open_session(self.path / f"{name}.onnx", self.provider, options)
            self._weights.forget()
        return self._sessions[name]

    def end_profiling(self) -> dict[str, str]:
        """The profile of each program that was loaded; see `profile`."""
        return {name: session.end_profiling() for name, session in self._sessions.items()}

    def release(self) -> None:
        """Drop all sessions and their memory; they load again when needed."""
        self._sessions.clear()

    def sample(
        self,
        labels: Sequence[int],
        seed: int = 0,
        guidance: float | None = None,
        first_index: int = 0,
        full: bool = False,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Make one image for each label, `max_batch` of them at a time.

        Args:
            labels: classes.
            seed: seed of the request; image i depends on (seed, first_index + i) and its label alone.
            guidance: guidance scale; None takes the plan's.
            first_index: index of the first image, to continue a series.
            full: compute everything at every step (the baseline), with the same sampler.
            on_step: called with (steps done, steps in all) after each step; the steps of every part count.

        Raises:
            TokenCacheError: if a label is out of range, guidance was not exported, or latents become NaN.
        """
        scale = self._check_request(labels, seed, first_index, guidance)
        started = time.perf_counter()
        labels_B = np.asarray(labels, dtype=np.int64)
        parts = range(0, len(labels), self.max_batch)
        steps = self.manifest["steps"]
        tally, latents = _Tally(), []
        for place, first in enumerate(parts):
            request = _Request(self, labels_B[first : first + self.max_batch], seed, first_index + first, scale, full, tally)
            for step in range(steps):
                request.run_step(step)
                if on_step is not None:
                    on_step(place * steps + step + 1, len(parts) * steps)
            latents.append(request.latents())
        result = np.concatenate(latents)
        images = np.clip(result, -1.0, 1.0) if self.manifest["model"]["in_channels"] in (1, 3) else None
        asked = {"seed": seed, "first_index": first_index, "images": len(labels), "labels": labels_B.tolist()}
        return Result(result, images, self._receipt(tally, asked | {"parts": len(parts)}, scale, full, time.perf_counter() - started))

    def _check_request(self, labels: Sequence[int], seed: int, first_index: int, guidance: float | None) -> float:
        classes, plan = self.manifest["model"]["num_classes"], self.manifest["guidance"]
        if len(labels) == 0:
            raise TokenCacheError("no labels were given: name one class for each image.")
        for label in labels:
            if not _is_int(label) or not 0 <= label < classes:
                raise TokenCacheError(f"label {label!r} is not a class: this artefact has classes 0 to {classes - 1}.")
        if not _is_int(seed) or not 0 <= seed < 2**63:
            raise TokenCacheError(f"seed {seed!r} is out of range: choose an integer, 0 to 2**63 - 1.")
        if not _is_int(first_index) or not 0 <= first_index < 2**63 - len(labels):
            raise TokenCacheError(f"first_index {first_index!r} is out of range: choose an integer, 0 to 2**63 - 1 less the images.")
        scale = float(plan["scale"] if guidance is None else guidance)
        if not np.isfinite(scale):
            raise TokenCacheError(f"guidance {scale} is not a number that can be used.")
        if plan["scale"] == 1.0 and scale != 1.0:
            raise TokenCacheError(
                f"guidance {scale:g} was asked for, but this artefact was planned at scale 1 and holds no unconditional half. "
                "Fit with model.guidance_scale set, and export again."
            )
        return scale

    def _receipt(self, tally: _Tally, asked: dict[str, Any], scale: float, full: bool, seconds: float) -> dict[str, Any]:
        m = self.manifest
        planned = float(m["guidance"]["scale"])
        everything = asked["parts"] * m["steps"] * m["model"]["depth"] * m["model"]["tokens"]
        return {
            "plan_digest": m["plan_digest"],
            "weights_sha256": m.get("files", {}).get(WEIGHTS, {}).get("sha256"),
            "teacher": m["teacher"],
            "precision": m["precision"],
            **asked,
            "guidance": {"scale": scale, "planned": planned, "as_planned": scale == planned},
            "provider": self.provider,
            "nodes_per_provider": {name: _nodes_per_provider(s) for name, s in self._sessions.items() if name in tally.ran},
            "full_compute": full,
            "steps_per_program": {name: count for name, count in tally.ran.items() if name != CONDITION},
            "steps_reading_cache": tally.cached_steps,
            "cache_engaged": tally.cached_steps > 0,
            "blocks_x_tokens_computed": tally.computed,
            "blocks_x_tokens_share": tally.computed / everything,
            "cache_bytes": tally.cache_bytes,
            "modulation_bytes": tally.modulation_bytes,
            "ms_per_program": {name: 1e3 * value for name, value in tally.seconds.items()},
            "ms": 1e3 * seconds,
        }


class _Tally:
    """What ran in a request, over all its parts; bytes are those of the largest part."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.cached_steps = self.computed = self.cache_bytes = self.modulation_bytes = 0


class _Request:
    """Buffers of one request, or of a part of it, and its progress through the steps; nothing of it outlives the request."""

    def __init__(
        self, owner: CachedSampler, labels_B: np.ndarray, seed: int, first: int, scale: float, full: bool, tally: _Tally
    ) -> None:
        self.owner, self.full, self.tally = owner, full, tally
        model = owner.manifest["model"]
        latent = (model["in_channels"], model["input_size"], model["input_size"])
        x_BCHW = initial_noise(seed, range(first, first + len(labels_B)), latent)
        self._x, self._x_next = self._place(x_BCHW), self._empty("fp32", x_BCHW.shape)
        self._m_prev, self._m = self._place(np.zeros_like(x_BCHW)), self._empty("fp32", x_BCHW.shape)
        self._doubled = owner.manifest["guidance"]["scale"] != 1.0
        rows_M, self._labels_U = self._label_rows(labels_B, model["num_classes"])
        self._rows, self._numbers = self._place(rows_M), self._place(np.arange(len(rows_M)))
        self._scale = self._place(np.float32(scale))
        self._slots = {} if full else self._allocate_cache(len(rows_M))
        self._mods, self._first, self._chunk = None, 0, range(0)
        self._held: dict[str, Any] = {}

    def run_step(self, step: int) -> None:
        """Run one step program and exchange the buffers."""
        manifest = self.owner.manifest
        bound: dict[str, Any] = {"program": FULL, "reads": {}, "writes": {}} if self.full else manifest["schedule"][step]
        if step not in self._chunk:
            self._condition(step)
        program = manifest["programs"][bound["program"]]
        binding = self._bind(bound, program, step)
        self._run(bound["program"], binding, last=step == manifest["steps"] - 1)
        self._x, self._x_next, self._m, self._m_prev = self._x_next, self._x, self._m_prev, self._m
        self.tally.cached_steps += bool(bound["reads"])
        self.tally.computed += program["blocks_x_tokens"]
        if not np.isfinite(self._x.numpy()).all():
            raise TokenCacheError(
                f"latents became NaN or infinite at step {step} in program {bound['program']}: "
                "lower the guidance scale, or export with --precision fp32."
            )

    def latents(self) -> np.ndarray:
        """Current latents on the host."""
        return np.array(self._x.numpy())

    def _bind(self, bound: dict[str, Any], program: dict[str, Any], step: int) -> Any:
        values = {"x": self._x, "m_prev": self._m_prev, "step": self._place(np.int64(step))}
        values |= {"first_step": self._first, "mods": self._mods, "rows": self._rows}
        values |= {"guidance": self._scale, "numbers": self._numbers}
        for entry, slots in bound["reads"].items():
            values |= {f"{entry}.{j}": self._slots[entry][slot] for j, slot in enumerate(slots)}
        targets = {"x_next": self._x_next, "m": self._m}
        targets |= {f"{entry}.new": self._slots[entry][slot] for entry, slot in bound["writes"].items()}
        binding = self.owner.session(bound["program"]).io_binding()
        self._held = values  # a binding need not keep alive what it is bound to
        for name in program["inputs"]:
            binding.bind_ortvalue_input(name, values[name])
        for name in program["outputs"]:
            binding.bind_ortvalue_output(name, targets[name])
        return binding

    def _condition(self, step: int) -> None:
        """Modulations of the next chunk of steps, for every distinct label, on the device."""
        manifest = self.owner.manifest
        rows, width = 6 * manifest["model"]["depth"] + 2, manifest["model"]["width"]
        per_step = len(self._labels_U) * rows * width
        count = max(1, min(manifest["steps"] - step, manifest["condition_values"] // per_step))
        self._chunk, self._first = range(step, step + count), self._place(np.int64(step))
        self._mods = self._empty(manifest["precision"], (count, len(self._labels_U), rows, width))
        self.tally.modulation_bytes = max(self.tally.modulation_bytes, count * per_step * _BYTES[manifest["precision"]])
        binding = self.owner.session(CONDITION).io_binding()
        self._held = {"steps": self._place(np.arange(step, step + count)), "labels": self._place(self._labels_U)}
        for name, value in self._held.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("mods", self._mods)
        self._run(CONDITION, binding)

    def _run(self, name: str, binding: Any, last: bool = False) -> None:
        options = None
        if last and self.owner.provider == "cpu" and _arena[0]:  # an idle sampler holds its weights and little else
            options = ort.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        started = time.perf_counter()
        self.owner.session(name).run_with_iobinding(binding, options)
        binding.synchronize_outputs()
        self.tally.seconds[name] += time.perf_counter() - started
        self.tally.ran[name] += 1

    def _label_rows(self, labels_B: np.ndarray, null: int) -> tuple[np.ndarray, np.ndarray]:
        """Row of each batch entry in the list of distinct labels, and that list; the unconditional half shares one."""
        labels_M = np.concatenate([labels_B, np.full_like(labels_B, null)]) if self._doubled else labels_B
        distinct_U, rows_M = np.unique(labels_M, return_inverse=True)
        return rows_M.astype(np.int64), distinct_U

    def _allocate_cache(self, rows: int) -> dict[str, list[Any]]:
        manifest, slots, values = self.owner.manifest, {}, 0
        for name, entry in manifest["entries"].items():
            shape = (rows, *entry["shape"])
            slots[name] = [self._empty(manifest["precision"], shape) for _ in range(entry["slots"])]
            values += entry["slots"] * int(np.prod(shape))
        self.tally.cache_bytes = max(self.tally.cache_bytes, values * _BYTES[manifest["precision"]])
        return slots

    def _empty(self, dtype: str, shape: tuple[int, ...]) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), ELEMENT_TYPES[dtype], self.owner.provider, 0)

    def _place(self, array: np.ndarray | np.generic) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(np.asarray(array), self.owner.provider, 0)


def _prepare(provider: str, threads: int | None) -> None:
    """What has to be so before the first session of a process.

    Raises:
        RuntimeUnavailableError: if the provider cannot be used, or `threads` is not a number of threads.
    """
    if threads is not None and (not _is_int(threads) or threads < 1):
        raise RuntimeUnavailableError(f"threads is {threads!r}: give 1 or more, or None to let ONNX Runtime choose.")
    if provider == "cuda":
        _require_cuda()
    else:
        _share_arena()


def _session_options(provider: str, threads: int | None, packed: bool, profile: str | None) -> ort.SessionOptions:
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


def packed_programs(manifest: dict[str, Any], memory: float) -> set[str]:
    """The programs that get a repacked copy of their weights, within `memory` times the weights' size.

    What is in memory: the copies, and of the mapped file what the other programs of the plan and the conditioning read. Programs
    that save the most come first: those that run most often over most weights. `step_full` runs for comparison only, and always gets
    its copy, so that the comparison is with the best that full compute can do.
    """
    size = {name: entry[3] for name, entry in manifest["weights"].items()}
    room = memory * max(entry[2] + entry[3] for entry in manifest["weights"].values())
    runs = Counter(bound["program"] for bound in manifest["schedule"])
    reads = {name: manifest["programs"][name]["weights"] for name in runs}
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
    the device; bfloat16, which Python cannot place there, is left for each session to load from the file.

    Args:
        path: the weights file.
        manifest: what is in it.
        provider: where the sessions run.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], provider: str) -> None:
        with path.open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._values: dict[str, Any] = {}
        for name in {*manifest[CONDITION]["weights"], *(w for p in manifest["programs"].values() for w in p["weights"])}:
            dtype, shape, offset, nbytes = manifest["weights"][name]
            count = nbytes // _BYTES[dtype]
            array = np.frombuffer(self._mapped, NUMPY_TYPES[dtype], count, offset).reshape(shape)
            if dtype != "bf16":
                self._values[name] = ort.OrtValue.ortvalue_from_numpy(array, provider, 0)
            elif provider == "cpu":
                self._values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ELEMENT_TYPES[dtype])

    def give(self, options: ort.SessionOptions) -> None:
        """Let the session that is made with these options use them; this object must live as long as it."""
        for name, value in self._values.items():
            options.add_initializer(name, value)

    def forget(self) -> None:
        """Drop from memory the pages that were read only to be repacked; those that are needed come back from the file."""
        with contextlib.suppress(OSError):  # a process may have locked all its memory
            self._mapped.madvise(mmap.MADV_DONTNEED)


def _share_arena() -> None:
    """Let all our sessions in the process take their scratch memory from one arena: the programs of a request run in turn."""
    if not _arena:
        info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        try:
            ort.create_and_register_allocator(info, ort.OrtArenaCfg(0, -1, -1, -1))
            _arena.append(True)
        except Exception:  # someone else has registered one already: then that one is shared, and is not ours to shrink
            _arena.append(False)


def _require_cuda() -> None:
    """Say what is missing, rather than run on the CPU as ONNX Runtime would."""
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise RuntimeUnavailableError(
            "provider cuda was asked for, but this onnxruntime has no CUDA provider: install onnxruntime-gpu, and uninstall "
            "onnxruntime if both are installed (the CPU package hides the other). Or ask for provider cpu."
        )
    if {"onnxruntime", "onnxruntime-gpu"} <= {d.name for d in importlib.metadata.distributions()}:
        raise RuntimeUnavailableError(
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files: `pip uninstall onnxruntime "
            "onnxruntime-gpu`, then install onnxruntime-gpu alone."
        )
    ort.preload_dlls()
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", 0)
    except Exception as error:
        raise _cuda_error("the CUDA provider cannot be loaded", error) from error


def _cuda_error(what: str, error: Exception) -> RuntimeUnavailableError:
    return RuntimeUnavailableError(
        f"{what}: {first_line(error)} Check that a GPU is visible (nvidia-smi) and that its driver, CUDA and cuDNN match this "
        f"onnxruntime-gpu {ort.__version__} (the log above names a library that is missing). Or ask for provider cpu."
    )


def _open_session(path: Path, provider: str, options: ort.SessionOptions) -> ort.InferenceSession:
    name = PROVIDERS[provider]
    try:
        session = ort.InferenceSession(str(path), options, providers=[name])
    except Exception as error:
        if provider == "cuda":
            raise _cuda_error(f"{path.name} cannot run on CUDA", error) from error
        raise ArtefactError(f"{path} cannot be loaded: {first_line(error)} Export it again with `python export/to_onnx.py`.") from error
    if name not in session.get_providers():
        raise RuntimeUnavailableError(f"{path.name} was to run on {name}, but ONNX Runtime gave {session.get_providers()}.")
    return session


def _nodes_per_provider(session: ort.InferenceSession) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
