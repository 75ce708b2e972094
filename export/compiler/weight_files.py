"""Weights that several artefacts of a model share: written once, hashed once, and linked into each of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.compiler.weights import CORRECTION_TABLE, CORRECTOR, MODULATION_TABLE, SELECTOR, External, place_weights, write_weights
from export.runtime.manifest import listing_of
from export.runtime.sessions import WEIGHTS
from tc_lightning.models.companions import NO_COMPANIONS, Companions
from tc_lightning.models.content_predictor import Selector
from tc_lightning.models.corrector import Corrector, correction_clocks
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.rollout.sampling import device_of


class WeightFiles:
    """Weights files of one model in one precision, each written when the first artefact asks for it.

    Plans that name no other network share one file; those that do share another for each set of times, whose terms it holds.

    Args:
        model: the teacher.
        precision: fp32, fp16 or bf16.
        folder: an existing folder on the file system of the artefacts.
        companions: the networks that plans may name.
    """

    def __init__(self, model: Network, precision: str, folder: Path, companions: Companions = NO_COMPANIONS) -> None:
        self.model, self.precision, self.folder, self.companions = model, precision, folder, companions
        self._numbers = itertools.count()
        self._known: dict[object, tuple[Path, dict[str, External], dict[str, Any]]] = {}

    def link(self, plan: CachePlan, artefact: Path) -> tuple[dict[str, External], dict[str, Any]]:
        """Put the plan's weights into an artefact's folder.

        Returns:
            Where each tensor is in the file, for the artefact to add its views to, and what a manifest says of the file.

        Raises:
            PlanError: if the plan names a network that is not among the companions.
            TokenCacheError: if a weight is not finite in this precision.
        """
        times = tuple(row.t for row in plan.sampler.steps) if plan.selector else ()
        clocks = correction_clocks(plan, self.model.schedule).flatten().tolist() if plan.corrector else ()
        key = (times, tuple(clocks))
        if key not in self._known:
            self._known[key] = self._write(plan)
        path, index, listing = self._known[key]
        (artefact / WEIGHTS).hardlink_to(path)
        return dict(index), listing

    def _write(self, plan: CachePlan) -> tuple[Path, dict[str, External], dict[str, Any]]:
        path = self.folder / f"{next(self._numbers)}.data"
        tensors = tensors_of(self.model, plan, self.companions)
        index = place_weights(tensors, self.precision)
        write_weights(tensors, path, index)
        return path, index, listing_of(path)


def tensors_of(model: Network, plan: CachePlan, companions: Companions) -> dict[str, Tensor]:
    """What a plan's weights file holds: the teacher, and the networks that the plan names.

    Raises:
        PlanError: if it names one that is missing, or is another.
    """
    named, tensors = companions.named_by(plan), model.state_dict()
    if named.selector is not None:
        tensors |= _selector_tensors(model, plan, named.selector)
    if named.corrector is not None:
        tensors |= _corrector_tensors(model, plan, named.corrector)
    return tensors


@torch.no_grad()
def _selector_tensors(model: Network, plan: CachePlan, selector: Selector) -> dict[str, Tensor]:
    """All of a content predictor, and its adaLN terms at every step, which is what the graphs read."""
    device = device_of(model)
    predictor, times = selector.to(device).predictor, torch.tensor([row.t for row in plan.sampler.steps], device=device)
    weights = {f"{SELECTOR}.{name}": tensor for name, tensor in predictor.state_dict().items()}
    return weights | {MODULATION_TABLE: torch.cat(predictor.modulation(model, times), 1)}


@torch.no_grad()
def _corrector_tensors(model: Network, plan: CachePlan, corrector: Corrector) -> dict[str, Tensor]:
    """All of a corrector, and its terms at every step, which is what the graphs read."""
    weights = {f"{CORRECTOR}.{name}": tensor for name, tensor in corrector.module.state_dict().items()}
    return weights | {CORRECTION_TABLE: corrector.terms(plan, model.schedule)}
