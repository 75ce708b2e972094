from __future__ import annotations

import pytest
import torch

from tc_lightning.models.predictor import INITIAL_IMPORTANCE, CachePredictor, RouterPredictor, RouterTable


def test_starts_between_computing_and_reusing() -> None:
    w_BLN = CachePredictor(3, 16)(torch.tensor([0.0, 500.0, 999.0]))
    assert w_BLN.shape == (3, 3, 16)
    assert torch.allclose(w_BLN, torch.full_like(w_BLN, INITIAL_IMPORTANCE))


def test_every_parameter_gets_a_gradient_and_can_tell_times_blocks_and_tokens_apart() -> None:
    torch.manual_seed(0)
    predictor = CachePredictor(2, 4, hidden_size=16)
    t_B, target_BLN = torch.tensor([100.0, 900.0]), torch.rand(2, 2, 4).round() * 0.8 + 0.1
    optimiser = torch.optim.Adam(predictor.parameters(), 0.05)
    for _ in range(150):
        optimiser.zero_grad()
        loss = (predictor(t_B) - target_BLN).square().mean()
        loss.backward()
        optimiser.step()
    assert loss < 0.01  # 0.16 where times, blocks and tokens are all alike
    assert all(p.grad is not None and p.grad.any() for p in predictor.parameters())


def test_is_fp32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert CachePredictor(2, 4)(torch.tensor([3.0])).dtype == torch.float32


def test_router_has_a_weight_for_each_step_block_and_branch() -> None:
    torch.manual_seed(0)
    router = RouterPredictor(torch.linspace(999, 0, 6), 3, hidden_size=16)
    assert torch.allclose(router(), torch.full((6, 3, 2), INITIAL_IMPORTANCE))
    target_TL2 = torch.rand(6, 3, 2).round() * 0.8 + 0.1  # neighbouring steps have nothing in common
    optimiser = torch.optim.Adam(router.parameters(), 0.05)
    for _ in range(150):
        optimiser.zero_grad()
        loss = (router() - target_TL2).square().mean()
        loss.backward()
        optimiser.step()
    assert loss < 0.01
    assert all(p.grad is not None and p.grad.any() for p in router.parameters())


def test_a_table_starts_at_random_around_its_start() -> None:
    torch.manual_seed(0)
    w_TL2 = RouterTable(50, 12, start=0.2)().detach()
    assert w_TL2.shape == (50, 12, 2)
    assert w_TL2.median() == pytest.approx(0.2, abs=0.02)
    assert 0.1 < w_TL2.std() < 0.3
