"""Stage 4: the large shapes with random weights: full compute and three plans on the clock, beside PyTorch and torch.compile.

All requests of a measurement make the same images and run in turns. Efficiency is the speed-up on the clock over that in MACs, both
against ONNX Runtime with full compute.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.bench.acceptance.environment import device_name
from export.bench.acceptance.gauges import queue_of
from export.bench.acceptance.reporter import Findings, NotHere, Reporter
from export.bench.acceptance.sizes import AUTOTUNE, CLOCK, COMPILE, MEMORY, Sizes, Work, sizes_for
from export.bench.acceptance.subjects import random_plans, random_teacher, torch_device, write_artefact
from export.bench.timing import TORCH_TYPES, compiled, in_turns, product_tflops, require_on_device, torch_latents
from export.compiler.parity import relative_l2
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError, first_line
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.conditions import class_label
from tc_lightning.plan.costs import cache_bytes_per_image, plan_macs
from tc_lightning.rollout.sampling import noise_for, reference_plan

EAGER, FULL = "PyTorch", "full"
EFFICIENCY, EFFICIENCY_SKIP = 0.95, 0.98  # promised from this batch on:
JUDGED_BATCH = 8
SAME_IMAGES = 0.5  # relative L2 below which two runs of half precision make the same images
QUEUE_SHARE = 0.5  # of a request, in which the host must have filled the queue
REPEATS = 3
ROOM = 1.25  # for weights on the CPU: see CachedSampler
Requests = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What is measured in one precision.

    Args:
        plans: by name.
        folders: their artefacts.
        samplers: the artefacts, loaded; that of full compute besides, so that its buffers are its own.
        model: PyTorch's, in this precision on the device; None if PyTorch cannot use it.
        dtype: PyTorch's name of the precision.
        product: TFLOP/s of a large matrix product; None without PyTorch.
    """

    plans: dict[str, CachePlan]
    folders: dict[str, Path]
    samplers: dict[str, CachedSampler]
    model: Network | None
    dtype: torch.dtype
    product: float | None

    @property
    def plan(self) -> CachePlan:
        """Any of the plans: they share reference and guidance."""
        return next(iter(self.plans.values()))

    def labels(self, batch: int) -> list[int]:
        """Labels of a request."""
        return [i % class_label(self.plan.model.conditions).classes for i in range(batch)]

    def cached(self, batch: int) -> Requests:
        """Requests to ONNX Runtime: full compute and every plan."""
        labels = self.labels(batch)
        return {name: functools.partial(sampler.sample, labels, full=name == FULL) for name, sampler in reversed(self.samplers.items())}

    def eager(self, batch: int) -> Requests:
        """The request to PyTorch, if it can be made."""
        if self.model is None:
            return {}
        x, labels = self._given(batch)
        return {EAGER: functools.partial(torch_latents, self.model.eps, self.plan, x, labels, self.dtype)}

    def compiled(self, batch: int, mode: str | None) -> tuple[Requests, float]:
        """The request to torch.compile, and the seconds that compiling took.

        Raises:
            NotHere: if there is nothing to compile with.
        """
        if self.model is None:
            raise NotHere("PyTorch cannot use the device, see stage 1")
        x, labels = self._given(batch)
        twice = 2 if self.plan.guidance.doubles_batch else 1
        try:
            function, seconds = compiled(self.model, x.to(self.dtype).repeat(twice, 1, 1, 1), labels.repeat(twice), mode)
        except Exception as error:  # no C++ compiler, for example
            raise NotHere(f"torch.compile failed: {first_line(error)}") from error
        return {COMPILE: functools.partial(torch_latents, function, self.plan, x, labels, self.dtype)}, seconds

    def _given(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.model is not None
        device = next(self.model.parameters()).device
        return noise_for(0, range(batch), self.model, device), torch.tensor(self.labels(batch), device=device)


def run(report: Reporter, provider: str, scratch: Path) -> None:
    """See the module."""
    sizes = sizes_for(provider)
    on_device = provider == "cpu" or torch.cuda.is_available()
    model = random_teacher(sizes, provider if on_device else "cpu")
    loaded: dict[str, Loaded] = {}
    rate: dict[str, float] = {}  # seconds for every image of a batch that each kind of work has taken
    for work in sizes.work:
        if work.precision not in loaded:
            with report.part(f"{work.precision}, export and load") as found:
                loaded[work.precision] = load(found, model, sizes, scratch / work.precision, work.precision, provider, on_device)
        if work.precision not in loaded:
            continue
        with report.part(f"{work.precision}, batch {work.batch}, {work.what}") as found:
            report.need(max(work.seconds, rate.get(work.what, 0.0) * work.batch), work.extra)
            before = report.left
            do(found, loaded[work.precision], work, provider, sizes.judged)
            rate[work.what] = (before - report.left) / work.batch


def do(found: Findings, loaded: Loaded, work: Work, provider: str, judged: bool) -> None:
    """One piece of work."""
    if work.what == CLOCK:
        measure(found, loaded, work.batch, provider, judged)
    elif work.what == MEMORY:
        found.figures["rows"] = {name: memory_of(folder, provider, work.batch) for name, folder in loaded.folders.items()}
    else:
        against_compile(found, loaded, work.batch, "max-autotune" if work.what == AUTOTUNE else None, judged)


def load(found: Findings, model: Network, sizes: Sizes, scratch: Path, precision: str, provider: str, on_device: bool) -> Loaded:
    """Export and load the three plans, and PyTorch's model in the same precision."""
    plans = random_plans(model, sizes)
    folders = {name: write_artefact(model, plan, scratch / str(j), precision, provider) for j, (name, plan) in enumerate(plans.items())}
    largest = max(work.batch for work in sizes.work)
    samplers = {name: CachedSampler(folder, provider, max_batch=largest) for name, folder in folders.items()}
    samplers[FULL] = CachedSampler(next(iter(folders.values())), provider, max_batch=largest, preload=False)
    dtype = TORCH_TYPES[precision]
    device = torch_device(provider) if on_device else ""
    found.figures |= {"model": sizes.preset, "steps": sizes.steps, "full steps": sizes.full_steps, "device": device_name(provider)}
    found.figures["weights MB"] = (next(iter(folders.values())) / "weights.data").stat().st_size / 1e6
    found.figures["product TFLOP/s"] = product = product_tflops(device, dtype) if device else None
    return Loaded(plans, folders, samplers, copy.deepcopy(model).to(dtype) if device else None, dtype, product)


def measure(found: Findings, loaded: Loaded, batch: int, provider: str, judged: bool) -> None:
    """One precision and batch: every way to make the same images, in turns."""
    requests = loaded.eager(batch) | loaded.cached(batch)
    same_images(found, requests)
    seconds = in_turns(requests, REPEATS, quiet=True)
    rows = {name: _row(loaded, name, spent, seconds[FULL], batch) for name, spent in seconds.items()}
    found.figures |= {"rows": rows, "product TFLOP/s": loaded.product}
    queue = queue_of(loaded.samplers[FULL], loaded.labels(batch), full=True)
    found.figures["host"] = queue._asdict()
    if provider == "cuda":
        for name in loaded.samplers:
            require_on_device(name, requests[name]().receipt, graphs=True)
    if judged and batch >= JUDGED_BATCH:
        for name in loaded.plans:
            limit = EFFICIENCY_SKIP if name == "skip" else EFFICIENCY
            found.at_least(f"efficiency of {name}", rows[name]["efficiency"], limit)
        found.at_most("share of the request in which the host fills the queue", queue.filled / queue.request, QUEUE_SHARE)


def against_compile(found: Findings, loaded: Loaded, batch: int, mode: str | None, judged: bool) -> None:
    """torch.compile and full compute, in turns."""
    request, compiling = loaded.compiled(batch, mode)
    requests = request | {FULL: loaded.cached(batch)[FULL]}
    same_images(found, requests)
    seconds = in_turns(requests, REPEATS, quiet=True)
    rows = {name: _row(loaded, name, spent, seconds[FULL], batch) for name, spent in seconds.items()}
    found.figures |= {"rows": rows, "seconds of compiling": compiling}
    if judged:
        found.at_least("speed of ONNX Runtime over torch.compile's", seconds[COMPILE] / seconds[FULL], 1.0)


def same_images(found: Findings, requests: Requests) -> None:
    """PyTorch and ONNX Runtime must make the same images, or times would mean nothing; without PyTorch, finite ones."""
    latents = requests[FULL]().latents
    torches = [request for name, request in requests.items() if name in (EAGER, COMPILE)]
    found.require(bool(np.isfinite(latents).all()), "latents are not finite")
    for request in torches:
        found.at_most("difference to PyTorch", relative_l2(latents, request().float().numpy()), SAME_IMAGES)


def memory_of(folder: Path, provider: str, batch: int) -> dict[str, float]:
    """Megabytes of a serving process: loaded, idle after a request, at the peak.

    Raises:
        TokenCacheError: with what that process said, if it failed.
    """
    command = [sys.executable, "-m", "export.bench.memory_probe", str(folder), provider, str(batch), str(ROOM)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TokenCacheError(f"measuring memory failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout)


def _row(loaded: Loaded, name: str, seconds: float, full_seconds: float, batch: int) -> dict[str, float]:
    plan = loaded.plans.get(name)
    macs, reference = plan_macs(plan or reference_plan(loaded.plan)), plan_macs(reference_plan(loaded.plan))
    samples = batch * (2 if loaded.plan.guidance.doubles_batch else 1)
    row = {"ms/image": 1e3 * seconds / batch, "TFLOP/s": 2e-12 * samples * macs / seconds, "clock": full_seconds / seconds}
    if plan is None:
        return row
    cache = batch * cache_bytes_per_image(plan, loaded.dtype.itemsize) / 1e6
    return row | {"MACs": reference / macs, "efficiency": row["clock"] * macs / reference, "cache MB": cache}
