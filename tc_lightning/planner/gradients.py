"""Gradients of a run's final latents with respect to the coefficients of its sampler, of each image alone.

Two ways lead to the same numbers. `whole` keeps the graph of all steps, some tens of GB an image for DiT-XL/2. `stepwise` keeps only
what the run goes on from before each step: latents, the sampler's last m, and the cached values that a step ahead reads, each once
however many steps read it. From the end backwards it takes each step again with its graph, and pulls all vectors through that before
it lets go of it: one more forward in all. (Checkpointing: Griewank and Walther, ACM TOMS 26, 2000; Chen et al., arXiv 1604.06174.)

Shape suffixes: B images, C H W latent, T steps, F coefficients of a step, P = T F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.planner.fit import COEFFICIENTS
from tc_lightning.rollout.sampling import Rollout, RunState

Pullback = Callable[[Sequence[Tensor]], list[Tensor]]  # vectors v [B, C, H, W] -> J_b^T v_b of each image, [B, P]


def coefficients(plan: CachePlan) -> Tensor:
    """What each step multiplies x, its m and the last ones with, [T, F]."""
    return torch.tensor([[getattr(row, name) for name in COEFFICIENTS] for row in plan.sampler.steps])


def own_coefficients(plan: CachePlan, images: int, device: torch.device) -> Tensor:
    """Coefficients of each image's own, [B, T, F], a leaf: the gradient of one is then that image's alone."""
    return coefficients(plan).to(device).repeat(images, 1, 1).requires_grad_()


def whole(run: Rollout, x_BCHW: Tensor) -> tuple[Tensor, Pullback]:
    """Final latents [B, C, H, W] of a run from noise, and what pulls vectors back through all of it; that works once."""
    own_BTF = own_coefficients(run.plan, len(x_BCHW), x_BCHW.device)
    state = run.start(x_BCHW)
    with torch.enable_grad():
        for _ in range(run.plan.num_steps):
            state = advance_with(run, state, own_BTF)
    end = state.x

    def pull(vectors: Sequence[Tensor]) -> list[Tensor]:
        kept = len(vectors) - 1
        return [torch.autograd.grad(end, own_BTF, v, retain_graph=j < kept)[0].flatten(1) for j, v in enumerate(vectors)]

    return end.detach(), pull


def stepwise(run: Rollout, x_BCHW: Tensor) -> tuple[Tensor, Pullback]:
    """The same, with the graph of one step at a time."""
    own_BTF = own_coefficients(run.plan, len(x_BCHW), x_BCHW.device)
    states = [run.start(x_BCHW)]
    with torch.no_grad():
        for _ in range(run.plan.num_steps):
            states.append(advance_with(run, states[-1], own_BTF))
    end = states.pop().x

    def pull(vectors: Sequence[Tensor]) -> list[Tensor]:
        found = [torch.zeros_like(own_BTF) for _ in vectors]
        pulled: list[list[Tensor | None]] = [[v] for v in vectors]  # back to the state after a step: of the last one, x alone matters
        while states:
            leaf = as_leaves(states.pop())
            with torch.enable_grad():
                after = advance_with(run, leaf, own_BTF)
            for j in range(len(vectors)):
                of_own, *pulled[j] = _pull_through(after, leaf, own_BTF, pulled[j], last=j + 1 == len(vectors))
                found[j] += of_own
        return [gradient.flatten(1) for gradient in found]

    return end, pull


def advance_with(run: Rollout, state: RunState, own_BTF: Tensor) -> RunState:
    """Take a step with each image's own coefficients."""
    eps, writes = run.predict(state)
    row = run.plan.sampler.steps[state.step]
    m = state.x * row.m_x + eps * row.m_eps
    terms = [f * own_BTF[:, state.step, j, None, None, None] for j, f in enumerate((state.x, m, *state.past))]
    return run.after(state, torch.stack(terms).sum(0), m, writes)


def tensors(state: RunState) -> list[Tensor]:
    """All of a state, x first, in an order that is the same for every run of the plan."""
    return [state.x, *state.past, *state.store.values()]


def as_leaves(state: RunState) -> RunState:
    """A state cut off from what led to it, of which those values want gradients that coefficients have a say in: all but what the
    first step found in the noise."""

    def leaf(value: Tensor, step: int) -> Tensor:
        return value.detach().requires_grad_(step > 0)

    past = tuple(leaf(m, state.step - 1 - j) for j, m in enumerate(state.past))
    store = {(entry, step): leaf(value, step) for (entry, step), value in state.store.items()}
    return RunState(state.step, leaf(state.x, state.step), past, store)


def _pull_through(
    after: RunState, before: RunState, own_BTF: Tensor, pulled: Sequence[Tensor | None], last: bool
) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
    """From a vector pulled back to the state after a step: its product for the coefficients, then for each tensor of the state before,
    None for those that want none."""
    pairs = [(t, v) for t, v in zip(tensors(after), pulled, strict=False) if v is not None and t.requires_grad]
    wanting = [t for t in tensors(before) if t.requires_grad]
    outputs, vectors = zip(*pairs, strict=True)
    of_own, *found = torch.autograd.grad(outputs, [own_BTF, *wanting], vectors, retain_graph=not last, allow_unused=True)
    each = iter(found)
    return of_own, *(next(each) if t.requires_grad else None for t in tensors(before))
