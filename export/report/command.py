"""Compare a run's plan with every alternative, as a folder that opens in a browser without a server.

    python -m tc_lightning report --run runs/digits/version_0         writes RUN/report/index.html
    python -m tc_lightning report --run RUN --images 256 --budgets 2 3 4 --out /tmp/report

Every plan (the run's, the planner's front, published methods and fewer steps at each budget) is exported, proved against torch on an
image, and timed in turns while it makes the images that are compared with the reference run and with the converged ODE.

Exit status: 0 written; 2 an error in what was given; 130 interrupted, and an older report is as it was.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from export import command
from export.folders import replacing_folder
from export.report.build import NOTICE, ReportSettings, build_report
from export.torch_device import torch_device
from tc_lightning.errors import TokenCacheError
from tc_lightning.policies.base import Policy
from tc_lightning.policies.registry import standard_policies
from tc_lightning.runs.folder import find_run, read_run
from tc_lightning.runs.loaded import load_run

SEED = 6_180_339_887  # far from the seeds that people choose for training
DEFAULT_IMAGES, DEFAULT_BATCH, DEFAULT_FRONT = 16, 8, 9


def main(args: list[str]) -> None:
    """Command line; see `export.command.run` for exit statuses."""
    command.run(lambda: _report(args))


def _report(args: list[str]) -> None:
    given = _parse(args)
    run = read_run(given.run or find_run(Path("runs")))
    out = given.out or run.folder / "report"
    _require_replaceable(out)
    settings = ReportSettings(
        budgets=tuple(sorted(set(given.budgets))),
        images=given.images,
        batch=min(given.batch, given.images),
        seed=given.seed,
        most=given.front,
        precision=given.precision,
        provider=given.provider,
        real=given.real,
        inception=given.inception,
        pixels=not given.no_pixels,
        command=shlex.join(["python", "-m", "tc_lightning", "report", *args]),
    )
    _chosen(given.policies, settings.budgets[0])  # a wrong name is told before anything takes time
    loaded = load_run(run, torch_device(settings.provider))
    with replacing_folder(out) as folder:
        report = build_report(loaded, settings, lambda budget: _chosen(given.policies, budget), folder)
    print("\n".join([report["headline"], *report["sentences"], f"wrote {out / 'index.html'}"]))


def _chosen(names: list[str] | None, budget: float) -> dict[str, Policy]:
    policies = standard_policies(budget)
    if names is None:
        return policies
    if unknown := sorted(set(names) - set(policies)):
        raise TokenCacheError(f"--policies {', '.join(unknown)}: choose from {', '.join(policies)}.")
    return {name: policies[name] for name in names}


def _require_replaceable(out: Path) -> None:
    """Never put a report in place of something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        if json.loads((out / "report.json").read_text(encoding="utf-8"))["what"] == NOTICE:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise TokenCacheError(f"{out} exists and is not a report: replacing it would lose it. Name another --out.")


def _at_least_two(text: str) -> int:
    if (value := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"{value} is not at least 2")
    return value


def _budget(text: str) -> float:
    if not 1.0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a speed-up above 1")
    return value


def _seed(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**63 - 1:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 to 2**63 - 2")
    return value


def _parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tc_lightning report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="run folder, as printed by `lightning fit` (default: the newest under runs/)")
    parser.add_argument("--out", type=Path, help="folder of the report (default: RUN/report)")
    parser.add_argument(
        "--budgets",
        type=_budget,
        nargs="+",
        default=[2.0, 3.0, 4.0],
        help="speed-ups in MACs (default: 2 3 4); the plan's own is always among them",
    )
    parser.add_argument("--images", type=_at_least_two, default=DEFAULT_IMAGES, help=f"images compared (default: {DEFAULT_IMAGES})")
    parser.add_argument("--batch", type=command.positive, default=DEFAULT_BATCH, help=f"images a request (default: {DEFAULT_BATCH})")
    parser.add_argument("--seed", type=_seed, default=SEED, help="seed of those images; not one that was trained on")
    parser.add_argument("--front", type=command.positive, default=DEFAULT_FRONT, help="plans of the planner's front (default: 9)")
    parser.add_argument("--policies", nargs="+", help="published methods to compare with (default: all)")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument(
        "--provider", choices=("cpu", "cuda"), default="cpu", help="ONNX Runtime's provider; torch uses the same device"
    )
    parser.add_argument("--real", help="module:function that gives real images and classes for a size, to judge by a classifier")
    parser.add_argument("--no-pixels", action="store_true", help="of a pipeline: measure and show latents alone")
    parser.add_argument("--inception", type=Path, help="Inception weights of torch-fidelity, for FID (best with --images 10000)")
    return parser.parse_args(args)
