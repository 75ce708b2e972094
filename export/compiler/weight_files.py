"""Weights that several artefacts of a model share: written once, hashed once, and linked into each of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.compiler.weights import MODULATION_TABLE, SELECTOR, External, place_weights, write_weights
from export.runtime.manifest import listing_of
from export.runtime.sessions import WEIGHTS
from tc_lightning.models.content_predictor import Selector, require_selector
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.rollout.sampling import device_of


class WeightFiles:
    """Weights files of one model in one precision, each written when the first artefact asks for it.

    Plans without a content predictor share one file; those with one share another for each set of steps, whose terms it holds.

    Args:
        model: the teacher.
        precision: fp32, fp16 or bf16.
        folder: an existing folder on the file system of the artefacts.
        selector: the content predictor that plans may name.
    """

    def __init__(self, model: Network, precision: str, folder: Path, selector: Selector | None = None) -> None:
        self.model, self.precision, self.folder, self.selector = model, precision, folder, selector
        self._numbers = itertools.count()
        self._known: dict[object, tuple[Path, dict[str, External], dict[str, Any]]] = {}

    def link(self, plan: CachePlan, artefact: Path) -> tuple[dict[str, External], dict[str, Any]]:
        """Put the plan's weights into an artefact's folder.

        Returns:
            Where each tensor is in the file, for the artefact to add its views to, and what a manifest says of the file.

        Raises:
            PlanError: if the plan names another content predictor.
            TokenCacheError: if a weight is not finite in this precision.
        """
        key = tuple(row.t for row in plan.sampler.steps) if plan.selector else None
        if key not in self._known:
            self._known[key] = self._write(plan)
        path, index, listing = self._known[key]
        (artefact / WEIGHTS).hardlink_to(path)
        return dict(index), listing

    def _write(self, plan: CachePlan) -> tuple[Path, dict[str, External], dict[str, Any]]:
        path = self.folder / f"{next(self._numbers)}.data"
        tensors = tensors_of(self.model, plan, self.selector)
        index = place_weights(tensors, self.precision)
        write_weights(tensors, path, index)
        return path, index, listing_of(path)


def tensors_of(model: Network, plan: CachePlan, selector: Selector | None) -> dict[str, Tensor]:
    """What a plan's weights file holds: the teacher, and the content predictor that the plan names, if it does.

    Raises:
        PlanError: if it names one that is missing, or is another.
    """
    require_selector(plan, selector)
    return model.state_dict() | (_selector_tensors(model, plan, selector) if plan.selector and selector else {})


@torch.no_grad()
def _selector_tensors(model: Network, plan: CachePlan, selector: Selector) -> dict[str, Tensor]:
    """All of a content predictor, and its adaLN terms at every step, which is what the graphs read."""
    device = device_of(model)
    predictor, times = selector.to(device).predictor, torch.tensor([row.t for row in plan.sampler.steps], device=device)
    weights = {f"{SELECTOR}.{name}": tensor for name, tensor in predictor.state_dict().items()}
    return weights | {MODULATION_TABLE: torch.cat(predictor.modulation(model, times), 1)}
