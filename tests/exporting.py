"""What the tests of export share: a quiet export, latents of torch, and graphs as they were written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from export.compiler.compile import export_artefact
from export.compiler.parity import relative_l2
from export.runtime.manifest import sha256_of
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.dit import DiT
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import partial
from tc_lightning.planner.policy import PlannerPolicy
from tc_lightning.policies.base import PlanningContext
from tc_lightning.rollout.sampling import model_signature, noise_for, sample


def export(model: DiT, plan: CachePlan, out: Path, precision: str = "fp32") -> dict[str, Any]:
    return export_artefact(model, plan, out, precision, "cpu", images=2, report=lambda _: None)


def torch_latents(model: DiT, plan: CachePlan, labels: list[int], seed: int) -> np.ndarray:
    return sample(model, plan, noise_for(seed, range(len(labels)), model), torch.tensor(labels)).numpy()


def planned(model: Network, guidance: Guidance, sampler: str = "ddim", spacing: str = "uniform") -> CachePlan:
    """The planner's own plan with a cache, for ten steps."""
    signature, table, rng = model_signature(model), make_sampler(model.schedule, sampler, 10, spacing), np.random.default_rng(0)
    shape = (10, signature.depth)
    importance, sensitivity = rng.random((*shape, signature.image_tokens)), rng.random((*shape, len(signature.block.names)))
    importance[0], sensitivity[0] = 1, 0
    scores = Scores(importance, sensitivity, signature.teacher, sampler_digest(table))
    policy = PlannerPolicy(1.5, "reference", (), 3, 1, "keep", 2, 2, 2, 2, 0, 0, progress=False)
    context = PlanningContext(signature, model.schedule, table, guidance, scores, table, lambda plan, images: math.nan, model=model)
    return policy.plan(context).plan


def worst_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return max(relative_l2(a, e) for a, e in zip(actual, expected, strict=True))


def graphs_of(folder: Path) -> dict[str, onnx.ModelProto]:
    return {path.stem: onnx.load(str(path), load_external_data=False) for path in folder.glob("*.onnx")}


def snapshot(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir()}


# Parity


QUARTERS = [(partial(0, 4, kept, 1),) for kept in ((0, 3, 6, 15), (1, 2, 4, 9), (5,))]
