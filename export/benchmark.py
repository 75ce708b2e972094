"""What plans save on the clock, measured on this machine in one run.

    python export/benchmark.py                                        DiT-S/2 with random weights, 256 tokens, batch 2
    python export/benchmark.py --presets DiT-S/2 DiT-B/2 --json benchmark.json
    python export/benchmark.py --presets DiT-XL/2 --batch 1 8 32 --precision fp16 bf16 --provider cuda
    python export/benchmark.py --presets PixArt-XL/2 --depth 8        8 blocks of a PixArt at its 1,024 tokens, with a text
    python export/benchmark.py --run runs/digits/version_0            your teacher and your plan

All rows make the same images from the same noise: PyTorch as it is and through torch.compile, ONNX Runtime with full compute, ONNX
Runtime with each plan. Full compute is the first plan's reference. Requests run in turns, several times, and the median counts.
Efficiency is the speed-up on the clock over that in MACs, both against ONNX Runtime with full compute: 1 means that every
multiplication saved is time saved. On CUDA memory is that of the GPU, and a node on another provider, or a step that no CUDA graph
replayed, is an error.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from export.bench.benchmark_report import BenchmarkRow, table
from export.bench.plans import benchmark_plans
from export.bench.shapes import RELEASED, random_network
from export.bench.timing import (
    TORCH_TYPES,
    asked_in_torch,
    compiled,
    in_turns,
    operator_ms,
    product_tflops,
    require_on_device,
    torch_latents,
)
from export.command import positive, run
from export.compiler.compile import write_unproved
from export.compiler.parity import relative_l2
from export.runtime.manifest import write_manifest
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import TokenCacheError, first_line
from tc_lightning.models.checkpoints import load_teacher
from tc_lightning.models.companions import companions_for
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import cache_bytes_per_image, plan_macs
from tc_lightning.plan.given import Arrays, drawn
from tc_lightning.rollout.sampling import model_signature, noise_for, reference_plan
from tc_lightning.runs.folder import read_run

EAGER, COMPILED, FULL = "PyTorch", "torch.compile", "ONNX Runtime, full"
NO_DIGEST = "0" * 64  # random weights need no name


@dataclasses.dataclass(frozen=True)
class BenchedArtefact:
    """A plan's artefact in a temporary folder, loaded, and the seconds that both took."""

    plan: CachePlan
    folder: Path
    sampler: CachedSampler
    export_s: float
    load_s: float


