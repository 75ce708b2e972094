"""A router that Learning-to-Cache released, as a plan for a teacher of yours.

    python -m tc_lightning import-router DDIM50_router.pt --teacher DiT-XL-2-256x256.pt --preset DiT-XL/2 --out plan.json
    python -m tc_lightning import-router DDIM50_router.pt --run runs/dit_xl2_256/version_0 --out plan.json

With --run, teacher, sampler and guidance are those of the run that its plan replaces; `python export/to_onnx.py --run RUN --plan
plan.json` exports what was imported. Without, the sampler has as many steps as the router. The file is read as plain tensors, and
refused if it was made for another number of steps or blocks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import RunError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.released_routers import ReleasedRouter, imported_plan, macs_share, read_router
from tc_lightning.rollout.sampling import model_signature
from tc_lightning.runs.folder import read_run


def main(arguments: list[str]) -> None:
    """Import; what is wrong with the file is told before a teacher is loaded."""
    args = _parse(arguments)
    router = read_router(args.router)
    signature, sampler, guidance = _of_run(args.run) if args.run else _of_teacher(args, len(router.weight_TL2))
    plan = imported_plan(router, signature, sampler, guidance, args.threshold)
    plan.save(args.out)
    print("\n".join(described(plan, router, args)))


def described(plan: CachePlan, router: ReleasedRouter, args: argparse.Namespace) -> list[str]:
    """What was imported, in the figures by which releases are described."""
    reused_TL2 = router.reused_TL2(args.threshold)[1::2]
    attn, mlp = ((~reused_TL2[:, :, b]).sum() for b in (0, 1))
    each, where = reused_TL2[:, :, 0].size, f"--run {args.run} " if args.run else ""
    return [
        f"{router.name}: of its {len(reused_TL2)} steps that reuse, {attn} of {each} attentions and {mlp} of {each} MLPs are computed, "
        f"{reused_TL2.mean():.2%} come from the cache ({reused_TL2.mean() / 2:.2%} of all steps)",
        f"MACs {macs_share(plan):.4f} of full compute, {macs_speedup(plan):.3f} times fewer: {plan.summary}",
        f"wrote {args.out}",
        f"next: python export/to_onnx.py {where}--plan {args.out}",
    ]


def _of_run(folder: Path) -> tuple[ModelSignature, SamplerTable, Guidance]:
    """What the plan of a run was made for, without its teacher."""
    plan = CachePlan.load(read_run(folder).plan)
    return plan.model, plan.reference, plan.guidance


def _of_teacher(args: argparse.Namespace, num_steps: int) -> tuple[ModelSignature, SamplerTable, Guidance]:
    model = load_teacher(TeacherSpec(args.teacher, args.preset, input_size=args.input_size))
    channels = model.config.in_channels
    if not 1 <= (guided := channels if args.guidance_channels is None else args.guidance_channels) <= channels:
        raise RunError(f"--guidance-channels {guided}: the teacher has {channels}, choose 1 to {channels}.")
    sampler = make_sampler(model.schedule, args.sampler, num_steps, args.spacing or model.schedule.spacings[0])
    return model_signature(model), sampler, Guidance(args.guidance_scale, guided)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tc_lightning import-router", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("router", type=Path, help="the file, for example DDIM50_router.pt")
    parser.add_argument("--out", type=Path, required=True, help="the plan that is written")
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="branches above it are computed (default: 0.1, as released for DiT)"
    )
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--run", type=Path, help="run folder, whose teacher, sampler and guidance are taken")
    of.add_argument("--teacher", help="weights of the teacher: a file or a folder in diffusers' layout")
    parser.add_argument("--preset", help="with --teacher: its shape, for example DiT-XL/2, where the file does not tell it")
    parser.add_argument("--input-size", type=int, help="with --teacher: height and width of its latents, where they are not 32")
    parser.add_argument("--sampler", default="ddim", help="with --teacher: the sampler (default: ddim)")
    parser.add_argument("--spacing", help="with --teacher: spacing of its steps (default: the schedule's first, uniform for DiT)")
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="with --teacher: scale of guidance (default: 1.5)")
    parser.add_argument("--guidance-channels", type=int, help="with --teacher: guided channels (default: all; the release of DiT: 3)")
    return parser.parse_args(arguments)
