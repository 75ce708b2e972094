"""The planner on its own, for a run that is finished.

    python -m tc_lightning plan --run runs/digits/version_0 --target-speedup 3
    python -m tc_lightning plan --run runs/digits/version_0 --target ode --front 2 3 4
    python -m tc_lightning plan --run runs/digits/version_0 --clock cpu --batch 8      budgets in time on this machine, not in MACs
    python -m tc_lightning plan --run runs/digits/version_0 --clock cpu --target-ms 30     the same, in milliseconds an image

Writes the run's front/ (the best plan of every budget) and makes the plan for --target-speedup the run's own plan.json, which
`python export/to_onnx.py` exports. Interrupted? The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from pathlib import Path

from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from export.bench.clock import ProgramClock
from tc_lightning.errors import PlanError, RunError
from tc_lightning.measure.psnr import psnr_db
from tc_lightning.measure.scores import sampler_digest
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.planner.finalists import CACHE_USES
from tc_lightning.planner.front import write_front
from tc_lightning.planner.policy import TARGETS, PlannerPolicy
from tc_lightning.planner.price import ClockPrice, SharedPrice
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.choice import FOLDER, PlanChoice
from tc_lightning.rollout.ranks import Ranks
from tc_lightning.runs.candidates import write_candidates
from tc_lightning.runs.folder import find_run, read_run
from tc_lightning.runs.loaded import LoadedRun, load_run


def main(arguments: list[str]) -> None:
    """Plan for a finished run, on every device asked for; exit status 130 if interrupted, which loses nothing."""
    try:
        _plan(_parse(arguments))
    except KeyboardInterrupt as error:
        print("interrupted: the plan is as it was, and the same command goes on where this one stopped", file=sys.stderr)
        raise SystemExit(130) from error


def _plan(args: argparse.Namespace) -> None:
    loaded = load_run(read_run(args.run or find_run(Path("runs"))))  # what is wrong is told before there are several processes
    if loaded.scores.sampler != sampler_digest(loaded.plan.reference):
        raise RunError(f"{loaded.run.scores} has scores of other steps than the run that {loaded.run.plan} replaces: fit again.")
    policy = policy_of(args, args.target_speedup)
    if args.target_ms is None:
        policy.check(loaded.plan.model, loaded.plan.reference)
    fabric = fabric_of(args.devices)
    fabric.launch()
    context = context_of(loaded, fabric)
    if args.clock is not None:
        policy = timed(args, loaded, context.ranks, fabric)
    choice = policy.plan(context)
    if fabric.is_global_zero:
        write(choice, loaded, keep_plan=args.keep_plan)


def policy_of(args: argparse.Namespace, speedup: float) -> PlannerPolicy:
    """The planner that was asked for."""
    return PlannerPolicy(
        speedup,
        args.target,
        tuple(args.front),
        args.evaluations,
        args.front_evaluations,
        "none" if args.no_cache else args.cache,
        args.fit_images,
        args.judge_images,
        args.choice_images,
        args.final_images,
        args.pool_images,
        args.refinements,
        forecast_weights=args.forecast_weights,
    )


def fabric_of(devices: str) -> Fabric:
    """The devices that were asked for.

    Raises:
        RunError: if they are none, or are not there.
    """
    try:
        return Fabric(accelerator="auto", devices=devices)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise RunError(f"--devices {devices} cannot be used here: {error}") from error


def timed(args: argparse.Namespace, loaded: LoadedRun, ranks: Ranks, fabric: Fabric) -> PlannerPolicy:
    """The planner with budgets in time, which the first process measures for all."""
    clock, plan = clock_price(loaded, args.clock, args.batch), loaded.plan
    price, speedup = SharedPrice(clock, ranks, fabric.device), args.target_speedup
    if args.target_ms is not None:
        full_ms = price.of(lambda: clock.reference_ms(plan))
        speedup, most = full_ms / args.target_ms, len(plan.reference) / 2
        if not 1.0 < speedup <= most:
            raise RunError(
                f"--target-ms {args.target_ms:g}: the full-compute run takes {full_ms:.3g} ms an image here; ask for less than that, "
                f"and for {full_ms / most:.3g} or more, which pay for two full steps."
            )
    policy = policy_of(args, speedup)
    policy.check(plan.model, plan.reference)
    policy.price = price
    return policy


def context_of(loaded: LoadedRun, fabric: Fabric) -> PlanningContext:
    """What the planner looks at, of a run; images are split over the processes of `fabric`."""
    plan, folder, scores = loaded.plan, loaded.run.folder / FOLDER, loaded.scores
    folder.mkdir(parents=True, exist_ok=True)
    ranks = Ranks(fabric.global_rank, fabric.world_size, lambda values: fabric.all_reduce(values, reduce_op="sum"))  # type: ignore[return-value, arg-type]
    model = loaded.model.to(fabric.device)
    subject = plan.model, model.schedule, plan.reference, plan.guidance, scores, plan.reference
    return PlanningContext(*subject, _no_judge, model=model, ranks=ranks, folder=folder)


def _no_judge(plan: CachePlan, images: int | None) -> float:
    """The planner judges plans by runs of its own."""
    raise PlanError("plans are judged by the planner itself here.")


def clock_price(loaded: LoadedRun, provider: str, batch: int) -> ClockPrice:
    """Prices measured on this machine."""
    return ClockPrice(ProgramClock(loaded.model, provider, batch, companions=loaded.companions))


def write(choice: PlanChoice, loaded: LoadedRun, keep_plan: bool) -> None:
    """Write the front, and the chosen plan unless it is only looked for; say what was found."""
    folder = loaded.run.folder
    write_front(choice.front, folder, loaded.plan if keep_plan else choice.plan)
    write_candidates(choice.candidates, folder / FOLDER / "candidates.csv")
    if not keep_plan:
        choice.plan.save(loaded.run.plan)
    for point in choice.front:
        print(
            f"{macs_speedup(point.plan):.2f}x fewer MACs: {psnr_db(point.mse):.1f} dB to the {point.target} run, {point.plan.summary}"
        )
    where = folder / FOLDER if keep_plan else loaded.run.plan
    print(f"wrote {where}\nnext: python export/to_onnx.py --run {folder}")


def _default(argument: str) -> int:
    """What the planner takes where nothing is said."""
    return int(inspect.signature(PlannerPolicy).parameters[argument].default)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder (default: the newest under runs/)")
    parser.add_argument("--target-speedup", type=float, default=2.5, help="of the chosen plan, against the full-compute run")
    parser.add_argument("--target", choices=TARGETS, default="reference", help="what images are to come near to")
    parser.add_argument("--front", type=float, nargs="*", default=[2.0, 3.0, 4.0], help="further speed-ups to plan for")
    parser.add_argument("--clock", choices=("cpu", "cuda"), help="budgets in time on this provider, instead of MACs")
    parser.add_argument("--target-ms", type=float, help="with --clock: milliseconds an image, instead of --target-speedup")
    parser.add_argument("--batch", type=int, default=8, help="with --clock: images at a time")
    parser.add_argument("--evaluations", type=int, default=_default("evaluations"), help="plans with P-steps tried for the target")
    parser.add_argument(
        "--front-evaluations",
        type=int,
        default=_default("front_evaluations"),
        help="plans with P-steps tried for each further speed-up",
    )
    use = parser.add_mutually_exclusive_group()
    use.add_argument("--cache", choices=CACHE_USES, default="auto", help="auto: with or without one; keep: with; none: without")
    use.add_argument("--no-cache", action="store_true", help="as --cache none: fewer steps with a fitted sampler, the quickest to plan")
    parser.add_argument("--fit-images", type=int, default=_default("fit_images"), help="images that samplers are fitted on")
    parser.add_argument(
        "--judge-images", type=int, default=_default("judge_images"), help="images that plans are compared on while searching"
    )
    parser.add_argument(
        "--choice-images", type=int, default=_default("choice_images"), help="images that the refined plans are compared on"
    )
    parser.add_argument(
        "--final-images", type=int, default=_default("final_images"), help="images that the plans found are measured on"
    )
    parser.add_argument(
        "--pool-images", type=int, default=_default("pool_images"), help="images of which the hardest are planned on (0: as they come)"
    )
    parser.add_argument(
        "--refinements", type=int, default=_default("refinements"), help="steps of Gauss-Newton on the samplers of the best plans"
    )
    parser.add_argument("--forecast-weights", action="store_true", help="refine the weights of forecasts too, beside the samplers")
    parser.add_argument("--devices", default="auto", help="devices to use (default: all GPUs, or one CPU process)")
    parser.add_argument("--keep-plan", action="store_true", help="write the front only, and leave plan.json as it is")
    args = parser.parse_args(arguments)
    if args.target_ms is not None and (args.clock is None or not 0 < args.target_ms < math.inf):
        raise RunError(f"--target-ms {args.target_ms:g} needs --clock, and must be above 0.")
    if args.batch < 1:
        raise RunError(f"--batch is {args.batch}: give 1 or more.")
    return args
