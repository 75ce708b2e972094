from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tc_lightning.cache.semantics import Step, run_blocks
from tc_lightning.cache.soft_network import enter, guided_eps
from tc_lightning.measure.sensitivity import branch_sensitivity, probes_for, token_sensitivity
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import BRANCHES, Segment, compute, reuse

CONFIG = DiTConfig(input_size=8, in_channels=2, hidden_size=24, depth=3, num_heads=2, num_classes=5, learn_sigma=True)
GUIDANCES = [Guidance(1.0, 2), Guidance(1.5, 2), Guidance(4.0, 1)]


@pytest.fixture(scope="module")
def model() -> DiT:
    return randomise_(DiT(CONFIG), 0, 0.15).double().eval().requires_grad_(False)


def inputs(scale: float, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_prev, x, t_prev, t, labels; a small scale puts the steps close together."""
    generator = torch.Generator().manual_seed(1)
    x, move = torch.randn(2, batch, 2, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([400.0, 700.0], dtype=torch.float64)[:batch]
    return x + scale * move, x, t + 20 * scale, t, torch.tensor([3, 0])[:batch]


def intervene(model: DiT, guidance: Guidance, x_prev: Tensor, x: Tensor, t_prev: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Mean squared change of guided eps, [B, L, 2], reusing one branch of one block at a time with the semantics of a plan."""
    L, blocks = CONFIG.depth, list(model.blocks)

    def run(x: Tensor, t: Tensor, segments: tuple[Segment, ...], cached: dict, wanted: list) -> tuple[Tensor, dict]:
        z, mods, final = enter(model, guidance, x, t, y)
        z, writes = run_blocks(Step(segments, (None,) * len(segments), cached, wanted), z, blocks, mods)
        return guided_eps(model, guidance, z, final), writes

    entries = [Entry(branch, b, b + 1) for b in range(L) for branch in BRANCHES]
    _, cached = run(x_prev, t_prev, (compute(0, L),), {}, entries)
    eps, _ = run(x, t, (compute(0, L),), {}, [])
    changes = []
    for entry in entries:
        b = entry.start
        parts = (compute(0, b), reuse(b, b + 1, (entry.kind,)), compute(b + 1, L))
        changed, _ = run(x, t, tuple(s for s in parts if s.start < s.stop), cached, [])
        changes.append((changed - eps).square().flatten(1).mean(1))
    return torch.stack(changes, 1).unflatten(1, (L, 2))


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_agrees_with_intervention_within_sampling_error(model: DiT, guidance: Guidance) -> None:
    args, probes = inputs(1e-4), 1000
    v = torch.randn(probes, 2, 2, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ratio = branch_sensitivity(model, guidance, *args, v) / intervene(model, guidance, *args)
    assert (ratio - 1).abs().max() < 4.5 * (2 / probes) ** 0.5
    assert abs(ratio.mean() - 1) < 0.1


def test_ranks_like_intervention_for_realistic_steps(model: DiT) -> None:
    args, guidance = inputs(0.1), Guidance(1.5, 2)
    v = torch.randn(200, 2, 2, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    estimate = branch_sensitivity(model, guidance, *args, v).mean(0).flatten()
    measured = intervene(model, guidance, *args).mean(0).flatten()
    ranks = [np.argsort(np.argsort(values.numpy())) for values in (estimate, measured)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9


def test_does_not_depend_on_the_batch(model: DiT) -> None:
    args, guidance = inputs(0.1), Guidance(1.5, 2)
    v = probes_for(model, sample=7, steps=[3, 4], count=2).double()
    together = branch_sensitivity(model, guidance, *args, v)
    alone = branch_sensitivity(model, guidance, *(a[1:] for a in args), probes_for(model, 7, [4], 2).double())
    assert torch.allclose(together[1:], alone, rtol=1e-9)
    assert not torch.equal(probes_for(model, 7, [3], 1), probes_for(model, 8, [3], 1))


def test_unchanged_latents_cost_nothing_to_reuse(model: DiT) -> None:
    args, v = inputs(0.0), probes_for(model, 0, [1, 2], 1).double()
    assert not branch_sensitivity(model, Guidance(1.5, 2), *args, v).any()


def test_a_branch_is_bounded_by_its_tokens(model: DiT) -> None:
    args, v = inputs(1e-3), probes_for(model, 0, [1, 2], 3).double()
    tokens = token_sensitivity(model, Guidance(1.5, 2), *args, v)
    branch = branch_sensitivity(model, Guidance(1.5, 2), *args, v)
    assert tokens.shape == (*branch.shape, CONFIG.num_tokens)
    assert (branch <= CONFIG.num_tokens * tokens.sum(-1) * (1 + 1e-9)).all()  # Cauchy-Schwarz
