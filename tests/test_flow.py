"""Flow matching: both conventions of time, its spacings, its samplers against closed forms and diffusers, and its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import VP
from test_samplers import apply, close, run_diffusers, start
from torch import Tensor

from tc_lightning.diffusion.flow import Flow
from tc_lightning.diffusion.loss import VelocityLoss, training_loss
from tc_lightning.diffusion.samplers import SAMPLERS, SOLVERS, euler, make_sampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.sampler_table import SamplerTable

SIT, SD3 = Flow(0.0, 1.0), Flow(1000.0, 0.0)  # data at t = 1; noise at t = 1,000
FLOWS = pytest.mark.parametrize("flow", [SIT, SD3], ids=["sit", "sd3"])
NAMES = pytest.mark.parametrize("name", [*SOLVERS, "euler"])
SPACINGS = (*SIT.spacings, "mix:0.5", "shift:0.5", "sd3:3")


@dataclasses.dataclass(frozen=True)
class At(Flow):
    """A flow at given noise levels, whatever the spacing."""

    levels: tuple[float, ...] = ()

    def _sigmas(self, spacing: str, num_steps: int) -> np.ndarray:
        return np.array(self.levels)


def levels(flow: Flow, table: SamplerTable) -> list[float]:
    return flow.alpha_sigma(np.array([s.t for s in table.steps]))[1].tolist()


def network(sigma: list[float], sign: float) -> Callable[[Tensor, int], Tensor]:
    """Velocity from noise to data (sign 1) or back (-1) for N(0.9, 1/4) data, plus a nonlinear wobble that depends on the step."""

    def velocity(x: Tensor, i: int) -> Tensor:
        alpha, s = 1 - sigma[i], sigma[i]
        spread = 0.25 * alpha**2 + s**2
        gain = (x - 0.9 * alpha) / spread
        return sign * ((0.9 + 0.25 * alpha * gain) - s * gain + 0.05 * torch.sin(3 * x + i))

    return velocity


# Against diffusers


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 10, 50])
@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_agrees_with_flow_match_euler(name, shift, num_steps):
    import diffusers

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps).tolist())
    table = make_sampler(SD3, name, num_steps, f"shift:{shift:g}")
    assert [s.t for s in table.steps] == pytest.approx(theirs.timesteps.tolist(), rel=1e-6)
    sigma = levels(SD3, table)
    close(apply(table, start(), network(sigma, -1.0)), run_diffusers(theirs, network(sigma, -1.0)))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 28, 50])
def test_agrees_with_flow_match_euler_that_is_told_a_number_of_steps(shift, num_steps):
    """It then ends at the last level of its training grid, which it has shifted, and shifts that again."""
    import diffusers

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(num_steps)
    table = make_sampler(SD3, "euler", num_steps, f"sd3:{shift:g}")
    assert [s.t for s in table.steps] == pytest.approx(theirs.timesteps.tolist(), rel=1e-6)
    sigma = levels(SD3, table)
    close(apply(table, start(), network(sigma, -1.0)), run_diffusers(theirs, network(sigma, -1.0)))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("dpmpp_3m", 3)])
def test_agrees_with_dpm_solver_on_flow_sigmas(name, order, shift, num_steps):
    import diffusers

    theirs = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, solver_order=order, final_sigmas_type="zero"
    )
    theirs.set_timesteps(num_steps)
    sigma = theirs.sigmas.double()[:-1].tolist()
    table = make_sampler(At(1000.0, 0.0, tuple(sigma)), name, num_steps)
    close(apply(table, start(), network(sigma, -1.0)), run_diffusers(theirs, network(sigma, -1.0)))


@pytest.mark.parametrize("num_steps", [2, 10, 20])
@pytest.mark.parametrize(("name", "order"), [("dpmpp_2m", 2), ("dpmpp_3m", 3)])
def test_agrees_with_dpm_solver_from_pure_noise(name, order, num_steps):
    """At sigma = 1 the log-SNR is minus infinity, and the first step has no past: theirs goes through that as well."""
    import diffusers

    theirs = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=order, final_sigmas_type="zero"
    )
    theirs.set_timesteps(num_steps)
    table = make_sampler(SD3, name, num_steps, "uniform")
    theirs.sigmas = torch.tensor([*levels(SD3, table), 0.0], dtype=torch.float64)
    close(apply(table, start(), network(levels(SD3, table), -1.0)), run_diffusers(theirs, network(levels(SD3, table), -1.0)))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_agrees_with_unipc_on_flow_sigmas(shift, num_steps):
    import diffusers

    theirs = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    theirs.set_timesteps(num_steps)
    sigma = theirs.sigmas.double()[:-1].tolist()
    table = make_sampler(At(1000.0, 0.0, tuple(sigma)), "unipc", num_steps)
    close(apply(table, start(), network(sigma, -1.0)), run_diffusers(theirs, network(sigma, -1.0)))


# Identities and closed forms


@FLOWS
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_is_ddim(flow, spacing):
    """But for what m stands for: weights of latents and output in the next latents are the same."""
    for num_steps in (1, 2, 7, 50):
        for a, b in zip(*(make_sampler(flow, name, num_steps, spacing).steps for name in ("euler", "ddim")), strict=True):
            assert a.t == b.t
            assert a.next_x + a.next_m * a.m_x == pytest.approx(b.next_x + b.next_m * b.m_x, abs=1e-12)
            assert a.next_m * a.m_eps == pytest.approx(b.next_m * b.m_eps, abs=1e-12)


@NAMES
@pytest.mark.parametrize("spacing", SPACINGS)
def test_both_conventions_take_the_same_steps(name, spacing):
    ours, theirs = (make_sampler(flow, name, 9, spacing) for flow in (SIT, SD3))
    np.testing.assert_allclose([1000 * (1 - s.t) for s in ours.steps], [s.t for s in theirs.steps], atol=1e-9)
    for a, b in zip(ours.steps, theirs.steps, strict=True):
        signs = (1.0, -1.0) if name != "euler" else (-1.0, 1.0)  # the output's sign is in m_eps, or in the step along it
        if name == "euler":
            assert (a.next_m, a.m_eps) == pytest.approx((-b.next_m, b.m_eps), abs=1e-12)
        else:
            assert (a.next_m, a.m_eps) == pytest.approx((b.next_m, signs[1] * b.m_eps), abs=1e-12)
        assert (a.next_x, a.m_x, a.next_m_prev) == pytest.approx((b.next_x, b.m_x, b.next_m_prev), abs=1e-12)


@FLOWS
@NAMES
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 50])
def test_single_point_is_reached_exactly(flow, name, spacing, num_steps):
    """If all data is x*, the velocity is (x* - x) / sigma towards data, and every solver at any number of steps lands on x*."""
    table = make_sampler(flow, name, num_steps, spacing)
    sigma, sign = levels(flow, table), 1.0 if flow is SIT else -1.0
    target = torch.linspace(-1, 1, 512, dtype=torch.float64).reshape(2, 4, 8, 8)
    end = apply(table, start(torch.float64), lambda x, i: sign * (target - x) / sigma[i])
    torch.testing.assert_close(end, target, atol=1e-9, rtol=0)


def test_euler_by_hand():
    first, second = euler(SIT, 2).steps
    assert (first.t, first.m_x, first.m_eps, first.next_x, first.next_m) == (0.0, 0.0, 1.0, 1.0, 0.5)
    assert (second.t, second.next_x, second.next_m) == (0.5, 1.0, 0.5)
    assert [s.t for s in euler(SD3, 2).steps] == [1000.0, 500.0]
    assert [s.next_m for s in euler(SD3, 2).steps] == [-0.5, -0.5]


@FLOWS
def test_solvers_converge_to_the_ode(flow):
    """Whose solution for N(0, 1/4) data is a rescaling, by 1/2 from noise to data."""

    def error(name: str, num_steps: int) -> float:
        table = make_sampler(flow, name, num_steps, "quadratic")
        sigma, sign, x = levels(flow, table), 1.0 if flow is SIT else -1.0, start(torch.float64)

        def velocity(x: Tensor, i: int) -> Tensor:
            alpha = 1 - sigma[i]
            return sign * (0.25 * alpha - sigma[i]) / (0.25 * alpha**2 + sigma[i] ** 2) * x

        return float((apply(table, x, velocity) - 0.5 * x).abs().max())

    first, second, third = ([error(name, n) for n in (25, 50)] for name in ("euler", "dpmpp_2m", "unipc"))
    assert 1.8 < first[0] / first[1] < 2.2
    assert second[0] / second[1] > 3.0
    assert third[1] < second[1] < 0.05 * first[1]


@FLOWS
def test_what_the_output_tells(flow):
    """x_0 and eps from latents and output, also where one of alpha and sigma is 0."""
    x0, eps = 0.7, -1.3
    out = (x0 - eps) if flow is SIT else (eps - x0)
    for sigma in (0.0, 0.25, 1.0):
        x = (1 - sigma) * x0 + sigma * eps
        for linear, truth in ((flow.x0(1 - sigma, sigma), x0), (flow.eps(1 - sigma, sigma), eps)):
            assert linear.of_x * x + linear.of_output * out == pytest.approx(truth, abs=1e-12)


# Times


@FLOWS
@pytest.mark.parametrize("spacing", SPACINGS)
def test_times_go_from_noise_towards_data(flow, spacing):
    for num_steps in (1, 2, 3, 17, 50, 400, 1500):
        sigma = flow.alpha_sigma(flow.timesteps(spacing, num_steps))[1]
        assert len(sigma) == num_steps
        assert sigma[0] == 1.0
        assert (np.diff(sigma) < 0).all()
        assert sigma[-1] > 0.0
        assert np.isfinite(flow.log_ratio(flow.timesteps(spacing, num_steps))[1:]).all()


def test_times_by_hand():
    np.testing.assert_allclose(SIT.timesteps("uniform", 4), [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(SD3.timesteps("uniform", 4), [1000, 750, 500, 250])
    np.testing.assert_allclose(SD3.timesteps("shift:3", 2), [1000, 750])
    np.testing.assert_allclose(SD3.timesteps("sd3:1", 3), [1000, 500.5, 1])
    np.testing.assert_allclose(SD3.timesteps("quadratic", 2), [1000, 250])
    np.testing.assert_allclose(SD3.timesteps("mix:0.5", 3), (SD3.timesteps("quadratic", 3) + SD3.timesteps("logsnr", 3)) / 2)
    np.testing.assert_allclose(np.diff(SIT.log_ratio(SIT.timesteps("logsnr", 11)[1:])), -1.0)
    assert (SIT.clock(0.0), SIT.clock(1.0), SD3.clock(250.0), VP.clock(250.0)) == (1000.0, 0.0, 250.0, 250.0)


# Errors


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("ddpm", 10, "uniform"), "a flow has none: choose euler or ddim"),
        (
            ("euler", 10, "leading"),
            "unknown spacing 'leading': choose one of uniform, quadratic, logsnr, shift:3, or mix:W",
        ),
        (("euler", 10, "shift:0"), "shift:0"),
        (("euler", 10, "shift:x"), "shift:x"),
        (("euler", 10, "sd3:-1"), "sd3:-1.*or shift:S or sd3:S with S above 0"),
        (("euler", 10, "shift:inf"), "shift:inf"),
        (("euler", 10, "mix:nan"), "mix:nan"),
        (("euler", 0, "uniform"), "0 sampling steps"),
    ],
)
def test_bad_samplers(args, word):
    with pytest.raises(TokenCacheError, match=word):
        make_sampler(SIT, *args)


def test_a_path_has_a_length():
    for ends in ((1.0, 1.0), (float("nan"), 0.0), (float("inf"), 0.0)):
        with pytest.raises(TokenCacheError, match="no length"):
            Flow(*ends)


def test_every_sampler_is_a_solver_of_its_own_or_says_why_not():
    assert set(SAMPLERS) == {*SOLVERS, "euler", "ddpm"}


# Loss


class Oracle(torch.nn.Module):
    """Answers with what it is told, and remembers what it was asked."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.x, self.t = x, t
        return self.out


