"""Routers as Learning-to-Cache released them (Ma et al., arXiv 2406.01733): files of logits, read as the branches that are reused.

Such a file holds a tensor `I.prob` for each sampling step, by itself or under `routers` beside what else training saved. Row I
belongs to the I-th smallest time, so that the noisiest step is the last; entry 2 b of it is the attention of block b and entry 2 b +
1 its MLP. A branch is computed where the sigmoid of its logit is above the threshold. The rows that count are the even ones: their
steps come after a full one, which is every step of an odd row, whatever its logits are.

Shape suffixes: T sampling steps, the noisiest first, L blocks, 2 branches (0 attn, 1 mlp).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tc_lightning.errors import PlanError
from tc_lightning.models.checkpoints.torch_file import read_torch
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs, plan_macs
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import DIT
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.learning_to_cache import LearningToCachePolicy
from tc_lightning.policies.routers import router_steps

EXPECTED = (
    "a router as Learning-to-Cache released them has a tensor `I.prob` of logits, two a block, for each of an even number of steps"
)


class ReleasedRouter(NamedTuple):
    """A router read from a file.

    Args:
        weight_TL2: sigmoids of its logits, the noisiest step first.
        name: of the file.
        digest: sha256 of the file.
    """

    weight_TL2: np.ndarray
    name: str
    digest: str

    def reused_TL2(self, threshold: float) -> np.ndarray:
        """The branches that come from the cache, boolean: in odd steps, those whose weight is not above the threshold."""
        may_T11 = LearningToCachePolicy().may_reuse(len(self.weight_TL2))[:, None, None]
        return may_T11 & (self.weight_TL2 <= threshold)


def read_router(path: Path) -> ReleasedRouter:
    """Read a released router; nothing in the file is executed.

    Raises:
        TeacherError: if the file is damaged, or holds anything that could run code.
        PlanError: if it holds no router, or one of which a step or a logit is missing.
    """
    if not path.is_file():
        raise PlanError(f"no router at {path}: name the file that was released, for example DDIM50_router.pt.")
    held = read_torch(path)
    held = held.get("routers", held) if isinstance(held, Mapping) else held
    rows = _rows(held, path)
    logit_TL2 = torch.stack(rows).double().reshape(len(rows), -1, 2).flip(0)
    return ReleasedRouter(torch.sigmoid(logit_TL2).numpy(), path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def _rows(held: Any, path: Path) -> list[torch.Tensor]:
    """The logits of each step, least time first."""
    if not isinstance(held, Mapping) or not held:
        raise PlanError(f"{path} holds {type(held).__name__}: {EXPECTED}.")
    names = [f"{i}.prob" for i in range(len(held))]
    if {*map(str, held)} != {*names}:
        found = ", ".join(sorted(map(str, held))[:4])
        raise PlanError(f"{path} holds {len(held)} values ({found} ...), not 0.prob to {len(held) - 1}.prob: {EXPECTED}.")
    rows = [held[name] for name in names]
    shapes = {tuple(row.shape) if isinstance(row, torch.Tensor) else type(row).__name__ for row in rows}
    if len(shapes) != 1 or not all(isinstance(row, torch.Tensor) and row.is_floating_point() for row in rows):
        raise PlanError(f"{path} holds logits of unlike shapes or types ({', '.join(sorted(map(str, shapes)))}): {EXPECTED}.")
    (shape,) = shapes
    if len(shape) != 1 or not shape[0] or shape[0] % 2 or len(rows) % 2:
        raise PlanError(f"{path} holds logits of the shape {shape} for {len(rows)} steps: {EXPECTED}.")
    if not all(bool(torch.isfinite(row).all()) for row in rows):
        raise PlanError(f"{path} holds logits that are NaN or infinite: it is damaged, fetch it again.")
    return rows


def imported_plan(
    router: ReleasedRouter, signature: ModelSignature, sampler: SamplerTable, guidance: Guidance, threshold: float = 0.1
) -> CachePlan:
    """The router as a plan.

    Args:
        router: what `read_router` read.
        signature: the model that it was trained for.
        sampler: the sampler, of as many steps; it replaces full compute with the same one.
        guidance: guidance scale and channels.
        threshold: branches with weights above it are computed (0.1 for most of the released routers of DiT).

    Raises:
        PlanError: if the router is of another number of steps or blocks, or the model's branches are none that it knows.
    """
    T, L = router.weight_TL2.shape[:2]
    if signature.block != DIT:
        raise PlanError(
            f"{router.name} is a router of a DiT, whose branches are {DIT.text}, and the model's are {signature.block.text}: name "
            "the DiT that it was trained for."
        )
    if signature.depth != L:
        raise PlanError(
            f"{router.name} is a router for {L} blocks, and the model has {signature.depth}: name the model of its release."
        )
    if len(sampler) != T:
        raise PlanError(f"{router.name} is a router for {T} sampling steps, and the sampler has {len(sampler)}: take {T}.")
    if not 0.0 <= threshold < 1.0:
        raise PlanError(f"threshold {threshold:g}: choose 0 or more, and below 1.")
    arguments = {"router": router.name, "sha256": router.digest, "threshold": threshold}
    steps = router_steps(router.reused_TL2(threshold), signature.block.names)
    return CachePlan(signature, sampler, guidance, steps, sampler, {"policy": LearningToCachePolicy.name, "arguments": arguments})


def macs_share(plan: CachePlan) -> float:
    """MACs of a plan as a share of those of the run that it replaces."""
    return plan_macs(plan) / (len(plan.reference) * full_step_macs(plan.model))
