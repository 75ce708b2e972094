"""Runs an artefact: numpy and onnxruntime are all it needs.

    sampler = CachedSampler("artefacts/digits", provider="cpu")
    result = sampler.sample([0, 1, 2], seed=7)
    result.images, result.receipt

Shape suffixes: B images, C H W latent.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort

from export.runtime.admission import batch_within, most_rows, predicted_bytes
from export.runtime.buffers import Pool, ProgramError
from export.runtime.contract import read_artefact
from export.runtime.cuda_provider import lane, why_no_graphs
from export.runtime.decoder import Decoder
from export.runtime.distinct import distinct_rows
from export.runtime.layout import CONDITION, DECODER, lay_out
from export.runtime.loaded_graphs import LoadedGraphs
from export.runtime.negatives import nulls_of, stored_nulls
from export.runtime.one_process import OfOneProcess
from export.runtime.receipt import decoding_of, receipt_of, said_of
from export.runtime.request import (
    Part,
    Tally,
    asked_for,
    echoed,
    fill,
    rows_asked_for,
    rows_in,
    run_part,
)
from export.runtime.result import Result
from export.runtime.sessions import (
    PROVIDERS,
    RuntimeUnavailableError,
    is_int,
    nodes_per_provider,
    prepare,
)
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.conditions import Conditions, conditions_from_json
from tc_lightning.plan.signature import PIXELS

T = TypeVar("T")


class CachedSampler(OfOneProcess):
    """An artefact, loaded and ready. Requests share no data but the weights.

    Several threads may use one sampler, in the process that made it: it cannot be copied or pickled, nor used after a fork. On CUDA
    the requests of all samplers in the process run one after the other, in a thread that is theirs. The first requests of a size
    capture CUDA graphs; meanwhile no other thread of the process may allocate memory on the GPU, so make a request of each size
    before serving starts.

    Args:
        path: artefact folder.
        provider: `cpu` or `cuda`; there is no fallback from one to the other.
        threads: threads on the CPU; None lets ONNX Runtime choose.
        memory: room for weights on the CPU, as a multiple of their size. A program is some percent faster with a repacked copy of
            its own; without one it reads the mapped file that all share. As many programs get one as there is room for, and
            full compute (`full=True`) gets one besides when it is first used.
        max_batch: images computed at a time; larger requests are split. It bounds the memory of a request.
        max_bytes: what a request's buffers may take (`predicted_bytes`): it is split further, and refused if an image takes more.
        preload: load the programs of the plan now, rather than at their first use. Full compute, the baseline, waits for its own.
        cuda_graphs: on CUDA, capture each step with its buffers as a CUDA graph when it first runs, and replay it from then on. The
            buffers of up to four sizes of request are kept for that; `release` drops them.
        device: on CUDA, the number of the GPU.
        profile: write ONNX Runtime's own profiles to files that begin so; `end_profiling` names them.
        decoder_batch: images that are decoded at a time, where there is a decoder (`Decoder.memory_bytes` says what that takes).
        manifest: for the exporter alone, which runs an artefact to prove it before its manifest is written.

    Raises:
        ArtefactError: if a file is missing, truncated or changed, the manifest says what cannot be so, or ONNX Runtime is older than
            the artefact needs.
        RuntimeUnavailableError: if the provider or its device cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        provider: str = "cpu",
        threads: int | None = None,
        max_batch: int = 32,
        max_bytes: int | None = None,
        preload: bool = True,
        memory: float = 1.25,
        cuda_graphs: bool = True,
        device: int = 0,
        profile: Path | None = None,
        decoder_batch: int = 1,
        manifest: dict[str, Any] | None = None,
    ) -> None:
        if provider not in PROVIDERS:
            raise RuntimeUnavailableError(f"unknown provider {provider!r}: choose one of {', '.join(PROVIDERS)}.")
        if not is_int(max_batch) or max_batch < 1:
            raise TokenCacheError(f"max_batch is {max_batch!r}: give 1 or more.")
        super().__init__(Path(path))
        self.provider, self.device, self.max_batch = provider, device, max_batch
        self.manifest = manifest or read_artefact(self.path, ort.__version__)
        if not memory >= 1.0:
            raise TokenCacheError(f"memory is {memory!r}: the weights themselves need 1; give 1 or more.")
        if provider == "cuda" and any(program["graph"] != name for name, program in self.manifest["programs"].items()):
            raise RuntimeUnavailableError(
                f"{self.path} was exported for the CPU: programs share graphs that have no static shapes, which CUDA graphs need. "
                "Export it again with --provider cuda."
            )
        self.max_bytes, self.nulls = max_bytes, stored_nulls(self.path, self.manifest, self.conditions)
        self.decoder = Decoder(self.manifest, self.session, decoder_batch) if DECODER in self.manifest else None
        self._decoding = self.decoder.working_bytes if self.decoder else 0
        batch_within(self.manifest, max_batch, max_bytes)  # refused now rather than at the first request
        prepare(provider, threads, device)
        self._no_graphs = self._graphs_off(cuda_graphs)
        captured = self._no_graphs is None
        self._loaded = LoadedGraphs(self.path, self.manifest, provider, device, threads, memory, profile, captured)
        self._pool = Pool(self.session, provider, keep=captured, device=device)
        decoder = {DECODER} if self.decoder else set()
        programs = {CONDITION, *decoder, *(bound["program"] for bound in self.manifest["schedule"])} if preload else set()
        self._exclusively(lambda _: self._loaded.load(sorted(programs)))

    @functools.cached_property
    def conditions(self) -> Conditions:
        """What a request must bring."""
        return conditions_from_json(self.manifest["model"]["conditions"], "conditions")

    def session(self, name: str) -> ort.InferenceSession:
        """The session of `condition`, `decoder` or a step program's graph, loaded on first use, and kept until `release`."""
        self._require_own_process()
        return self._loaded.session(name)

    def graph_of(self, name: str) -> str:
        """The graph of `condition`, `decoder` or a step program."""
        return self._loaded.graph_of(name)

    def predicted_bytes(self, images: int, full: bool = False) -> int:
        """What the buffers of so many images at a time take, at most, and decoding them: known before a request runs."""
        return predicted_bytes(self.manifest, images, full, decoding=self._decoding)

    def end_profiling(self) -> dict[str, str]:
        """The profile of each program that was loaded; see `profile`."""
        self._require_own_process()
        return self._loaded.end_profiling()

    def release(self) -> None:
        """Drop all sessions, buffers and CUDA graphs; they are made again when needed. Requests that run meanwhile keep theirs."""
        self._require_own_process()

        def drop(_: Callable[[], None]) -> None:
            self._pool.clear(keep=self._no_graphs is None)
            self._loaded.drop()

        self._exclusively(drop)

    def sample(
        self,
        labels: Sequence[int] | None = None,
        seed: int | Sequence[int] = 0,
        guidance: float | Sequence[float] | None = None,
        first_index: int = 0,
        full: bool = False,
        on_step: Callable[[int, int], None] | None = None,
        timing: bool = False,
        conditions: Mapping[str, Any] | None = None,
        pixels: bool = True,
        indices: Sequence[int] | None = None,
        strict: bool = True,
        negative: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> Result:
        """Make one image for each label, or row of conditions, `max_batch` of them at a time.

        Args:
            labels: classes, for a class-conditional model.
            seed: seed of the request, or of each image; image i depends on its seed, its index, first_index + i, its guidance scale and
                its conditions alone.
            guidance: guidance scale, or those of each image; None takes the plan's.
            first_index: index of the first image, to continue a series.
            full: run the reference instead (the baseline): everything is computed at every step, with the reference's sampler.
            on_step: called with (steps done, steps in all) after each step; the steps of every part count. On CUDA a step counts when
                it is in the GPU's queue, and the call comes from another thread.
            timing: on CUDA, wait for each program to measure it; otherwise the receipt has no times of programs there. On the CPU
                every request is measured.
            conditions: conditions by name, [images, ...] each, for any model.
            pixels: whether the artefact's decoder, where there is one, is to make images of the latents.
            indices: the images' indices, in place of those that count from first_index on: images of several requests in one batch are
                those that each would get alone.
            strict: raise if an image's latents or pixels become NaN or infinite; else `Result.failed` says so, and the others are
                returned.
            negative: null values by name in place of the artefact's, a row for all images or for each: what guidance leads away from.
            named: conditions, as arguments of their own.

        Raises:
            TokenCacheError: if a condition is missing, unknown or not what it can be, guidance was not exported, latents or pixels
                become NaN, or the artefact's files were changed since it was loaded.
        """
        self._require_own_process()
        given = asked_for(self.conditions, labels, {**(conditions or {}), **named})
        images = rows_in(given)
        rows = rows_asked_for(self.manifest, images, seed, first_index if indices is None else indices, guidance)
        whole = Part(given, rows, full, nulls_of(self.conditions, self.nulls, negative, rows))
        size = batch_within(self.manifest, self.max_batch, self.max_bytes, full, whole.own_nulls, self._decoding if pixels else 0)
        started, parts = time.perf_counter(), whole.split(size)
        failed: dict[int, str] = {}
        tally, steps = Tally(), self.manifest["full_steps" if full else "steps"]
        nodes: dict[str, dict[str, int]] = {}

        def run(check: Callable[[], None]) -> list[np.ndarray]:
            def done(place: int, step: int) -> None:
                check()
                if on_step is not None:
                    on_step(place * steps + step, len(parts) * steps)

            latents = []
            for place, part in enumerate(parts):
                x_BCHW, bad, ran = self._run(part, timing, functools.partial(done, place))
                if bad and strict:
                    raise TokenCacheError(next(iter(bad.values())))
                failed.update({place * size + image: why for image, why in bad.items()})
                latents.append(x_BCHW)
                tally.add(ran)
            nodes.update({name: nodes_per_provider(self.session(name)) for name in tally.ran})  # if released meanwhile, it loads here
            return latents

        result = np.concatenate(self._exclusively(run))
        seconds = time.perf_counter() - started
        shown, unseen = self._shown(result, failed) if pixels else (None, {})
        if unseen and strict:
            raise TokenCacheError(next(iter(unseen.values())))
        decoding = decoding_of(self.decoder, shown, time.perf_counter() - started - seconds)
        said = echoed(self.conditions, given, {name: whole.nulls[name] for name in negative or ()})
        asked = {**said_of(rows), "images": images, **said, "parts": len(parts)}
        place = {"provider": self.provider, "device": self.device, "nodes_per_provider": nodes}
        receipt = receipt_of(self.manifest, tally, asked, place, [row.scale for row in rows], full, self._no_graphs, seconds)
        return Result(result, shown, receipt | decoding, failed | unseen)

    def decode(self, latents_BCHW: np.ndarray) -> np.ndarray | None:
        """Pixels in [-1, 1] of latents that the model made; None of a model of latents without a decoder.

        Raises:
            TokenCacheError: if pixels become NaN or infinite.
        """
        self._require_own_process()
        shown, unseen = self._shown(latents_BCHW, {})
        if unseen:
            raise TokenCacheError(next(iter(unseen.values())))
        return shown

    def _shown(self, latents_BCHW: np.ndarray, failed: Mapping[int, str]) -> tuple[np.ndarray | None, dict[int, str]]:
        """Pixels, of which those of images that failed are NaN; and why further images have none."""
        if self.manifest["model"]["output"] == PIXELS:
            return np.clip(latents_BCHW, -1.0, 1.0), {}
        decoder = self.decoder
        return (None, {}) if decoder is None else self._exclusively(lambda _: decoder.each(latents_BCHW, failed))

    def _run(self, part: Part, timing: bool, on_step: Callable[[int], None]) -> tuple[np.ndarray, dict[int, str], Tally]:
        """Run a part of a request; once more without CUDA graphs, should they fail here."""
        try:
            return self._run_once(part, timing, on_step)
        except ProgramError as error:
            if not error.graph:
                raise
            self._no_graphs, self._loaded.cuda_graphs = f"they failed: {error}", False
            warnings.warn(f"CUDA graphs are not used any more: {error}", stacklevel=2)
        self.release()
        return self._run_once(part, timing, on_step)

    def _run_once(self, part: Part, timing: bool, on_step: Callable[[int], None]) -> tuple[np.ndarray, dict[int, str], Tally]:
        """Run a part of a request in buffers that nobody else uses meanwhile."""
        self._loaded.weights.require_unchanged()
        images, on_cpu = part.images, self.provider == "cpu"
        distinct = distinct_rows(self.conditions, self.manifest["guidance"]["scale"] != 1.0, part.given, part.nulls)
        rows = rows_in(distinct.rows) if on_cpu else most_rows(self.manifest, images, part.own_nulls)
        key = (images, rows, part.full)
        workspace = self._pool.take(key, lay_out(self.manifest, images, rows, part.full))
        try:
            fill(workspace, self.manifest, part, distinct)
            return run_part(workspace, self.manifest, on_cpu, timing, on_step)
        finally:
            workspace.wait()  # what is in the queue uses these buffers
            self._loaded.weights.forget()  # a third of the weights is conditioning, which the steps did not read
            self._pool.put_back(key, workspace)

    def _exclusively(self, call: Callable[[Callable[[], None]], T]) -> T:
        """Run a call; on CUDA in the thread of the GPU, one at a time."""
        return call(lambda: None) if self.provider == "cpu" else lane().run(call)

    def _graphs_off(self, wanted: bool) -> str | None:
        """Why no CUDA graphs are used; None if they are."""
        if self.provider == "cpu":
            return "the provider is the CPU"
        return why_no_graphs() if wanted else "cuda_graphs=False"
