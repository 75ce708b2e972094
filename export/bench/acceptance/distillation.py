"""Stage 6: distilling and planning on the device: a whole run on the digits teacher, then what each part takes on the large shapes.

The estimate of a whole distillation of DiT-XL/2 was counted on paper, in forwards of one sample (export/BENCHMARKS.md). Here it is
corrected by what a forward, a training step, a trial and a refinement pass take.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch

from export.bench.acceptance.reporter import Findings, NotHere, Reporter
from export.bench.acceptance.sizes import Sizes, sizes_for
from export.bench.acceptance.subjects import random_plans, random_teacher, torch_device
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.learn.objectives.base import Batch, Task
from tc_lightning.learn.objectives.superposition import PairBatch, TokenSuperposition
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.planner.fit import fit_sampler
from tc_lightning.planner.image_choice import images
from tc_lightning.planner.refine import DAMPING, PROBES, refine_sampler
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.rollout.sampling import given_for

ROOT = Path(__file__).resolve().parents[3]
T = TypeVar("T")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINING_STEPS = 500
# In forwards of one sample: lightning_configs/dit_xl2_256.yaml as counted in export/BENCHMARKS.md.
PAPER = {"full runs": 28_800 + 20_000, "training": 43_000, "sensitivities": 8_300, "trials": 57_000 + 24_000, "refining": 82_000}
PAPER_FLOPS, PAPER_RATE = 0.237e12, 40e12  # of a forward; a second
PROMISED_MINUTES = 60
REPEATS = 2
OVERLAY = """
model:
  init_args:
    num_steps: 8
    sensitivity_samples: 1
    sensitivity_probes: 1
    policy:
      init_args:
        target_speedup: 1.5
        front: []
        evaluations: 2
        refinements: 1
        fit_images: 2
        judge_images: 2
        final_images: 1
        pool_images: 0
data:
  init_args: {num_train: 4, num_val: 2, batch_size: 4}
