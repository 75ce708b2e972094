"""Gradients of a run's final latents with respect to theta, what refining moves of its plan, of each image alone.

Two ways lead to the same numbers. `whole` keeps the graph of all steps, some tens of GB an image for DiT-XL/2. `stepwise` keeps only
what the run goes on from before each step: latents, the sampler's last m, and the cached values that a step ahead reads, each once
however many steps read it. From the end backwards it takes each step again with its graph, and pulls all vectors through that before
it lets go of it: one more forward in all. (Checkpointing: Griewank and Walther, ACM TOMS 26, 2000; Chen et al., arXiv 1604.06174.)

Shape suffixes: B images, C H W latent, P places of theta (`tc_lightning.planner.theta`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tc_lightning.plan.dataflow import Entry
from tc_lightning.planner.theta import Places
from tc_lightning.rollout.sampling import Rollout, RunState

Pullback = Callable[[Sequence[Tensor]], list[Tensor]]  # vectors v [B, C, H, W] -> J_b^T v_b of each image, [B, P]


class OwnTheta(NamedTuple):
    """Theta of each image's own, [B, P], a leaf: the gradient of one is then that image's alone."""

    places: Places
    values_BP: Tensor


def own_theta(run: Rollout, places: Places, x_BCHW: Tensor) -> OwnTheta:
    """The plan's, for each of these images."""
    theta_P = places.pack(run.plan).float().to(x_BCHW.device)
    return OwnTheta(places, theta_P.repeat(len(x_BCHW), 1).requires_grad_())


def whole(run: Rollout, x_BCHW: Tensor, places: Places) -> tuple[Tensor, Pullback]:
    """Final latents [B, C, H, W] of a run from noise, and what pulls vectors back through all of it; that works once."""
    own = own_theta(run, places, x_BCHW)
    state = run.start(x_BCHW)
    with torch.enable_grad():
        for _ in range(run.plan.num_steps):
            state = advance_with(run, state, own)
    end = state.x

    def pull(vectors: Sequence[Tensor]) -> list[Tensor]:
        kept = len(vectors) - 1
        return [torch.autograd.grad(end, own.values_BP, v, retain_graph=j < kept)[0] for j, v in enumerate(vectors)]

    return end.detach(), pull


def stepwise(run: Rollout, x_BCHW: Tensor, places: Places) -> tuple[Tensor, Pullback]:
    """The same, with the graph of one step at a time."""
    own = own_theta(run, places, x_BCHW)
    states = [run.start(x_BCHW)]
    with torch.no_grad():
        for _ in range(run.plan.num_steps):
            states.append(advance_with(run, states[-1], own))
    end = states.pop().x

    def pull(vectors: Sequence[Tensor]) -> list[Tensor]:
        found = [torch.zeros_like(own.values_BP) for _ in vectors]
        pulled: list[list[Tensor | None]] = [[v] for v in vectors]  # back to the state after a step: of the last one, x alone matters
        while states:
            leaf = as_leaves(states.pop())
            with torch.enable_grad():
                after = advance_with(run, leaf, own)
            for j in range(len(vectors)):
                of_own, *pulled[j] = _pull_through(after, leaf, own.values_BP, pulled[j], last=j + 1 == len(vectors))
                found[j] += of_own
        return found

    return end, pull


def advance_with(run: Rollout, state: RunState, own: OwnTheta) -> RunState:
    """Take a step with each image's own coefficients and weights."""
    eps, writes = run.predict(state, _own_weights(run, state, own))
    row, own_BF = run.plan.sampler.steps[state.step], own.places.coefficients(own.values_BP, state.step)
    m = state.x * row.m_x + eps * row.m_eps
    terms = [f * own_BF[:, j, None, None, None] for j, f in enumerate((state.x, m, *state.past))]
    return run.after(state, torch.stack(terms).sum(0), m, writes)


def _own_weights(run: Rollout, state: RunState, own: OwnTheta) -> dict[Entry, list[Tensor]]:
    """Free forecast weights of a step, one of each row of the values that they weigh: of an image there may be two rows, one half of
    guidance after the other."""
    weights = own.places.weights(own.values_BP, state.step)
    found: dict[Entry, list[Tensor]] = {}
    for read in run.plan.flows[state.step].reads:
        if read.entry in weights:
            value = state.store[read.entry, read.sources[0]]
            rows = weights[read.entry].repeat(len(value) // len(state.x), 1)
            found[read.entry] = [row.view(-1, *[1] * (value.ndim - 1)) for row in rows.unbind(1)]
    return found


def tensors(state: RunState) -> list[Tensor]:
    """All of a state, x first, in an order that is the same for every run of the plan."""
    return [state.x, *state.past, *state.store.values()]


def as_leaves(state: RunState) -> RunState:
    """A state cut off from what led to it, of which those values want gradients that theta has a say in: all but what the first step
    found in the noise."""

    def leaf(value: Tensor, step: int) -> Tensor:
        return value.detach().requires_grad_(step > 0)

    past = tuple(leaf(m, state.step - 1 - j) for j, m in enumerate(state.past))
    store = {(entry, step): leaf(value, step) for (entry, step), value in state.store.items()}
    return RunState(state.step, leaf(state.x, state.step), past, store)


def _pull_through(
    after: RunState, before: RunState, own_BP: Tensor, pulled: Sequence[Tensor | None], last: bool
) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
    """From a vector pulled back to the state after a step: its product for theta, then for each tensor of the state before,
    None for those that want none."""
    pairs = [(t, v) for t, v in zip(tensors(after), pulled, strict=False) if v is not None and t.requires_grad]
    wanting = [t for t in tensors(before) if t.requires_grad]
    outputs, vectors = zip(*pairs, strict=True)
    of_own, *found = torch.autograd.grad(outputs, [own_BP, *wanting], vectors, retain_graph=not last, allow_unused=True)
    each = iter(found)
    return of_own, *(next(each) if t.requires_grad else None for t in tensors(before))