@FLOWS
def test_velocity_loss_by_hand(flow):
    x0, noise = torch.full((3, 1, 2, 2), 0.5), torch.full((3, 1, 2, 2), -1.0)
    velocity = 1.5 if flow is SIT else -1.5  # how x moves while time grows
    t = torch.tensor([flow.noise_at, (flow.noise_at + flow.data_at) / 2, flow.data_at])
    oracle = Oracle(torch.full((3, 1, 2, 2), velocity))
    loss = VelocityLoss(flow)
    assert loss(oracle, x0, torch.zeros(3), t, noise) == 0.0
    torch.testing.assert_close(oracle.x[:, 0, 0, 0], torch.tensor([-1.0, -0.25, 0.5]))
    torch.testing.assert_close(oracle.t, t)
    assert loss(Oracle(torch.full((3, 2, 2, 2), velocity + 2.0)), x0, torch.zeros(3), t, noise) == pytest.approx(4.0)


@FLOWS
@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_times_of_training(flow, times):
    torch.manual_seed(0)
    loss = training_loss(flow, times)
    sigma = torch.from_numpy(flow.alpha_sigma(loss.draw(20_000, torch.device("cpu")).double().numpy())[1])
    assert ((sigma >= 0) & (sigma <= 1)).all()
    middle = ((sigma - 0.5).abs() < 0.25).double().mean().item()
    assert middle == pytest.approx(0.5 if times == "uniform" else 0.728, abs=0.02)  # P(|N(0, 1)| < log 3)
    spread = flow.alpha_sigma(loss.spread(4, torch.device("cpu")).double().numpy())[1]
    np.testing.assert_allclose(spread, [0.875, 0.625, 0.375, 0.125], atol=1e-6)


def test_bad_times_of_training():
    with pytest.raises(TokenCacheError, match="logit_normal"):
        training_loss(VP, "logit_normal")
    with pytest.raises(TokenCacheError, match="choose uniform or logit_normal"):
        training_loss(SIT, "cosine")
