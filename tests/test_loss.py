from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from tc_lightning.diffusion.linear_betas import LinearBetas
from tc_lightning.diffusion.loss import StepLoss, _discretised_gaussian_nll
from tc_lightning.models.dit import DiT, DiTConfig, randomise_

TINY = DiTConfig(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)
LOSS = StepLoss(LinearBetas())


class Oracle(nn.Module):
    """Answers with a given output."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = nn.Parameter(out)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.out


def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1
    return x0, torch.zeros(size, dtype=torch.long), torch.randn(size, 1, 8, 8, generator=generator)


def test_fixed_sigma_is_mean_squared_error():
    x0, y, noise = batch(4)
    t = torch.tensor([0, 1, 500, 999])
    assert LOSS(Oracle(noise.clone()), x0, y, t, noise) == 0.0
    assert LOSS(Oracle(noise + 2.0), x0, y, t, noise).item() == pytest.approx(4.0, rel=1e-5)


@pytest.mark.parametrize("t", [1, 2, 10, 500, 999])
def test_kl_is_zero_at_the_posterior(t):
    """True noise and v = -1, the posterior's own variance: the prediction is the posterior."""
    x0, y, noise = batch(1)
    out = torch.cat([noise, -torch.ones_like(noise)], 1)
    assert abs(LOSS(Oracle(out), x0, y, torch.tensor([t]), noise).item()) < 1e-5


@pytest.mark.parametrize("t", [1, 17, 500, 999])
def test_kl_by_hand(t):
    """Against torch's KL of two Gaussians, written with betas as in Ho et al., eq. 7."""
    x0, y, noise = (a.double() if a.is_floating_point() else a for a in batch(1))
    generator = torch.Generator().manual_seed(t)
    eps, v = (
        noise + 0.1 * torch.randn(noise.shape, generator=generator, dtype=torch.float64),
        torch.rand(noise.shape, generator=generator),
    )
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    before, now = bar[t - 1], bar[t]
    xt = now.sqrt() * x0 + (1 - now).sqrt() * noise

    def mean(x: Tensor) -> Tensor:
        return before.sqrt() * beta[t] / (1 - now) * x + (1 - beta[t]).sqrt() * (1 - before) / (1 - now) * xt

    variance = beta[t] * (1 - before) / (1 - now)
    learned = torch.exp((v + 1) / 2 * beta[t].log() + (1 - v) / 2 * variance.log())
    x0_hat = (xt - (1 - now).sqrt() * eps) / now.sqrt()
    kl = kl_divergence(Normal(mean(x0), variance.sqrt()), Normal(mean(x0_hat), learned.sqrt())).mean() / math.log(2)
    expected = (eps - noise).square().mean() + kl
    got = LOSS(Oracle(torch.cat([eps, v], 1).float()), x0.float(), y, torch.tensor([t]), noise.float())
    assert got.item() == pytest.approx(expected.item(), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("t", [0, 1, 300, 999])
def test_v_tells_what_eps_tells(t):
    """The true v costs nothing, and the variational term of a learned variance is that of the eps it stands for."""
    x0, y, noise = batch(1)
    schedule = LinearBetas(predicts="v")
    alpha, sigma = (float(value) for value in schedule.alpha_sigma(t))
    v = alpha * noise - sigma * x0
    times, variance = torch.tensor([t]), torch.rand(noise.shape, generator=torch.Generator().manual_seed(t))
    loss = StepLoss(schedule)
    assert loss(Oracle(v), x0, y, times, noise).item() < 1e-12
    assert loss(Oracle(v + 2.0), x0, y, times, noise).item() == pytest.approx(4.0, rel=1e-5)
    of_v, of_eps = (
        loss(Oracle(torch.cat([v, variance], 1)), x0, y, times, noise),
        LOSS(Oracle(torch.cat([noise, variance], 1)), x0, y, times, noise),
    )
    assert of_v.item() == pytest.approx(of_eps.item(), rel=1e-3, abs=1e-5)


def test_finite_at_all_times():
    x0, y, noise = batch(1000)
    generator = torch.Generator().manual_seed(1)
    model = Oracle(torch.randn(1000, 2, 8, 8, generator=generator))
    loss = LOSS(model, x0, y, torch.arange(1000), noise)
    loss.backward()
    assert loss.isfinite()
    assert model.out.grad.isfinite().all()


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_finite_at_the_ends_of_the_range(value):
    _, y, noise = batch(2)
    model = Oracle(torch.cat([noise, 3.0 * torch.ones_like(noise)], 1))
    loss = LOSS(model, torch.full_like(noise, value), y, torch.tensor([0, 999]), noise)
    loss.backward()
    assert loss.isfinite()
    assert model.out.grad.isfinite().all()


def test_variational_term_moves_the_variance_alone():
    x0, y, noise = batch(3)
    eps = noise + 0.3
    model = Oracle(torch.cat([eps, torch.zeros_like(eps)], 1))
    LOSS(model, x0, y, torch.tensor([0, 40, 999]), noise).backward()
    torch.testing.assert_close(model.out.grad[:, :1], 2 * (eps - noise) / eps.numel())
    assert (model.out.grad[:, 1:] != 0).any()


def test_levels_have_a_total_probability_of_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, scale in ((0.2, 0.1), (-0.99, 0.02), (1.0, 0.5)):
        nll = _discretised_gaussian_nll(levels, torch.tensor(mean, dtype=torch.float64), torch.tensor(scale).double().log())
        assert nll.neg().exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_real_model(learn_sigma):
    model = randomise_(DiT(dataclasses.replace(TINY, learn_sigma=learn_sigma)), seed=0)
    x0, y, noise = batch(5)
    loss = LOSS(model, x0, y, torch.tensor([0, 1, 500, 998, 999]), noise)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
