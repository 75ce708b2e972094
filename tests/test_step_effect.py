from __future__ import annotations

import pytest
import torch
from conftest import make_plan, make_teacher

from tc_lightning.cache.soft_network import enter, guided_eps
from tc_lightning.diffusion.update import advance, coefficients
from tc_lightning.measure.step_effect import step_effect
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, skip
from tc_lightning.rollout.sampling import sample_steps

T, GUIDED = 4, Guidance(2.5, 1)
MODEL = make_teacher(1, input_size=4, in_channels=2, hidden_size=16, depth=2).double()
X_T, LABELS = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.tensor([1, 4])


def full(sampler: str, guidance: Guidance) -> CachePlan:
    return make_plan(MODEL, ((compute(0, 2),),) * T, guidance, sampler)


def run(model: DiT, plan: CachePlan, x: torch.Tensor, at: int, error: torch.Tensor) -> torch.Tensor:
    """Final latents when `error` is added to the eps of step `at`."""
    past: list[torch.Tensor] = []
    for i, row in enumerate(plan.sampler.steps):
        z, mods, final = enter(model, plan.guidance, x, torch.full((len(x),), row.t), LABELS)
        for block, mod in zip(model.blocks, mods, strict=True):
            z = block(z, mod)
        eps = guided_eps(model, plan.guidance, z, final)
        x, m = advance(x, eps + error if i == at else eps, past, coefficients(row))
        past = [m, *past][:2]
    return x


@pytest.mark.parametrize(("sampler", "guidance"), [("ddim", Guidance()), ("dpmpp_2m", GUIDED), ("dpmpp_3m", GUIDED)])
def test_agrees_with_perturbing_one_step_and_running_the_rest(sampler: str, guidance: Guidance) -> None:
    """The exact Jacobian, column by column, against the mean of many probes."""
    plan, size, h = full(sampler, guidance), X_T[0].numel(), 1e-5
    clean = run(MODEL, plan, X_T, 0, torch.zeros_like(X_T))
    exact = []
    for at in range(T):
        moved = [run(MODEL, plan, X_T, at, h * unit.view_as(X_T[:1])) - clean for unit in torch.eye(size, dtype=torch.float64)]
        exact.append(torch.stack(moved).square().sum() / h**2 / (size * len(X_T)))
    probes = 40
    estimates = torch.stack([step_effect(MODEL, plan, X_T, LABELS, first_index=2 * p) for p in range(probes)])
    standard_error = estimates.std(0) / probes**0.5
    assert ((estimates.mean(0) - torch.stack(exact)).abs() < 4 * standard_error + 1e-6).all()


def test_the_last_step_is_known_in_closed_form() -> None:
    plan = full("ddim", Guidance(1.5, 2))
    row, effect = plan.sampler.steps[-1], step_effect(MODEL, plan, X_T.repeat(50, 1, 1, 1), LABELS.repeat(50))
    assert effect[-1] == pytest.approx((row.next_m * row.m_eps) ** 2, rel=0.1)  # mean square of 3200 normals


def test_depends_neither_on_batches_nor_on_what_the_plan_caches() -> None:
    plan = full("dpmpp_2m", Guidance(1.5, 2))
    cached = make_plan(MODEL, ((compute(0, 2),), *((skip(0, 2),),) * (T - 1)), plan.guidance, "dpmpp_2m")
    together = step_effect(MODEL, plan, X_T, LABELS)
    alone = [step_effect(MODEL, plan, X_T[i : i + 1], LABELS[i : i + 1], first_index=i) for i in range(2)]
    torch.testing.assert_close(torch.stack(alone).mean(0), together)
    torch.testing.assert_close(step_effect(MODEL, cached, X_T, LABELS), together)
    assert together.dtype == torch.float64
    assert all(not p.requires_grad for p in MODEL.parameters())
    assert len(list(sample_steps(MODEL, plan, X_T, LABELS))) == T
