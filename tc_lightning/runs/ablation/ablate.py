"""TokenCache against itself: are learned tokens better than random ones, and sensitive blocks than others, at equal cost?

    python -m tc_lightning ablate -c lightning_configs/digits.yaml --seeds 5 --out ablation.json
    python -m tc_lightning ablate -c lightning_configs/photos.yaml --seeds 5 --out ablation_photos.json --max-steps 60 --images 16

Trains both predictors once for each seed, runs plans that differ in one choice alone on images that nothing was trained on, and writes
errors, means and paired differences to --out, after every seed. Interrupted? The same command goes on where it stopped. What is trained
is kept under --runs, and is not trained again for another comparison, say with --order 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from tqdm import tqdm

from tc_lightning.errors import RunError
from tc_lightning.models.network import Network
from tc_lightning.plan.atomic import write_atomically
from tc_lightning.plan.costs import full_step_macs, macs_speedup
from tc_lightning.plan.forecasts import KV_ORDER
from tc_lightning.planner.image_choice import images
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.policies.targeted import Steps
from tc_lightning.rollout.evaluation import BATCH, RolloutEvaluator
from tc_lightning.runs.ablation.equal_cost import EqualCost, without_predictor
from tc_lightning.runs.ablation.summary import Answer, SeedErrors, VariantRow, all_answers, all_rows, table
from tc_lightning.runs.ablation.training import Training, train
from tc_lightning.runs.ablation.variants import Learned, Variant, all_variants
from tc_lightning.runs.loaded import LoadedRun


def main(arguments: list[str]) -> None:
    """Compare; exit status 130 if interrupted, which loses nothing but the seed at hand."""
    try:
        _ablate(_parse(arguments))
    except KeyboardInterrupt as error:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        raise SystemExit(130) from error


def _ablate(args: argparse.Namespace) -> None:
    training = Training(tuple(args.config), args.train_images, args.max_steps, args.max_steps_v2 or args.max_steps, args.lr_v2)
    settings = _settings(args, training)
    content: dict[str, Any] = {"settings": settings, "seeds": _known(args.out, settings)}
    wanted = [str(seed) for seed in range(args.seeds)]
    bench = SeedMeasurer(args)
    for seed in wanted:
        if seed in content["seeds"]:
            print(f"training seed {seed}: known from {args.out}")
            continue
        folder = args.runs / training.digest[:12] / f"seed_{seed}"
        content["seeds"][seed] = bench.measure(*train(training, folder, int(seed)), int(seed))
        _write(args.out, content)
    found = [content["seeds"][seed] for seed in wanted]
    rows, answers = all_rows(found), all_answers(found)
    _write(args.out, content | {"rows": _plain(rows), "answers": _plain(answers)})
    print(f"{table(rows, answers, args.seeds)}\nwrote {args.out}")


class SeedMeasurer:
    """Measures what training seeds have learned, all on the same images, which no predictor was trained on.

    Args:
        args: the command's.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._target: TargetRun | None = None
        self._known: dict[Steps, np.ndarray] = {}  # many seeds choose the same blocks

    def measure(self, run: LoadedRun, learned: Learned, seed: int) -> SeedErrors:
        """Cost and errors of all variants, by name; of random ones the mean over draws.

        Raises:
            PlanError: if variants that are compared differ in cost.
            RunError: if one makes the latents NaN or infinite.
        """
        args, plan = self.args, run.plan
        shares = (args.token_share, args.window_share, args.block_share)
        layout = EqualCost(plan.model, plan.reference, plan.guidance, args.full, args.order, *shares, args.kv_order)
        variants = all_variants(layout, run.model.config, learned, seed, args.draws)
        model = run.model.to(Fabric(accelerator="auto", devices=1).device)
        target = self._target = self._target or _full_run(model, layout, args.images)
        errors: dict[str, list[np.ndarray]] = {}
        for v in tqdm(variants, f"training seed {seed}", unit="plan"):
            errors.setdefault(v.name, []).append(self._errors(model, v, target))
        return {v.name: _row(v) | {"mse": np.mean(errors[v.name], 0).tolist()} for v in variants}

    def _errors(self, model: Network, variant: Variant, target: TargetRun) -> np.ndarray:
        steps = variant.plan.steps
        if variant.plan.selector or steps not in self._known:
            self._known[steps] = _errors(model, variant, target)
        return self._known[steps]


