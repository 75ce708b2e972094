"""What the gradients of one image's run take, counted before they are: tensors that autograd saves, and states that are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from tc_lightning.models.conditions import null_rows, zeros_for
from tc_lightning.models.families import build
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.planner.gradients import advance_with, as_leaves, own_theta, tensors
from tc_lightning.planner.theta import Places
from tc_lightning.rollout.sampling import Rollout


class GraphSize(NamedTuple):
    """Bytes that the gradients of a run hold, weights aside (`tc_lightning.planner.gradients`).

    Args:
        whole: by the graph of all steps.
        steps: step by step: of each step its own graph and the states up to it, and what a vector adds that is pulled back.
    """

    whole: int
    steps: tuple[tuple[int, int], ...]

    def stepwise(self, vectors: int) -> int:
        """Most that is held step by step, where so many vectors are pulled back together."""
        return max(held + vectors * each for held, each in self.steps)


def graph_size(run: Rollout, x_BCHW: Tensor, places: Places) -> GraphSize:
    """Count the gradients of a run; one step's worth is held at most while that is done, and on tensors without values, nothing.

    Args:
        run: the plan and the images.
        x_BCHW: their noise.
        places: what gradients are wanted of.
    """
    own = own_theta(run, places, x_BCHW)
    state = run.start(x_BCHW)
    known = _Storages([*run.model.parameters(), own.values_BP])
    kept = _Storages([*tensors(state), *run.constants.tensors])
    for module in run.companions.modules:
        known.add(module.parameters())
    steps: list[tuple[int, int]] = []
    graphs, wanting = 0, 0
    for _ in range(run.plan.num_steps):
        saved = _Storages()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.add_one, _never):
            state = advance_with(run, as_leaves(state), own)
        kept.add(tensors(state))
        saved.remove(known, kept)
        before, wanting = wanting, _Storages([t for t in tensors(state) if t.requires_grad]).size
        steps.append((kept.size + saved.size + saved.largest, max(before, wanting)))
        graphs += saved.size
    return GraphSize(kept.size + graphs, tuple(steps))


def graph_size_on_paper(config: Any, plan: CachePlan, weights: bool = False) -> GraphSize:
    """The same for one image and a model that is not there: nothing is computed, and no weights are made.

    Args:
        config: the model's shape.
        plan: the plan.
        weights: whether gradients of its forecasts' weights are wanted too.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(plan.model.family, dataclasses.asdict(config)).eval().requires_grad_(False)
        noise, model.nulls = torch.empty(1, *plan.model.latent), zeros_for(model.conditions)
        run = Rollout(model, plan, null_rows(model.conditions, torch.zeros(1)))
        return graph_size(run, noise, Places.of(plan, weights))


class _Storages:
    """Memory blocks of tensors, each counted once; none is held on to."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._bytes: dict[StorageWeakRef, int] = {}  # a weak reference keeps another block from being taken for the same
        self.add(tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count these too."""
        for tensor in tensors:
            self.add_one(tensor)

    def add_one(self, tensor: Tensor) -> None:
        """Count this one too."""
        storage = tensor.untyped_storage()
        self._bytes[StorageWeakRef(storage)] = storage.nbytes()

    def remove(self, *others: _Storages) -> None:
        """Leave out what others count."""
        known = {block for other in others for block in other._bytes}
        self._bytes = {block: size for block, size in self._bytes.items() if block not in known}

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(self._bytes.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest: gradients on their way back are of this size."""
        return max(self._bytes.values(), default=0)


def _never(_: None) -> Tensor:
    raise AssertionError("nothing is pulled back through a graph that is only counted")
