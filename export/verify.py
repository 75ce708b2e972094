"""Verify an artefact: hashes, parity with torch, fidelity to full compute, and the baselines that caching has to beat.

    python export/verify.py artefacts/digits
    python export/verify.py artefacts/digits --images 16 --json
    python export/verify.py artefacts/digits --signature key.pub     and that the owner of this key signed it (extra [sign])

The torch reference is rebuilt from the artefact's own weights; nothing else is needed. Exit status: 0 verified, 2 the artefact is
damaged, or not signed by the key that was named, 3 it disagrees with torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from export.command import positive, run
from export.compiler.fidelity import PIXEL_IMAGES, measure, measure_pixels, own_ssim
from export.compiler.parity import prove, require_parity, trajectory_error
from export.compiler.weights import CORRECTOR, SELECTOR, External, read_weights
from export.runtime.layout import DECODER
from export.runtime.manifest import ArtefactError
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from export.signature import verify_signature
from export.torch_device import torch_device
from tc_lightning.diffusion.samplers import SAMPLERS
from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import PlanError, TeacherError
from tc_lightning.measure.psnr import psnr
from tc_lightning.models.companions import Companions
from tc_lightning.models.content_predictor import ContentPredictor, Selector
from tc_lightning.models.corrector import Corrector, ResidualCorrector
from tc_lightning.models.families import build
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs, macs_speedup, plan_macs
from tc_lightning.plan.given import REPORTING, part_for
from tc_lightning.plan.rows_file import read_rows
from tc_lightning.planner.fitted_fewer_steps import fitted_fewer_steps
from tc_lightning.policies.fewer_steps import fewer_steps_plan
from tc_lightning.policies.fora import fora_plan
from tc_lightning.rollout.evaluation import final_latents
from tc_lightning.rollout.sampling import full_plan, given_for, noise_for


def main() -> None:
    """Command line."""
    args = _arguments()
    signed = {} if args.signature is None else {"signed_by": verify_signature(args.artefact, args.signature)}
    if signed and not args.json:
        print(f"signed by the owner of the key {signed['signed_by']}", flush=True)
    report = verify(args.artefact, args.provider, args.images, args.batch, args.seed, args.json, args.device, args.conditions) | signed
    print(json.dumps(report, indent=1) if args.json else _table(report))


def verify(
    path: Path,
    provider: str,
    images: int,
    batch: int,
    seed: int | None,
    quiet: bool = False,
    device: int = 0,
    examples: Path | None = None,
) -> dict[str, Any]:
    """Check an artefact and measure it on fresh seeds.

    Args:
        path: artefact folder.
        provider: provider to run on.
        images: images of the fidelity figures.
        batch: images at a time.
        seed: seed of the images; None draws one.
        quiet: no progress bars.
        device: number of the GPU, on CUDA.
        examples: a .npz file with examples of conditions that cannot be drawn.

    Returns:
        The figures, in plain JSON values.

    Raises:
        ArtefactError: if a file is missing or changed.
        ParityError: if ONNX Runtime and torch disagree.
    """
    sampler = CachedSampler(path, provider=provider, device=device)
    plan = CachePlan.load(path / "plan.json")
    if plan.digest != sampler.manifest["plan_digest"]:
        raise ArtefactError(f"{path / 'plan.json'} is not the plan that the manifest names: export it again.")
    place = torch_device(provider, device)
    model = rebuild_teacher(sampler).to(place)
    model.examples = None if examples is None else read_rows(examples, model.conditions).examples
    companions = rebuild_companions(sampler, plan, model.config).to(place)
    seed = secrets.randbelow(2**31) if seed is None else seed
    checks = prove(model, plan, lower(plan, provider), sampler, min(images, 4), seed=seed + 1, companions=companions)
    require_parity(
        checks, sampler.manifest["precision"], "Do not serve this artefact: export it again, with --precision fp32 if it fails."
    )
    with tqdm(total=images, desc="cached and full", unit="image", disable=quiet) as bar:
        fidelity = measure(sampler, images, min(batch, -(-images // 2)), seed, bar.update, part_for(model.examples, REPORTING))
    seen = measure_pixels(sampler, fidelity, PIXEL_IMAGES)
    rivals = _baselines(plan, model.schedule) | _fitted_baseline(model, plan, quiet)
    baselines = {name: _baseline_psnr(model, rival, fidelity.full, seed, batch, name, quiet) for name, rival in rivals.items()}
    return {
        "artefact": str(path),
        "plan": plan.summary,
        "plan_in_words": plan.in_words,
        "plan_digest": plan.digest,
        "provider": provider,
        "images": images,
        "seed": seed,
        "macs_speedup": macs_speedup(plan),
        "wall_speedup": fidelity.wall_speedup,
        "psnr_db": fidelity.psnr_db,
        "mse": fidelity.mse,
        "rel_l2_export": trajectory_error(checks),
        "cache_bytes_per_image": sampler.manifest["cache_bytes_per_image"],
        "full_ms_per_image": fidelity.full_ms,
        "cached_ms_per_image": fidelity.cached_ms,
        "ssim": own_ssim(fidelity),
        "pixels": None
        if seen is None
        else dataclasses.asdict(seen) | {"decoder_rel_l2": sampler.manifest[DECODER]["parity"]["rel_l2"]},
        "baselines_psnr_db": baselines,
        "beats_baselines": all(fidelity.psnr_db > value for value in baselines.values()),
    }


def rebuild_teacher(sampler: CachedSampler) -> Network:
    """The teacher in torch, from the artefact's weights."""
    said = sampler.manifest["network"]
    try:
        with torch.device("meta"):
            model = build(said["family"], said["config"], said.get("schedule"))
    except TeacherError as error:
        raise ArtefactError(f"{sampler.path}: {error}") from error
    plan = CachePlan.load(sampler.path / "plan.json")
    try:
        plan.require_model(model.signature(plan.model.teacher))
    except PlanError as error:
        raise ArtefactError(f"{sampler.path} describes a network that its plan was not made for: export it again. {error}") from error
    _fill(model, sampler)
    model.nulls = sampler.nulls
    return model


