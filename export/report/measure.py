"""Every plan as an artefact: exported, proved on an image, and then timed in turns while it makes the images that are compared.

Nothing is measured on artefacts that disagree with torch: their row says so instead.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from export.compiler.compile import write_sharing
from export.compiler.parity import prove, require_parity, trajectory_error
from export.compiler.weight_files import WeightFiles
from export.report.contenders import Contender
from export.runtime.manifest import read_manifest
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from export.runtime.sessions import CONDITION, WEIGHTS
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.given import Arrays, drawn

PROOF_IMAGES = 1
ROOM = 0.5  # of the free memory, for samplers that stay loaded between their turns
COPIES = 2.5  # memory of a loaded sampler, in sizes of its weights


@dataclasses.dataclass(frozen=True)
class ContenderArtefact:
    """A subject's artefact, loaded, and its export error: relative L2 over a whole trajectory."""

    subject: Contender
    sampler: CachedSampler
    rel_l2: float
    cache_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Failed:
    """A subject whose artefact could not be made, or disagrees with torch."""

    subject: Contender
    reason: str


@dataclasses.dataclass(frozen=True)
class Requests:
    """The images that are made.

    Args:
        seed: seed of the noise and of the conditions, which are drawn (`tc_lightning.plan.given.drawn`).
        images: how many.
        batch: images a request.
    """

    seed: int
    images: int
    batch: int

    @property
    def parts(self) -> list[range]:
        """Indices of the images of each request."""
        return [range(first, min(first + self.batch, self.images)) for first in range(0, self.images, self.batch)]


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """What a sampler made: final latents [B, C, H, W] of every image, and milliseconds an image of each timed request."""

    latents: np.ndarray
    ms_per_image: list[float]

    @property
    def ms(self) -> float:
        """Median."""
        return statistics.median(self.ms_per_image)


def export(weights: WeightFiles, subject: Contender, folder: Path, provider: str, max_batch: int) -> ContenderArtefact | Failed:
    """Write an artefact into a new folder and prove it against torch.

    Args:
        weights: of the teacher and its companions: on the disk once, not once a plan.
        subject: the plan.
        folder: where the artefact is to be.
        provider: `cpu` or `cuda`.
        max_batch: images computed at a time.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True)
    try:
        lowered = lower(subject.plan, provider)
        write_sharing(weights, subject.plan, lowered, folder)
        sampler = CachedSampler(folder, provider, preload=False, max_batch=max_batch, manifest=read_manifest(folder, check_files=False))
        checks = prove(weights.model, subject.plan, lowered, sampler, PROOF_IMAGES, companions=weights.companions)
        require_parity(checks, weights.precision, "It was not measured.")
    except (TokenCacheError, RuntimeError, ValueError) as error:  # whatever a plan makes the exporter or ONNX Runtime say
        return Failed(subject, str(error).strip() or type(error).__name__)
    sampler.release()
    seconds, cache = time.perf_counter() - started, sampler.manifest["cache_bytes_per_image"]
    return ContenderArtefact(subject, sampler, trajectory_error(checks), cache, seconds)


def make_in_turns(
    artefacts: Sequence[ContenderArtefact],
    requests: Requests,
    examples: Arrays | None = None,
    on_request: Callable[[str], object] = lambda _: None,
) -> list[Made | Failed]:
    """Make the same images with every artefact, one request each in turn, so that what else the machine does slows all of them alike.

    Where there are more than two rounds the first is not timed: it warms all of them up.
    """
    stay = _fits(artefacts)
    latents: list[list[np.ndarray]] = [[] for _ in artefacts]
    times: list[list[float]] = [[] for _ in artefacts]
    failures: dict[int, Failed] = {}
    for part in requests.parts:
        given = drawn(artefacts[0].sampler.conditions, requests.seed, part, examples) if artefacts else {}
        for j, artefact in enumerate(artefacts):
            on_request(artefact.subject.name)
            if j in failures:
                continue
            try:
                _load(artefact.sampler)
                started = time.perf_counter()
                latents[j].append(artefact.sampler.sample(None, requests.seed, first_index=part.start, conditions=given).latents)
                times[j].append(1e3 * (time.perf_counter() - started) / len(part))
            except (TokenCacheError, RuntimeError) as error:
                failures[j] = Failed(artefact.subject, str(error).strip())
            if not stay:
                artefact.sampler.release()
    return [
        failures[j] if j in failures else Made(np.concatenate(made), timed[1:] if len(timed) > 2 else timed)
        for j, (made, timed) in enumerate(zip(latents, times, strict=True))
    ]


def _load(sampler: CachedSampler) -> None:
    """Load every session that a request needs, so that loading is not timed."""
    for name in sorted({CONDITION, *(bound["program"] for bound in sampler.manifest["schedule"])}):
        sampler.session(name)


def _fits(artefacts: Sequence[ContenderArtefact]) -> bool:
    """Whether all artefacts may stay loaded; else each is loaded again for its turn. On a GPU there is no telling: they are not."""
    if not artefacts or any(artefact.sampler.provider != "cpu" for artefact in artefacts):
        return False
    needed = COPIES * sum((artefact.sampler.path / WEIGHTS).stat().st_size for artefact in artefacts)
    return needed < ROOM * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
