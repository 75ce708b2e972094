"""What the stages try things on: the digits teacher with a plan that does everything, random weights, and their artefacts."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch

from export.bench.acceptance.reporter import NotHere
from export.bench.acceptance.sizes import Sizes
from export.bench.plans import benchmark_plans
from export.compiler.compile import write_unproved
from export.runtime.manifest import write_manifest
from export.runtime.programs import lower
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.models.dit import DiT, preset
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.rollout.sampling import model_signature

DIGITS = TeacherSpec("data/digits_dit.safetensors")
NO_DIGEST = "0" * 64  # random weights need no name


def digits(sizes: Sizes) -> tuple[Network, CachePlan]:
    """The digits teacher, and a plan whose steps take turns: full, skip everything, compute some blocks, recompute some tokens."""
    model = load_teacher(DIGITS)
    plans = list(
        benchmark_plans(model_signature(model), make_sampler(model.schedule, "ddim", sizes.small_steps), sizes.small_full).values()
    )
    full, turns = set(plans[0].full_steps), itertools.cycle(plans)
    steps = tuple(plans[0].steps[i] if i in full else next(turns).steps[i] for i in range(plans[0].num_steps))
    return model, dataclasses.replace(plans[0], steps=steps, provenance={"policy": "acceptance"})


def random_teacher(sizes: Sizes, device: str) -> Network:
    """The large shapes with random weights and open gates, made on the device, where that takes no time."""
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = DiT(preset(sizes.preset, **sizes.overrides))
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.normal_(0.0, 0.02)
    return model.to(device).eval().requires_grad_(False)  # the position table comes from numpy, which knows no device


def random_plans(model: Network, sizes: Sizes) -> dict[str, CachePlan]:
    """The plans of the benchmark for it."""
    return benchmark_plans(model_signature(model, NO_DIGEST), make_sampler(model.schedule, "ddim", sizes.steps), sizes.full_steps)


def write_artefact(model: Network, plan: CachePlan, folder: Path, precision: str, provider: str) -> Path:
    """An artefact without a proof, in a new folder."""
    folder.mkdir(parents=True)
    lowered = lower(plan, provider)
    write_manifest(folder, write_unproved(model, plan, lowered, folder, precision))
    return folder


def torch_device(provider: str) -> str:
    """PyTorch's name of the provider's device.

    Raises:
        NotHere: if PyTorch cannot use it.
    """
    if provider == "cuda" and not torch.cuda.is_available():
        raise NotHere(f"PyTorch {torch.__version__} cannot use the GPU, see stage 1")
    return provider
