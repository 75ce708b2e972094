"""What a fleet would do, on paper and by simulation. Nothing here is measured, and no GPU is needed.

    python export/fleet.py paper                                        images an H100-hour of released shapes, at 2x, 3x and 4x
    python export/fleet.py paper --share 0.3 --plan artefacts/digits    at another share of the peak, and of your plan
    python export/fleet.py queue --fixed-ms 900 --each-ms 100           one server, with dynamic batching and without
    python export/fleet.py queue --measured benchmark.json --row skip --mix cached:0.9 full:0.1:2.7

`queue` lets rows come at random (Poisson) to a server whose batches of b rows take fixed + b * each. Rows of one kind of --mix may
share a batch (labels or prompts of one artefact); those of NAME:SHARE:WORK take WORK times as long. Both print tables in Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from export.bench.fleet.figures import FEWEST, SETTLING, queue_table
from export.bench.fleet.load import Kind, mean_work, require_mixture
from export.bench.fleet.measured import measured_line
from export.bench.fleet.paper import ASSUMED_SHARE, H100_TFLOPS, RELEASED, Gpu, Shape, images_an_hour, paper_table, rounded
from export.bench.fleet.server import Server
from export.command import positive, run
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs, macs_speedup

LOADS = (0.5, 0.9, 1.5, 4.0)  # of what the server does without batching


def main() -> None:
    """Command line."""
    args = _arguments()
    print(_paper(args) if args.what == "paper" else _queue(args))


def _paper(args: argparse.Namespace) -> str:
    gpu = Gpu(args.peak_tflops, args.share)
    plans = [CachePlan.load(path / "plan.json" if path.is_dir() else path) for path in args.plan]
    own = [] if args.gmacs is None else [Shape("yours", args.gmacs * 1e9, 50)]
    shapes = [*RELEASED, *own]
    if args.steps is not None:
        shapes = [dataclasses.replace(shape, steps=args.steps) for shape in shapes]
    if args.no_guidance:
        shapes = [dataclasses.replace(shape, doubled=False) for shape in shapes]
    planned = [(_shape_of(plan), macs_speedup(plan)) for plan in plans]
    shapes += [shape for shape, _ in planned]
    said = (
        f"Images a GPU-hour on paper: a peak of {gpu.peak_tflops:g} TFLOP/s, of which {gpu.share:.0%} is assumed to be reached. The "
        "network alone: no encoder, no decoder, no waiting."
    )
    lines = [f"{shape.name}, as planned, {speed:.2f}x: {rounded(images_an_hour(shape, gpu, speed))}" for shape, speed in planned]
    return "\n".join([said, "", paper_table(shapes, gpu, args.speedup), *(["", *lines] if lines else [])])


def _shape_of(plan: CachePlan) -> Shape:
    """What a plan is compared with: full compute with the steps and the guidance of its reference."""
    name = f"{plan.model.family}, {plan.model.tokens} tokens"
    return Shape(name, full_step_macs(plan.model), len(plan.reference), plan.guidance.doubles_batch)


def _queue(args: argparse.Namespace) -> str:
    fixed_s, each_s = _seconds(args)
    kinds = [Kind.parse(text) for text in args.mix]
    require_mixture(kinds)
    batching = Server(fixed_s, each_s, args.max_batch, args.batch_timeout_ms / 1e3, args.queue)
    alone = dataclasses.replace(batching, max_batch=1)
    most = 1 / (alone.seconds(1) * mean_work(kinds))
    said = (
        f"By simulation: {args.rows} rows of {', '.join(args.mix)}, seed {args.seed}. A batch of b rows takes {fixed_s:.3g} s "
        f"+ b * {each_s:.3g} s; on a free server a row waits {args.batch_timeout_ms:g} ms for others; {args.queue} rows may wait. "
        f"Without batching it does {most:.3g} rows a second. The first {SETTLING:.0%} of the time are left out."
    )
    rates = args.rates or [load * most for load in LOADS]
    servers = [alone, batching] if args.max_batch > 1 else [alone]
    return "\n".join([said, "", queue_table(servers, kinds, rates, args.rows, args.seed)])


def _seconds(args: argparse.Namespace) -> tuple[float, float]:
    given = [value for value in (args.fixed_ms, args.each_ms) if value is not None]
    if args.measured is not None and not given:
        return measured_line(args.measured, args.row)
    if args.measured is None and len(given) == 2:
        return args.fixed_ms / 1e3, args.each_ms / 1e3
    raise TokenCacheError("how long does a batch take? Give --fixed-ms and --each-ms, or --measured FILE, and not both.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    paper = commands.add_parser("paper", help="images a GPU-hour")
    paper.add_argument("--speedup", type=float, nargs="+", default=[2.0, 3.0, 4.0], help="MACs of full compute over a plan's")
    paper.add_argument("--peak-tflops", type=float, default=H100_TFLOPS, help="of the GPU (default: H100 SXM, bf16, dense)")
    paper.add_argument("--share", type=float, default=ASSUMED_SHARE, help="of the peak that is reached (the default is an assumption)")
    paper.add_argument("--steps", type=positive, help="sampling steps (default: as are usual for each shape)")
    paper.add_argument("--no-guidance", action="store_true", help="one sample a step, not two")
    paper.add_argument("--gmacs", type=float, help="of a full step of a network of your own, for one sample; 50 steps")
    paper.add_argument("--plan", type=Path, nargs="+", default=[], help="plan.json or artefacts: of their networks, and as planned")
    queue = commands.add_parser("queue", help="a server under load")
    queue.add_argument("--fixed-ms", type=float, help="milliseconds of a batch, however many rows it has")
    queue.add_argument("--each-ms", type=float, help="milliseconds that each row adds")
    queue.add_argument("--measured", type=Path, help="what `export/benchmark.py --json` wrote, of several --batch, instead of the two")
    queue.add_argument("--row", default="ONNX Runtime, full", help="with --measured: which row (default: full compute)")
    queue.add_argument("--mix", nargs="+", default=["artefact"], help="kinds that share no batch: NAME, NAME:SHARE or NAME:SHARE:WORK")
    queue.add_argument("--rates", type=float, nargs="+", help="rows a second (default: 0.5 to 4 times what is done without batching)")
    queue.add_argument("--max-batch", type=positive, default=16)
    queue.add_argument("--batch-timeout-ms", type=float, default=5.0, help="what a row waits for others on a free server")
    queue.add_argument("--queue", type=positive, default=256, help="rows that may wait; others are refused")
    queue.add_argument("--rows", type=positive, default=50_000, help=f"that ask at each rate, {FEWEST} at least")
    queue.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