def _full_run(model: Network, layout: EqualCost, count: int) -> TargetRun:
    x_T, given = images(model, list(range(count)))
    return run_target(model, layout.sampler, layout.guidance, x_T, given, BATCH, "full run")


def _errors(model: Network, variant: Variant, target: TargetRun) -> np.ndarray:
    """Mean squared error of each image."""
    selector = None if variant.selector is None else variant.selector.to(target.x_0.device)
    mse_B = RolloutEvaluator(model, target.x_T, target.given, target.x_0, selector).mse_per_image(variant.plan)
    if not torch.isfinite(mse_B).all():
        raise RunError(f"{variant.name!r} makes the latents NaN or infinite: raise --full, or lower --order.")
    return mse_B.double().cpu().numpy()


def _row(variant: Variant) -> dict[str, Any]:
    """What a variant is and costs; its errors are still to come."""
    plan = variant.plan
    saved = len(plan.reference) * full_step_macs(plan.model) / without_predictor(plan)
    return {"group": variant.group, "speedup": saved, "speedup_with_predictor": macs_speedup(plan)}


def _settings(args: argparse.Namespace, training: Training) -> dict[str, Any]:
    """All that a seed's errors depend on."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "seeds", "runs")} | {"training": training.digest}


def _known(path: Path, settings: dict[str, Any]) -> dict[str, SeedErrors]:
    """Seeds that an earlier call with the same settings has finished.

    Raises:
        RunError: if the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        theirs, seeds = raw["settings"], dict(raw["seeds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be added to ({error!r}): name another file with --out, or delete it.") from error
    if theirs != settings:
        raise RunError(f"{path} holds a comparison with other settings: name another file with --out, or delete it.")
    return seeds


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _plain(items: Sequence[VariantRow] | Sequence[Answer]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(item) for item in items]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", action="append", required=True, help="YAML of a distillation; later ones are laid over")
    parser.add_argument("--seeds", type=int, default=5, help="training seeds, 0 upwards: trajectories, initial weights, batches")
    parser.add_argument("--out", type=Path, default=Path("ablation.json"), help="where the comparison is written")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="where what is trained is kept")
    parser.add_argument("--max-steps", type=int, help="optimiser steps of version 1's predictor (default: the YAML's)")
    parser.add_argument("--max-steps-v2", type=int, help="optimiser steps of version 2's predictor (default: as --max-steps)")
    parser.add_argument("--lr-v2", type=float, default=1e-3, help="learning rate of version 2's predictor")
    parser.add_argument("--train-images", type=int, help="trajectories to learn from (default: the YAML's)")
    parser.add_argument("--images", type=int, default=32, help="images on which plans are compared")
    parser.add_argument("--draws", type=int, default=2, help="draws of each random choice for each training seed")
    parser.add_argument("--full", type=int, default=16, help="sampling steps that compute everything")
    parser.add_argument("--order", type=int, default=1, choices=(0, 1, 2), help="forecast order of what comes from the cache")
    parser.add_argument("--kv-order", type=int, default=KV_ORDER, choices=(0, 1, 2), help="forecast order of keys and values")
    parser.add_argument("--token-share", type=float, default=0.25, help="share of the tokens that the other steps recompute")
    parser.add_argument("--window-share", type=float, default=1.0, help="share of the blocks in which they do")
    parser.add_argument("--block-share", type=float, default=1 / 3, help="share of the blocks computed, where blocks are compared")
    args = parser.parse_args(arguments)
    least = {"seeds": 2, "images": 2, "draws": 1, "max_steps": 1, "max_steps_v2": 1, "train_images": 1}
    for name, low in least.items():
        if (value := getattr(args, name)) is not None and value < low:
            raise RunError(f"--{name.replace('_', '-')} is {value}: give {low} or more.")
    for name in ("token_share", "window_share", "block_share"):
        if not 0.0 < (share := getattr(args, name)) <= 1.0:
            raise RunError(f"--{name.replace('_', '-')} is {share:g}: give a share above 0, and at most 1.")
    if not 0.0 < args.lr_v2 < float("inf"):
        raise RunError(f"--lr-v2 is {args.lr_v2:g}: give a learning rate above 0.")
    for config in args.config:
        if not Path(config).is_file():
            raise RunError(f"there is no configuration {config}: name a YAML of a distillation with -c.")
    return args