trainer: {max_steps: 2, val_check_interval: 2}
"""


def run(report: Reporter, provider: str, scratch: Path) -> None:
    """See the module."""
    sizes = sizes_for(provider)
    with report.part("lightning fit, bf16-mixed") as found:
        fit_digits(found, provider, scratch, report.left / 2)
    with report.part("random weights") as found:
        device = torch_device(provider)
        model = random_teacher(sizes, device)
        found.figures |= {"model": sizes.preset, **sizes.overrides}
    if not found.figures:
        return
    measured: dict[str, dict[str, float]] = {}
    for name, dtype in PRECISIONS.items():
        measured[name] = {}
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            with report.part(f"{name}, training step") as found:
                found.figures["seconds"] = measured[name]["training"] = training_step(found, model, sizes, device)
            with report.part(f"{name}, planning") as found:
                measured[name] |= planning(found, model, sizes)
    with report.part("estimate") as found:
        estimate(found, measured, sizes.judged)


def fit_digits(found: Findings, provider: str, scratch: Path, seconds: float) -> None:
    """`lightning fit` from data to plan, as short as it gets, on the device."""
    (scratch / "short.yaml").write_text(OVERLAY, encoding="utf-8")
    configs = [ROOT / "lightning_configs" / name for name in ("digits.yaml", "bf16.yaml")]
    command = [sys.executable, "-m", "tc_lightning", "fit", *(f"--config={path}" for path in (*configs, "short.yaml"))]
    accelerator = f"--trainer.accelerator={'gpu' if provider == 'cuda' else 'cpu'}"
    done = subprocess.run([*command, accelerator], cwd=scratch, capture_output=True, text=True, check=False, timeout=max(seconds, 1))
    said = (done.stderr or done.stdout).strip().splitlines()
    found.require(done.returncode == 0, f"it ended with {done.returncode}: {said[-1] if said else 'no message'}")
    plans = list(scratch.glob("runs/digits/*/plan.json"))
    found.require(len(plans) == 1, f"it left {len(plans)} plans")
    found.figures["plans"] = [CachePlan.load(path).summary for path in plans]


def training_step(found: Findings, model: Network, sizes: Sizes, device: str) -> float:
    """Seconds of a step of training the Cache Predictor, as the distiller takes it."""
    plan = next(iter(random_plans(model, sizes).values()))
    task = Task(model, plan.model, plan.sampler, plan.guidance)
    objective = TokenSuperposition()
    objective.prepare(task)
    objective.to(device)
    objective.start(torch.device(device))
    batch = _pairs(model, sizes.pairs, plan.num_steps, device)
    optimiser = torch.optim.Adam(objective.parameters(), 1e-2)
    losses: list[float] = []

    def step() -> None:
        loss = objective.loss(Batch(task, batch), 0).total
        optimiser.zero_grad()
        loss.backward()
        objective.before_step()
        optimiser.step()
        losses.append(float(loss.detach()))

    seconds = timed(step)
    found.figures |= {"pairs": sizes.pairs, "losses": losses}
    found.require(all(map(math.isfinite, losses)) and losses[0] != losses[-1], "the loss is not finite, or does not move")
    return seconds


def planning(found: Findings, model: Network, sizes: Sizes) -> dict[str, float]:
    """Seconds of a forward of one sample in a full run, in a trial, and in the first pass of refining."""
    plan = random_plans(model, sizes)["skip"]
    noise, labels = images(model, list(range(sizes.planned_images)))
    rows = sizes.planned_images * (2 if plan.guidance.doubles_batch else 1)
    full_run, trial = sizes.planned_steps * rows, len(plan.full_steps) * rows
    reference = make_sampler(model.schedule, "ddim", sizes.planned_steps)
    targets: list[TargetRun] = []
    run_seconds = timed(lambda: targets.append(run_target(model, reference, plan.guidance, noise, labels, sizes.planned_images)))
    fits = [fit_sampler(model, plan, targets[0], sizes.planned_images // 2)]
    trial_seconds = timed(lambda: fits.append(fit_sampler(model, plan, targets[0], sizes.planned_images // 2)))
    found.require(bool(torch.isfinite(fits[-1].mse_B).all()), "the fit's errors are not finite")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        refined, pass_seconds = once(lambda: refine_sampler(model, fits[0].plan, targets[0], 1))
    told = [str(warning.message) for warning in said if "stays as it was fitted" in str(warning.message)]
    found.require(not told, "; ".join(told))
    found.figures |= {"seconds of a full run": run_seconds, "seconds of a trial": trial_seconds, "seconds of a pass": pass_seconds}
    found.figures |= {"images": sizes.planned_images, "refining changed the plan": refined.sampler != fits[0].plan.sampler}
    of_pass = 1 + 2 * (1 + PROBES) + len(DAMPING)  # a run with gradients, backward passes, and moves that are tried
    return {"full runs": run_seconds / full_run, "trials": trial_seconds / trial, "refining": pass_seconds / (of_pass * trial)}


def estimate(found: Findings, measured: dict[str, dict[str, float]], judged: bool) -> None:
    """Minutes of the shipped configuration, training in each precision and the rest in fp32, beside those on paper."""
    if any(set(rates) != {"training", "full runs", "trials", "refining"} for rates in measured.values()):
        raise NotHere("a part above did not get to its figures")
    rest = measured["fp32"]
    minutes = {name: PAPER[name] * rest[name] / 60 for name in ("full runs", "trials", "refining")}
    minutes["sensitivities"] = PAPER["sensitivities"] * rest["refining"] / 60
    found.figures["minutes on paper"] = sum(PAPER.values()) * PAPER_FLOPS / PAPER_RATE / 60
    for name in PRECISIONS:
        training = TRAINING_STEPS * measured[name]["training"] / 60
        total = sum(minutes.values()) + training
        found.figures[f"minutes, training in {name}"] = {"all": total, "training": training, **minutes}
    found.figures["seconds of a forward"] = measured
    found.require(bool(np.isfinite(total)), "the estimate is no number")
    if judged:
        found.at_most("minutes", total, PROMISED_MINUTES)


def timed(work: Callable[[], object]) -> float:
    """Least seconds of a few runs, after one that warms up."""
    once(work)
    return min(once(work)[1] for _ in range(REPEATS))


def once(work: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and its seconds, those of the device included."""
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def _pairs(model: Network, pairs: int, steps: int, device: str) -> PairBatch:
    c = model.config
    x_prev, x, eps = torch.randn(3, pairs, c.in_channels, c.input_size, c.input_size, device=device)
    step = torch.arange(pairs, device=device) % (steps - 1) + 1
    given = given_for(0, range(pairs), model, device)
    pairs_B = PairBatch(x_prev=x_prev[:, None], x=x, eps=eps, step=step, index=torch.arange(pairs, device=device))
    return cast(PairBatch, {**pairs_B, **given})