def rebuild_companions(sampler: CachedSampler, plan: CachePlan, config: Any) -> Companions:
    """The networks that an artefact's plan names in torch, from its weights."""
    selector: Selector | None = None
    corrector: Corrector | None = None
    with torch.device("meta"):
        if plan.selector:
            selector = Selector(ContentPredictor(config), plan.selector)
        if plan.corrector:
            corrector = Corrector(ResidualCorrector(config), plan.corrector)
    if selector is not None:
        _fill(selector.predictor, sampler, f"{SELECTOR}.")
    if corrector is not None:
        _fill(corrector.module, sampler, f"{CORRECTOR}.")
    return Companions(selector, corrector)


def _fill(module: nn.Module, sampler: CachedSampler, stem: str = "") -> None:
    """Give a module the weights that the artefact holds under names that begin with `stem`, and freeze it."""
    listed = sampler.manifest["weights"]
    wrong = [name for name, tensor in module.state_dict().items() if listed.get(stem + name, [0, 0])[1] != list(tensor.shape)]
    if wrong:
        raise ArtefactError(f"{sampler.path} lists no weight {stem}{wrong[0]} of the shape that its model has: export it again.")
    index = {name: External(*listed[stem + name]) for name in module.state_dict()}
    tensors = read_weights(sampler.path / "weights.data", index)
    module.load_state_dict({name: tensor.float() for name, tensor in tensors}, assign=True)
    module.eval().requires_grad_(False)


def _baselines(plan: CachePlan, schedule: Schedule) -> dict[str, CachePlan]:
    """What one would do without this package, at the plan's MACs or up to one full step above them: rounding is in their favour."""
    step, budget, table = full_step_macs(plan.model), plan_macs(plan), plan.reference
    baselines = {}
    if table.name in SAMPLERS:  # a table of one's own making is for its own number of steps
        fewer = fewer_steps_plan(plan.model, schedule, table.name, table.spacing, plan.guidance, math.ceil(budget / step) * step, table)
        baselines[f"{table.name}, {fewer.num_steps} steps"] = fewer
    speedup = len(table) * step / (budget + step)
    if speedup > 1.0:  # a plan that saves less than a step leaves nothing to reuse
        fora = fora_plan(plan.model, table, plan.guidance, speedup)
        baselines[f"reuse, {len(fora.full_steps)} of {fora.num_steps} full"] = fora
    return baselines


