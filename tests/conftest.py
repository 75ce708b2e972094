"""What the tests of plans, caching and export share: tiny teachers with open gates, and plans that use every mode."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance, GuidanceMode
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute, partial, reuse, skip
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.rollout.sampling import model_signature

pytest_plugins = ("artefacts", "planning", "trajectory_sets")  # files beside this one whose fixtures several tests use

# Tests run side by side, and so does what they start: a thread each.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

MOST_WORKERS = 4  # each needs up to 1.6 GB

CONFIG = DiTConfig(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=4, num_heads=2, num_classes=5)


def signature_for(config: DiTConfig, digest: str = "0" * 64) -> ModelSignature:
    """Signature of a DiT of a shape, whatever its weights."""
    with torch.device("meta"):
        return DiT(config).signature(digest)


SIGNATURE = signature_for(CONFIG)
FULL = (compute(0, 4),)
VP = LinearBetas()
Steps = tuple[tuple[Segment, ...], ...]

# Every mode, every order, token sets that change from step to step, and forecasts that lack past values at first.
EVERY_MODE: Steps = (
    FULL,
    (compute(0, 2), compute(2, 4)),
    (reuse(0, 1, ("mlp",), 1), skip(1, 3, 2), partial(3, 4, (0, 3, 7), 0, ("mlp",))),
    FULL,
    (reuse(0, 1, ("mlp",), 1), skip(1, 3, 1), partial(3, 4, (2, 4, 15), 0, ("mlp",))),
    (partial(0, 2, (1, 5, 6, 9, 15), 1), compute(2, 3), reuse(3, 4, ("attn", "mlp"), 2)),
    (partial(0, 2, (0, 2, 3, 13, 14), 1), compute(2, 3), reuse(3, 4, ("attn", "mlp"), 2)),
    (skip(0, 4, 0),),
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """As many workers as there are cores for them; none for a single file, which all goes to one worker."""
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None
    files = {argument.partition("::")[0] for argument in config.args}
    if len(files) == 1 and all(name.endswith(".py") for name in files):
        return 0
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def vp_sampler(name: str, num_steps: int, spacing: str = "uniform") -> SamplerTable:
    """A sampler of a DiT's schedule."""
    return make_sampler(VP, name, num_steps, spacing)


def make_teacher(seed: int = 0, **changes: Any) -> DiT:
    """A frozen teacher whose blocks matter: weights of 0.2 make gates and branches of order 1."""
    return randomise_(DiT(dataclasses.replace(CONFIG, **changes)), seed, std=0.2).eval().requires_grad_(False)


def make_plan(
    model: DiT | ModelSignature,
    steps: Steps = EVERY_MODE,
    guidance: Guidance | None = None,
    sampler: str = "ddim",
    spacing: str = "uniform",
    reference: SamplerTable | None = None,
    eps_scale: tuple[float, ...] = (),
    modes: str = "",
    **provenance: Any,
) -> CachePlan:
    """A plan; guidance 1.5 on three channels unless told otherwise; `modes`: b both, 0 to 2 forecast, c cond, one a step."""
    signature = model if isinstance(model, ModelSignature) else model_signature(model)
    table = vp_sampler(sampler, len(steps), spacing)
    guidance = guidance or Guidance(1.5, min(3, signature.in_channels))
    return CachePlan(signature, table, guidance, steps, reference or table, provenance, eps_scale, tuple(map(guidance_mode, modes)))


def guidance_mode(letter: str) -> GuidanceMode:
    """See `make_plan`."""
    return GuidanceMode("forecast", int(letter)) if letter.isdigit() else GuidanceMode({"b": "both", "c": "cond"}[letter])


def random_modes(seed: int, num_steps: int) -> str:
    """Random guidance modes for `make_plan`, valid by construction, at least one of them single."""
    rng = random.Random(seed)
    return "b" + "".join(rng.choice("bb012c") for _ in range(num_steps - 2)) + rng.choice("012c")


def random_steps(seed: int, num_steps: int = 7, depth: int = 4, tokens: int = 16) -> Steps:
    """Random steps after a full one, valid by construction."""
    rng = random.Random(seed)

    def segment(start: int, stop: int) -> Segment:
        order = rng.randrange(3)
        match rng.choice(("compute", "compute", "partial", "mlp", "reuse", "skip")):
            case "compute":
                return compute(start, stop)
            case "skip":
                return skip(start, stop, order)
            case "reuse":
                return reuse(start, stop, rng.choice((("attn",), ("mlp",), ("attn", "mlp"))), order)
            case kind:
                kept = tuple(rng.sample(range(tokens), rng.choice((1, 5, tokens))))
                own = ("mlp",) if kind == "mlp" else ("attn", "mlp")
                return partial(start, stop, kept, order, own, kv_order=rng.randrange(3) if kind == "partial" else 0)

    steps = [(compute(0, depth),)]
    for _ in range(num_steps - 1):
        cuts = [0, *sorted(rng.sample(range(1, depth), rng.randrange(depth))), depth]
        steps.append(tuple(segment(a, b) for a, b in itertools.pairwise(cuts)))
    return tuple(steps)


@pytest.fixture(scope="session")
def teacher() -> DiT:
    return make_teacher()


@pytest.fixture(scope="session")
def plan(teacher: DiT) -> CachePlan:
    return make_plan(teacher)


@pytest.fixture(scope="session")
def artefact(teacher: DiT, plan: CachePlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of every mode as an fp32 artefact. Copy it before changing a byte."""
    from export.compiler.compile import export_artefact

    out = tmp_path_factory.mktemp("artefacts") / "tiny"
    export_artefact(teacher, plan, out, "fp32", "cpu", images=2, report=lambda _: None)
    return out
