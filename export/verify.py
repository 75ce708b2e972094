"""Verify an artefact: hashes, parity with torch, fidelity to full compute, and the baselines that caching has to beat.

    python export/verify.py artefacts/digits
    python export/verify.py artefacts/digits --images 16 --json

The torch reference is rebuilt from the artefact's own weights; nothing else is needed. Exit status: 0 verified, 2 the artefact is
damaged, 3 it disagrees with torch.
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from export.command import positive, run
from export.fidelity import measure, psnr
from export.manifest import ArtefactError
from export.parity import prove, require_parity, trajectory_error
from export.programs import lower
from export.runtime import CachedSampler
from export.weights import SELECTOR, External, read_weights
from tc_lightning.content_predictor import ContentPredictor, Selector
from tc_lightning.costs import full_step_macs, macs_speedup, plan_macs
from tc_lightning.diffusion.samplers import SAMPLERS
from tc_lightning.models.dit import DiT, DiTConfig
from tc_lightning.plan import CachePlan
from tc_lightning.policies.fewer_steps import fewer_steps_plan
from tc_lightning.policies.fora import fora_plan
from tc_lightning.sampling import noise_for, sample


def main() -> None:
    """Command line."""
    args = _arguments()
    report = verify(args.artefact, args.provider, args.images, args.batch, args.seed, quiet=args.json)
    print(json.dumps(report, indent=1) if args.json else _table(report))


def verify(path: Path, provider: str, images: int, batch: int, seed: int | None, quiet: bool = False) -> dict[str, Any]:
    """Check an artefact and measure it on fresh seeds.

    Args:
        path: artefact folder.
        provider: provider to run on.
        images: images of the fidelity figures.
        batch: images at a time.
        seed: seed of the images; None draws one.
        quiet: no progress bars.

    Returns:
        The figures, in plain JSON values.

    Raises:
        ArtefactError: if a file is missing or changed.
        ParityError: if ONNX Runtime and torch disagree.
    """
    sampler = CachedSampler(path, provider=provider)
    plan = CachePlan.load(path / "plan.json")
    if plan.digest != sampler.manifest["plan_digest"]:
        raise ArtefactError(f"{path / 'plan.json'} is not the plan that the manifest names: export it again.")
    model = rebuild_teacher(sampler)
    seed = secrets.randbelow(2**31) if seed is None else seed
    checks = prove(model, plan, lower(plan), sampler, min(images, 4), seed=seed + 1, selector=rebuild_selector(sampler, plan))
    require_parity(
        checks, sampler.manifest["precision"], "Do not serve this artefact: export it again, with --precision fp32 if it fails."
    )
    with tqdm(total=images, desc="cached and full", unit="image", disable=quiet) as bar:
        fidelity = measure(sampler, images, min(batch, -(-images // 2)), seed, on_batch=bar.update)
    baselines = {
        name: _baseline_psnr(model, baseline, fidelity.full, seed, batch, name, quiet) for name, baseline in _baselines(plan).items()
    }
    return {
        "artefact": str(path),
        "plan": plan.summary,
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
        "baselines_psnr_db": baselines,
        "beats_baselines": all(fidelity.psnr_db > value for value in baselines.values()),
    }


def rebuild_teacher(sampler: CachedSampler) -> DiT:
    """The teacher in torch, from the artefact's weights."""
    with torch.device("meta"):
        model = DiT(DiTConfig(**sampler.manifest["dit_config"]))
    _fill(model, sampler)
    return model


def rebuild_selector(sampler: CachedSampler, plan: CachePlan) -> Selector | None:
    """The content predictor in torch, from the artefact's weights; None if its plan needs none."""
    if not plan.selector:
        return None
    with torch.device("meta"):
        predictor = ContentPredictor(DiTConfig(**sampler.manifest["dit_config"]))
    _fill(predictor, sampler, f"{SELECTOR}.")
    return Selector(predictor, plan.selector)


def _fill(module: nn.Module, sampler: CachedSampler, stem: str = "") -> None:
    """Give a module the weights that the artefact holds under names that begin with `stem`, and freeze it."""
    index = {name: External(*sampler.manifest["weights"][stem + name]) for name in module.state_dict()}
    tensors = read_weights(sampler.path / "weights.data", index)
    module.load_state_dict({name: tensor.float() for name, tensor in tensors}, assign=True)
    module.eval().requires_grad_(False)


def _baselines(plan: CachePlan) -> dict[str, CachePlan]:
    """What one would do without this package, at the plan's MACs or up to one full step above them: rounding is in their favour."""
    step, budget, table = full_step_macs(plan.model), plan_macs(plan), plan.baseline
    baselines = {}
    if table.name in SAMPLERS:  # a table of one's own making is for its own number of steps
        fewer = fewer_steps_plan(plan.model, table.name, table.spacing, plan.guidance, math.ceil(budget / step) * step)
        baselines[f"{table.name}, {fewer.num_steps} steps"] = fewer
    speedup = len(table) * step / (budget + step)
    if speedup > 1.0:  # a plan that saves less than a step leaves nothing to reuse
        fora = fora_plan(plan.model, table, plan.guidance, speedup)
        baselines[f"reuse, {len(fora.full_steps)} of {fora.num_steps} full"] = fora
    return baselines


def _baseline_psnr(model: DiT, plan: CachePlan, full: np.ndarray, seed: int, batch: int, name: str, quiet: bool) -> float:
    parts = []
    with tqdm(total=len(full), desc=name, unit="image", disable=quiet) as bar:
        for indices, labels in _batches(len(full), batch, plan.model.num_classes):
            parts.append(sample(model, plan, noise_for(seed, indices, model), labels).numpy())
            bar.update(len(labels))
    return psnr(np.concatenate(parts), full)


def _batches(images: int, batch: int, classes: int) -> Iterator[tuple[range, Tensor]]:
    for first in range(0, images, batch):
        indices = range(first, min(first + batch, images))
        yield indices, torch.tensor([i % classes for i in indices])


def _table(report: dict[str, Any]) -> str:
    rows = [
        ("macs_speedup", f"{report['macs_speedup']:.3f}", "the reference run's MACs over the plan's"),
        (
            "wall_speedup",
            f"{report['wall_speedup']:.3f}",
            f"{report['full_ms_per_image']:.1f} ms against {report['cached_ms_per_image']:.1f} ms",
        ),
        ("psnr_db", f"{report['psnr_db']:.2f}", f"cached against full, {report['images']} images, seed {report['seed']}"),
        ("rel_l2_export", f"{report['rel_l2_export']:.2e}", "ONNX Runtime against torch, whole trajectory, worst image"),
        ("cache_bytes_per_image", str(report["cache_bytes_per_image"]), ""),
        *((name, f"{value:.2f}", "dB at the same MACs, rounded up") for name, value in report["baselines_psnr_db"].items()),
    ]
    verdict = "the plan beats its baselines" if report["beats_baselines"] else "the plan does NOT beat its baselines"
    return "\n".join([report["plan"], *(f"  {name:<26}{value:>12}  {note}" for name, value, note in rows), f"  {verdict}"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path, help="artefact folder")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else on standard output")
    parser.add_argument("--images", type=positive, default=64)
    parser.add_argument("--batch", type=positive, default=16, help="images at a time")
    parser.add_argument("--seed", type=int, help="seed of the images (default: a fresh one)")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