def _fitted_baseline(model: Network, plan: CachePlan, quiet: bool) -> dict[str, CachePlan]:
    """Fewer steps with a sampler fitted as the plan's own was: the one that the plan names, or one that is fitted now.

    One that was fitted to something else, or is a whole step or more away from the plan in MACs, is no such run. A plan that caches
    nothing is one itself.
    """
    if not plan.caches or plan.reference.stochastic:
        return {}
    cost, known, fit = plan_macs(plan) / full_step_macs(plan.model), plan.fewer_steps, plan.provenance.get("fit")
    if known is not None and abs(len(known) - cost) < 1 and isinstance(fit, dict) and fit.get("target") == "reference":
        fewer = dataclasses.replace(full_plan(plan.model, known, plan.guidance), reference=plan.reference)
    elif 2 <= (steps := math.ceil(cost)) < len(plan.reference):
        fewer = fitted_fewer_steps(model, plan, steps, None if quiet else "fitting fewer steps")
    else:
        return {}
    return {f"fitted, {fewer.num_steps} steps": fewer}


def _baseline_psnr(model: Network, plan: CachePlan, full: np.ndarray, seed: int, batch: int, name: str, quiet: bool) -> float:
    images = range(len(full))
    x_T, given = noise_for(seed, images, model), given_for(seed, images, model, use=REPORTING)
    with tqdm(total=len(full) * plan.num_steps, desc=name, unit="step", disable=quiet) as bar:
        made = final_latents(model, plan, x_T, given, batch=batch, on_step=bar.update)
    return psnr(made.numpy(), full, plan.model.output)


def _table(report: dict[str, Any]) -> str:
    rows = [
        ("macs_speedup", f"{report['macs_speedup']:.3f}", "the reference run's MACs over the plan's"),
        (
            "wall_speedup",
            f"{report['wall_speedup']:.3f}",
            f"{report['full_ms_per_image']:.1f} ms against {report['cached_ms_per_image']:.1f} ms",
        ),
        ("psnr_db", f"{report['psnr_db']:.2f}", f"cached against full, {report['images']} images, seed {report['seed']}"),
        *([] if report["ssim"] is None else [("ssim", f"{report['ssim']:.4f}", "of the same, the model's own output")]),
        *_pixel_rows(report["pixels"]),
        ("rel_l2_export", f"{report['rel_l2_export']:.2e}", "ONNX Runtime against torch, whole trajectory, worst image"),
        ("cache_bytes_per_image", str(report["cache_bytes_per_image"]), ""),
        *((name, f"{value:.2f}", _note(name)) for name, value in report["baselines_psnr_db"].items()),
    ]
    lines = [f"  {name:<26}{value:>12}  {note}" for name, value, note in rows]
    return "\n".join([report["plan"], f"  {report['plan_in_words']}", *lines, *(f"  {line}" for line in _verdict(report))])


def _pixel_rows(seen: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """What a decoder makes of the latents: none of it is PSNR or export error of the model's own output."""
    if seen is None:
        return []
    rows = [("psnr_pixels_db", f"{seen['psnr_db']:.2f}", f"decoded pixels, cached against full, {seen['images']} images")]
    if seen["ssim"] is not None:
        rows.append(("ssim_pixels", f"{seen['ssim']:.4f}", "of the same"))
    return [*rows, ("rel_l2_decoder", f"{seen['decoder_rel_l2']:.2e}", "decoder.onnx against torch, when it was exported")]


def _note(baseline: str) -> str:
    return (
        "dB at the same MACs, to a whole step; sampler fitted, no cache"
        if baseline.startswith("fitted")
        else "dB at the same MACs, rounded up"
    )


def _verdict(report: dict[str, Any]) -> list[str]:
    """Whether the plan beats what one would do without it, and by how much its no-cache twin."""
    lines = ["the plan beats its baselines" if report["beats_baselines"] else "the plan does NOT beat its baselines"]
    for name, value in report["baselines_psnr_db"].items():
        if name.startswith("fitted"):
            apart = report["psnr_db"] - value
            which = "the cache is the better one" if apart > 0 else "no cache is the better one (plan with --no-cache)"
            lines.append(f"beside {name} and no cache: {which}, by {abs(apart):.1f} dB")
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path, help="artefact folder")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else on standard output")
    parser.add_argument("--images", type=positive, default=64)
    parser.add_argument("--batch", type=positive, default=16, help="images at a time")
    parser.add_argument("--seed", type=int, help="seed of the images (default: a fresh one)")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU, with --provider cuda")
    parser.add_argument("--signature", type=Path, help="public key, PEM: refuse an artefact that its owner has not signed as it is")
    parser.add_argument("--conditions", type=Path, help="a .npz file with examples of conditions: the last of every four rows serve")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
