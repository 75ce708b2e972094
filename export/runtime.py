"""Runs an artefact: numpy and onnxruntime are all it needs.

    sampler = CachedSampler("artefacts/digits", provider="cpu")
    result = sampler.sample([0, 1, 2], seed=7)
    result.images, result.receipt

Shape suffixes: B images, C H W latent, M rows of the (doubled) batch, U distinct labels.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from export.manifest import read_manifest
from export.sessions import (
    BYTES,
    CONDITION,
    ELEMENT_TYPES,
    FULL,
    PROVIDERS,
    WEIGHTS,
    RuntimeUnavailableError,
    SharedWeights,
    arena_is_ours,
    is_int,
    nodes_per_provider,
    open_session,
    packed_programs,
    prepare,
    session_options,
)
from tc_lightning.errors import TokenCacheError
from tc_lightning.noise import initial_noise


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
        if not is_int(max_batch) or max_batch < 1:
            raise TokenCacheError(f"max_batch is {max_batch!r}: give 1 or more.")
        self.path, self.provider, self.max_batch = Path(path), provider, max_batch
        self.manifest = manifest or read_manifest(self.path)
        if not memory >= 1.0:
            raise TokenCacheError(f"memory is {memory!r}: the weights themselves need 1; give 1 or more.")
        prepare(provider, threads)
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
            options = session_options(self.provider, self._threads, name in self._packed, profile)
            self._weights.give(options)
            self._sessions[name] = open_session(self.path / f"{name}.onnx", self.provider, options)
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
            full: run the reference instead (the baseline): everything is computed at every step, with the reference's sampler.
            on_step: called with (steps done, steps in all) after each step; the steps of every part count.

        Raises:
            TokenCacheError: if a label is out of range, guidance was not exported, or latents become NaN.
        """
        scale = self._check_request(labels, seed, first_index, guidance)
        started = time.perf_counter()
        labels_B = np.asarray(labels, dtype=np.int64)
        parts = range(0, len(labels), self.max_batch)
        steps = self.manifest["full_steps" if full else "steps"]
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
            if not is_int(label) or not 0 <= label < classes:
                raise TokenCacheError(f"label {label!r} is not a class: this artefact has classes 0 to {classes - 1}.")
        if not is_int(seed) or not 0 <= seed < 2**63:
            raise TokenCacheError(f"seed {seed!r} is out of range: choose an integer, 0 to 2**63 - 1.")
        if not is_int(first_index) or not 0 <= first_index < 2**63 - len(labels):
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
        everything = asked["parts"] * m["full_steps"] * m["model"]["depth"] * m["model"]["tokens"]
        return {
            "plan_digest": m["plan_digest"],
            "weights_sha256": m.get("files", {}).get(WEIGHTS, {}).get("sha256"),
            "teacher": m["teacher"],
            "precision": m["precision"],
            **asked,
            "guidance": {"scale": scale, "planned": planned, "as_planned": scale == planned, "steps": dict(tally.guidance)},
            "provider": self.provider,
            "nodes_per_provider": {name: nodes_per_provider(s) for name, s in self._sessions.items() if name in tally.ran},
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
        self.guidance: Counter[str] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.cached_steps = self.cache_bytes = self.modulation_bytes = 0
        self.computed: float = 0  # of the whole batch: a step that computes half of it counts half


class _Request:
    """Buffers of one request, or of a part of it, and its progress through the steps; nothing of it outlives the request."""

    def __init__(
        self, owner: CachedSampler, labels_B: np.ndarray, seed: int, first: int, scale: float, full: bool, tally: _Tally
    ) -> None:
        self.owner, self.full, self.tally = owner, full, tally
        self._steps = owner.manifest["full_steps" if full else "steps"]
        self._offset = owner.manifest["full_offset"] if full else 0
        model = owner.manifest["model"]
        latent = (model["in_channels"], model["input_size"], model["input_size"])
        x_BCHW = initial_noise(seed, range(first, first + len(labels_B)), latent)
        self._x, self._x_next = self._place(x_BCHW), self._empty("fp32", x_BCHW.shape)
        self._m = self._empty("fp32", x_BCHW.shape)
        self._m_prev, self._m_prev2 = (self._place(np.zeros_like(x_BCHW)) for _ in range(2))
        self._doubled = owner.manifest["guidance"]["scale"] != 1.0
        rows_M, self._labels_U = self._label_rows(labels_B, model["num_classes"])
        half_B = rows_M[: len(labels_B)]  # the conditional half, which is all that some programs compute
        self._rows = {"both": self._place(rows_M)} | dict.fromkeys(("forecast", "cond"), self._place(half_B))
        self._numbers = {mode: self._place(np.arange(rows.shape()[0])) for mode, rows in self._rows.items()}
        self._scale = self._place(np.float32(scale))
        self._slots = {} if full else self._allocate_cache(len(labels_B))
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
        self._run(bound["program"], binding, last=step == self._steps - 1)
        self._x, self._x_next = self._x_next, self._x
        self._m_prev, self._m_prev2, self._m = self._m, self._m_prev, self._m_prev2
        self.tally.cached_steps += bool(bound["reads"])
        self.tally.computed += program["blocks_x_tokens"]
        self.tally.guidance[program["guidance"]] += 1
        if not np.isfinite(self._x.numpy()).all():
            raise TokenCacheError(
                f"latents became NaN or infinite at step {step} in program {bound['program']}: "
                "lower the guidance scale, or export with --precision fp32."
            )

    def latents(self) -> np.ndarray:
        """Current latents on the host."""
        return np.array(self._x.numpy())

    def _bind(self, bound: dict[str, Any], program: dict[str, Any], step: int) -> Any:
        values = {"x": self._x, "m_prev": self._m_prev, "m_prev2": self._m_prev2, "step": self._place(np.int64(step))}
        values |= {"first_step": self._first, "mods": self._mods}
        values |= {"guidance": self._scale, "rows": self._rows[program["guidance"]], "numbers": self._numbers[program["guidance"]]}
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
        count = max(1, min(self._steps - step, manifest["condition_values"] // per_step))
        self._chunk, self._first = range(step, step + count), self._place(np.int64(step))
        self._mods = self._empty(manifest["precision"], (count, len(self._labels_U), rows, width))
        self.tally.modulation_bytes = max(self.tally.modulation_bytes, count * per_step * BYTES[manifest["precision"]])
        binding = self.owner.session(CONDITION).io_binding()
        steps = np.arange(step, step + count) + self._offset
        self._held = {"steps": self._place(steps), "labels": self._place(self._labels_U)}
        for name, value in self._held.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("mods", self._mods)
        self._run(CONDITION, binding)

    def _run(self, name: str, binding: Any, last: bool = False) -> None:
        options = None
        if last and self.owner.provider == "cpu" and arena_is_ours():  # an idle sampler holds its weights and little else
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

    def _allocate_cache(self, images: int) -> dict[str, list[Any]]:
        slots, total = {}, 0
        for name, entry in self.owner.manifest["entries"].items():
            shape = (images * entry["rows"], *entry["shape"])
            slots[name] = [self._empty(entry["dtype"], shape) for _ in range(entry["slots"])]
            total += entry["slots"] * int(np.prod(shape)) * BYTES[entry["dtype"]]
        self.tally.cache_bytes = max(self.tally.cache_bytes, total)
        return slots

    def _empty(self, dtype: str, shape: tuple[int, ...]) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), ELEMENT_TYPES[dtype], self.owner.provider, 0)

    def _place(self, array: np.ndarray | np.generic) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(np.asarray(array), self.owner.provider, 0)