def main() -> None:
    """Command line."""
    args = _arguments()
    reports = []
    for name, model, plans in _subjects(args):
        for precision in args.precision:
            for batch in args.batch:
                reports.append(benchmark(name, model, plans, batch, precision, args))
                print(table(reports[-1]), flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


def benchmark(
    name: str, model: Network, plans: dict[str, CachePlan], batch: int, precision: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure one model at one batch size and precision; plain JSON values."""
    with tempfile.TemporaryDirectory() as folder:
        exported = {n: _export(model, plan, Path(folder) / str(j), precision, args) for j, (n, plan) in enumerate(plans.items())}
        first = next(iter(exported.values()))
        given = drawn(model.conditions, 0, range(batch), model.examples)
        requests: dict[str, Callable[[], Any]] = {}
        on_gpu = args.provider == "cuda"
        if not args.no_torch:
            requests |= _torch_requests(model, first.plan, given, precision, args.provider)
        requests[FULL] = functools.partial(first.sampler.sample, conditions=given, full=True)
        requests |= {n: functools.partial(e.sampler.sample, conditions=given) for n, e in exported.items()}
        rel_l2 = _agreement(requests)
        seconds = in_turns(requests, args.repeats)
        receipts = {n: request().receipt for n, request in requests.items() if n in (FULL, *exported)} if on_gpu else {}
        for n, receipt in receipts.items():
            require_on_device(n, receipt, graphs=not args.no_cuda_graphs)
        memory = {n: _memory(e.folder, args.provider, batch, args.memory) for n, e in exported.items()}
        weights_mb = (first.folder / "weights.data").stat().st_size / 1e6
        return {
            "model": name,
            "tokens": first.plan.model.tokens,
            "batch": batch,
            "provider": args.provider,
            "device": _device(args.provider),
            "precision": precision,
            "steps": len(first.plan.reference),
            "repeats": args.repeats,
            "weights_mb": weights_mb,
            "product_tflops": product_tflops(_torch_device(args.provider), TORCH_TYPES[precision]),
            "rel_l2_to_torch": rel_l2,
            "cuda_graphs": {n: receipt["cuda_graphs"] for n, receipt in receipts.items()} or None,
            "nodes_per_provider": {n: receipt["nodes_per_provider"] for n, receipt in receipts.items()} or None,
            "rows": [dataclasses.asdict(row) for row in _rows(exported, seconds, memory, batch)],
            "operators_ms": _operators(exported, given, args.provider, args.memory) if args.operators else None,
            "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        }


def _subjects(args: argparse.Namespace) -> Iterator[tuple[str, Network, dict[str, CachePlan]]]:
    """Name, model and plans of each thing to measure."""
    if args.run is not None:
        info = read_run(args.run)
        plans = {"plan": CachePlan.load(info.plan)} | {path.stem: CachePlan.load(path) for path in args.plan}
        model = load_teacher(info.teacher)
        for plan in plans.values():
            plan.require_model(model_signature(model, info.teacher_digest))
        yield info.name, model, plans
        return
    for name in args.presets:
        model = random_network(name, args.input_size, args.depth)
        yield (
            name,
            model,
            benchmark_plans(model_signature(model, NO_DIGEST), make_sampler(model.schedule, "ddim", args.steps), args.full_steps),
        )


def _export(model: Network, plan: CachePlan, folder: Path, precision: str, args: argparse.Namespace) -> BenchedArtefact:
    """Write and load an artefact without the proof, which would take longer than the benchmark."""
    folder.mkdir()
    files = read_run(args.run).companions if args.run else (None, None)
    companions = companions_for(plan, *files, model.config)
    started = time.perf_counter()
    lowered = lower(plan, args.provider)
    write_manifest(folder, write_unproved(model, plan, lowered, folder, precision, companions))
    written = time.perf_counter()
    graphs = not args.no_cuda_graphs
    sampler = CachedSampler(folder, args.provider, args.threads, max(args.batch), memory=args.memory, cuda_graphs=graphs)
    return BenchedArtefact(plan, folder, sampler, written - started, time.perf_counter() - written)


def _torch_requests(model: Network, plan: CachePlan, given: Arrays, precision: str, provider: str) -> dict[str, Callable[[], object]]:
    device, dtype = _torch_device(provider), TORCH_TYPES[precision]
    model = copy.deepcopy(model).to(device, dtype)
    asked = asked_in_torch(model, plan, given, device, dtype)
    x = noise_for(0, range(asked.images), model, device)
    requests: dict[str, Callable[[], object]] = {EAGER: lambda: torch_latents(model.eps, plan, x, asked, dtype)}
    rows = asked.with_nulls(model.conditions, None) if plan.guidance.doubles_batch else asked
    try:
        function, seconds = compiled(model, x.to(dtype).repeat(rows.images // asked.images, 1, 1, 1), rows)
    except Exception as error:  # no compiler on this machine, or one that fails: the other rows are worth having
        print(f"{COMPILED} is left out, it failed: {first_line(error)}", file=sys.stderr)
    else:
        print(f"{COMPILED} took {seconds:.0f} s to compile")
        requests[COMPILED] = lambda: torch_latents(function, plan, x, asked, dtype)
    return requests


def _agreement(requests: dict[str, Callable[[], Any]]) -> float | None:
    """Relative L2 distance of the images of PyTorch and of ONNX Runtime with full compute; None without PyTorch.

    Raises:
        TokenCacheError: if they are not the same images: times of something else would mean nothing.
    """
    if EAGER not in requests:
        return None
    distance = relative_l2(requests[FULL]().latents, requests[EAGER]().float().numpy())
    if not distance < 0.5:
        raise TokenCacheError(f"PyTorch and ONNX Runtime make different images (relative L2 {distance:.2g}): try --precision fp32.")
    return distance


def _rows(
    exported: dict[str, BenchedArtefact], seconds: dict[str, float], memory: dict[str, dict[str, float]], batch: int
) -> Iterator[BenchmarkRow]:
    any_plan = next(iter(exported.values())).plan
    samples = batch * (2 if any_plan.guidance.doubles_batch else 1)
    full_macs = plan_macs(reference_plan(any_plan))
    full_tflop = 2e-12 * samples * full_macs
    for name in (EAGER, COMPILED, FULL):
        if name in seconds:
            wall = seconds[FULL] / seconds[name]
            yield BenchmarkRow(name, 1e3 * seconds[name] / batch, full_tflop / seconds[name], 1.0, wall)
    for name, e in exported.items():
        wall, macs = seconds[FULL] / seconds[name], full_macs / plan_macs(e.plan)
        per_value = 4 if e.sampler.manifest["precision"] == "fp32" else 2
        yield BenchmarkRow(
            name,
            1e3 * seconds[name] / batch,
            full_tflop / macs / seconds[name],
            macs,
            wall,
            wall / macs,
            cache_mb=batch * cache_bytes_per_image(e.plan, per_value) / 1e6,
            export_s=e.export_s,
            load_s=e.load_s,
            **memory[name],
        )


def _memory(folder: Path, provider: str, batch: int, room: float) -> dict[str, float]:
    command = [sys.executable, "-m", "export.bench.memory_probe", str(folder.resolve()), provider, str(batch), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TokenCacheError(f"measuring memory failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout)


def _operators(
    exported: dict[str, BenchedArtefact], given: Arrays, provider: str, room: float
) -> dict[str, dict[str, dict[str, float]]]:
    found = {}
    for name, e in exported.items():
        batch, profile = len(next(iter(given.values()))), e.folder.parent / "profile"
        sampler = CachedSampler(e.folder, provider, max_batch=batch, memory=room, cuda_graphs=False, profile=profile)
        sampler.sample(conditions=given)
        found[name] = operator_ms(sampler)
    return found


def _torch_device(provider: str) -> str:
    return "cuda" if provider == "cuda" else "cpu"


def _device(provider: str) -> str:
    return torch.cuda.get_device_name() if provider == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = f"shapes with random weights: DiT-{{S,B,L,XL}}/{{2,4,8}}, {', '.join(RELEASED)}"
    parser.add_argument("--presets", nargs="+", default=["DiT-S/2"], help=shapes)
    parser.add_argument("--input-size", type=positive, help="side of the latents, if not the shape's own (DiT: 32, 256 tokens)")
    parser.add_argument("--depth", type=positive, help="blocks in place of the shape's (presets)")
    parser.add_argument("--run", type=Path, help="measure this run's teacher and plan instead of presets")
    parser.add_argument("--plan", type=Path, nargs="+", default=[], help="further plans for the run's teacher")
    parser.add_argument("--steps", type=positive, default=50, help="sampling steps (presets)")
    parser.add_argument("--full-steps", type=positive, default=18, help="how many of them compute everything (presets)")
    parser.add_argument("--batch", type=positive, nargs="+", default=[2], help="images at a time; guidance doubles them")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "fp16", "bf16"), default=["fp32"])
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive, help="threads of ONNX Runtime on the CPU (default: its own choice)")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds that are timed; their median counts")
    parser.add_argument("--memory", type=float, default=1.25, help="room for weights, as a multiple of their size: see CachedSampler")
    parser.add_argument("--no-torch", action="store_true", help="leave out PyTorch and torch.compile")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="on CUDA: start every operator from the host")
    parser.add_argument("--operators", action="store_true", help="profile each program and list where its time goes")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
