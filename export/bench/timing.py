"""Timing of requests, side by side: the same images by PyTorch and by ONNX Runtime, in turns, in one process."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from export.runtime.cuda_provider import CUDA
from export.runtime.sampler import CachedSampler
from tc_lightning.diffusion.update import advance, coefficients, guide
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.conditions import Asked, Given, given_of
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.given import Arrays
from tc_lightning.plan.nulls import nulls_needed

Denoiser = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def in_turns(requests: dict[str, Callable[[], object]], repeats: int, quiet: bool = False) -> dict[str, float]:
    """Median seconds of each request over `repeats` rounds, after a round that warms all of them up.

    A round runs every request once, so that whatever else the machine does slows all of them down alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in requests}
    with tqdm(total=(repeats + 1) * len(requests), desc="timing", unit="request", disable=quiet) as bar:
        for turn in range(repeats + 1):
            for name, request in requests.items():
                bar.set_postfix_str(name)
                started = time.perf_counter()
                request()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
                bar.update()
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.inference_mode()
def torch_latents(eps: Denoiser, plan: CachePlan, x_BCHW: Tensor, asked: Asked, dtype: torch.dtype) -> Tensor:
    """Run a plan's reference as one does in PyTorch: the network as a function, guidance and sampler around it, no cache.

    Args:
        eps: (latents, times, conditions) -> eps, in `dtype`.
        plan: gives the reference's sampler, and guidance; its segments are ignored.
        x_BCHW: initial noise, fp32, on the device.
        asked: conditions of each image, and null values that are no numbers.
        dtype: precision of the network; guidance and sampler are in fp32.
    """
    doubled, channels = plan.guidance.doubles_batch, plan.model.in_channels
    given = given_of(plan.model.conditions, asked)
    rows = dict(given.with_nulls(plan.model.conditions, None) if doubled else given)
    past: tuple[Tensor, ...] = ()
    for row in plan.reference.steps:
        x = torch.cat([x_BCHW, x_BCHW]) if doubled else x_BCHW
        e = eps(x.to(dtype), torch.full((len(x),), row.t, device=x.device), rows).float()
        if doubled:
            e = guide(e, plan.guidance.scale, plan.guidance.channels, channels)
        x_BCHW, m = advance(x_BCHW, e, past, coefficients(row))
        past = (m, *past)[: plan.reference.history]
    return x_BCHW.cpu()


def asked_in_torch(model: Network, plan: CachePlan, given: Arrays, device: str, dtype: torch.dtype) -> Given:
    """Conditions on a device, and the null values that the model stores where the plan needs them; numbers in the network's `dtype`."""
    stored = {name: np.repeat(value, len(given[name]), 0) for name, value in (model.nulls or {}).items()}
    parts = (given, stored if nulls_needed(model.conditions, plan.guidance) else {})
    own = ({name: torch.from_numpy(value).to(device) for name, value in part.items()} for part in parts)
    return Given(*({name: value.to(dtype) if value.is_floating_point() else value for name, value in part.items()} for part in own))


def compiled(model: Network, x: Tensor, asked: Asked, mode: str | None = None) -> tuple[Denoiser, float]:
    """`torch.compile` of the network in one of its modes, and the seconds that compiling took.

    Raises:
        RuntimeError: if this machine cannot compile (no C++ compiler, for example).
    """
    torch._dynamo.reset()  # what was compiled before, for other shapes, must not make this one dynamic
    function = torch.compile(model.eps, dynamic=False, mode=mode)
    started = time.perf_counter()
    with torch.inference_mode():
        function(x, torch.zeros(len(x), device=x.device), dict(given_of(model.conditions, asked)))
    return function, time.perf_counter() - started


def require_on_device(name: str, receipt: dict[str, Any], graphs: bool) -> None:
    """A request on CUDA ran there alone and, if `graphs` are wanted, all its steps were replayed from CUDA graphs.

    Raises:
        TokenCacheError: otherwise: its times would be of something else than they are said to be.
    """
    elsewhere = {program: nodes for program, nodes in receipt["nodes_per_provider"].items() if set(nodes) != {CUDA}}
    if elsewhere:
        raise TokenCacheError(f"{name}: nodes ran on other providers than {CUDA}: {elsewhere}. Report it with the plan.")
    counts = receipt["cuda_graphs"]
    if graphs and (counts["captured"] or counts["plain"]):
        raise TokenCacheError(
            f"{name}: {counts['captured'] + counts['plain']} of {sum(receipt['steps_per_program'].values())} steps were not replayed "
            f"from CUDA graphs ({counts['off'] or 'there are too many different ones'}): --no-cuda-graphs measures without any."
        )


def product_tflops(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product here and now: what the arithmetic could reach."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        (a @ b)[0, 0].item()  # waits for the device

    return 2e-12 * size**3 / in_turns({"product": multiply}, repeats=5, quiet=True)["product"]


def operator_ms(sampler: CachedSampler) -> dict[str, dict[str, float]]:
    """Milliseconds of a run of each graph, by operator, largest first, from a sampler that was loaded with `profile`.

    For a graph that programs share it is the mean over their runs.
    """
    table = {}
    for name, path in sampler.end_profiling().items():
        events = json.loads(Path(path).read_text(encoding="utf-8"))
        Path(path).unlink()
        runs = sum(event["name"] == "model_run" for event in events)
        spent: Counter[str] = Counter()
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                spent[event["args"]["op_name"]] += event["dur"]
        table[name] = {op: us / 1e3 / max(runs, 1) for op, us in spent.most_common()}
    return table
