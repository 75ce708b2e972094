from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tc_lightning.diffusion.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, dpmpp_3m, make_sampler
from tc_lightning.diffusion.schedule import SPACINGS, NoiseSchedule
from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.plan.sampler_table import SamplerStep, SamplerTable

SCHEDULE = NoiseSchedule()
Eps = Callable[[Tensor, int], Tensor]


def apply(table: SamplerTable, x: Tensor, eps: Eps, noise: Callable[[int], Tensor] | None = None) -> Tensor:
    """The equations of `tc_lightning.plan.sampler_table`, and nothing else."""
    m_prev = m_prev2 = torch.zeros_like(x)
    for i, s in enumerate(table.steps):
        m = s.m_x * x + s.m_eps * eps(x, i)
        x = s.next_x * x + s.next_m * m + s.next_m_prev * m_prev + s.next_m_prev2 * m_prev2
        if s.noise:
            assert noise is not None
            x = x + s.noise * noise(i)
        m_prev, m_prev2 = m, m_prev
    return x


def toy_eps(times: list[float]) -> Eps:
    """Noise prediction for N(0, 1/4) data, plus a nonlinear wobble that depends on the step."""
    alpha, sigma = SCHEDULE.alpha_sigma(np.array(times))

    def eps(x: Tensor, i: int) -> Tensor:
        return float(sigma[i] / (0.25 * alpha[i] ** 2 + sigma[i] ** 2)) * x + 0.05 * torch.sin(3 * x + i)

    return eps


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)


def run_diffusers(scheduler, eps: Eps, **kwargs) -> Tensor:
    x = start()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(eps(x, i), t, x, **kwargs).prev_sample
    return x


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


# Against diffusers


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("num_steps", [10, 50])
def test_ddim_agrees_with_ddim_scheduler(spacing, num_steps):
    import diffusers

    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(num_steps)
    table = ddim(SCHEDULE, num_steps, spacing)
    times = [s.t for s in table.steps]
    assert theirs.timesteps.tolist() == times
    close(apply(table, start(), toy_eps(times)), run_diffusers(theirs, toy_eps(times)))


def dpm_solver(**config):
    """diffusers' scheduler, its noise levels from float64: in its own fp32, 1 - alpha^2 at t = 0 is off by 2e-4."""
    import diffusers

    theirs = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="zero", **config)
    theirs.alphas_cumprod = torch.from_numpy(SCHEDULE.alphas_cumprod)
    return theirs


@pytest.mark.parametrize("spacing", ["uniform", "trailing"])
@pytest.mark.parametrize("num_steps", [10, 50])
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmpp_2m, 2), (dpmpp_3m, 3)])
def test_agrees_with_dpm_solver(sampler, order, spacing, num_steps):
    table = sampler(SCHEDULE, num_steps, spacing)
    times = [s.t for s in table.steps]
    theirs = dpm_solver(solver_order=order)
    theirs.set_timesteps(timesteps=[int(t) for t in times])
    close(apply(table, start(), toy_eps(times)), run_diffusers(theirs, toy_eps(times)))


@pytest.mark.parametrize("num_steps", [8, 14, 15, 20])
@pytest.mark.parametrize(("sampler", "order"), [(dpmpp_2m, 2), (dpmpp_3m, 3)])
def test_dpmpp_on_logsnr_agrees_with_lu_lambdas(sampler, order, num_steps):
    theirs = dpm_solver(use_lu_lambdas=True, solver_order=order)
    theirs.set_timesteps(num_steps)
    table = sampler(SCHEDULE, num_steps, "logsnr")
    times = [s.t for s in table.steps]
    np.testing.assert_allclose(theirs.timesteps, times, atol=0.51)  # diffusers rounds the times, not the sigmas
    close(apply(table, start(), toy_eps(times)), run_diffusers(theirs, toy_eps(times)))


@pytest.mark.parametrize("spacing", ["uniform", "trailing"])
def test_ddpm_agrees_with_shared_noise(spacing):
    import diffusers

    table = ddpm(SCHEDULE, 25, spacing)
    times = [s.t for s in table.steps]
    theirs = diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    theirs.set_timesteps(timesteps=[int(t) for t in times])
    ours_rng, theirs_rng = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    ours = apply(table, start(), toy_eps(times), lambda i: torch.randn(2, 4, 8, 8, generator=ours_rng))
    close(ours, run_diffusers(theirs, toy_eps(times), generator=theirs_rng))


def test_schedule_agrees_with_diffusers():
    import diffusers

    theirs = diffusers.DDIMScheduler().alphas_cumprod.numpy()
    np.testing.assert_allclose(SCHEDULE.alphas_cumprod, theirs, rtol=1e-4)


# Closed forms


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_single_point_is_reached_exactly(name, spacing, num_steps):
    """If all data is x*, the exact eps is (x - alpha x*) / sigma and every solver, at any number of steps, lands on x*."""
    table = make_sampler(name, num_steps, spacing)
    alpha, sigma = SCHEDULE.alpha_sigma(np.array([s.t for s in table.steps]))
    target = torch.linspace(-1, 1, 2 * 4 * 8 * 8, dtype=torch.float64).reshape(2, 4, 8, 8)
    rng = torch.Generator().manual_seed(1)
    x = apply(
        table,
        start(torch.float64),
        lambda x, i: (x - alpha[i] * target) / sigma[i],
        lambda i: torch.randn(2, 4, 8, 8, generator=rng, dtype=torch.float64),
    )
    torch.testing.assert_close(x, target, atol=1e-9, rtol=0)


def gaussian_error(table: SamplerTable, std: float = 0.5) -> float:
    """Error against the probability-flow ODE of N(0, std^2) data, whose solution is a rescaling."""
    alpha, sigma = SCHEDULE.alpha_sigma(np.array([s.t for s in table.steps]))
    spread = (alpha * std) ** 2 + sigma**2
    x = start(torch.float64)
    end = apply(table, x, lambda x, i: float(sigma[i] / spread[i]) * x)
    return float((end - x * std / np.sqrt(spread[0])).abs().max())


def test_solvers_converge_to_the_ode():
    first = [gaussian_error(ddim(SCHEDULE, n, "logsnr")) for n in (25, 50, 100)]
    second = [gaussian_error(dpmpp_2m(SCHEDULE, n, "logsnr")) for n in (25, 50, 100)]
    assert 1.8 < first[0] / first[1] < 2.2  # order 1
    assert 1.8 < first[1] / first[2] < 2.2
    assert second[0] / second[1] > 3.0  # order 2, until the jump from t = 0 to the noiseless end shows
    assert all(b < a / 5 for a, b in zip(first, second, strict=True))


def test_third_order_beats_second_order():
    second, third = ([gaussian_error(solver(SCHEDULE, n, "logsnr")) for n in (25, 50)] for solver in (dpmpp_2m, dpmpp_3m))
    assert third[0] / third[1] > 6.0 > 4.5 > second[0] / second[1]
    assert all(b < 0.51 * a for a, b in zip(second, third, strict=True))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_keeps_the_marginals(spacing):
    """From alpha x* + sigma N to alpha' x* + sigma' N at every step."""
    table = ddpm(SCHEDULE, 20, spacing)
    alpha, sigma = SCHEDULE.alpha_sigma(np.array([s.t for s in table.steps]))
    alpha, sigma = np.append(alpha, 1.0), np.append(sigma, 0.0)
    for i, s in enumerate(table.steps):
        assert s.next_x * alpha[i] + s.next_m == pytest.approx(alpha[i + 1], abs=1e-10)
        assert (s.next_x * sigma[i]) ** 2 + s.noise**2 == pytest.approx(sigma[i + 1] ** 2, abs=1e-10)


def test_flags():
    assert not ddim(SCHEDULE, 5).uses_previous
    assert dpmpp_2m(SCHEDULE, 5).uses_previous
    assert not dpmpp_2m(SCHEDULE, 2).uses_previous  # both steps are ends
    assert [s(SCHEDULE, 5).history for s in (ddim, dpmpp_2m, dpmpp_3m)] == [0, 1, 2]
    assert [s.history for s in dpmpp_3m(SCHEDULE, 6).steps] == [0, 1, 2, 2, 1, 0]
    assert [s.history for s in dpmpp_3m(SCHEDULE, 15).steps] == [0, 1, *[2] * 12, 0]
    assert dpmpp_3m(SCHEDULE, 4).history == 1  # nothing is between the ends
    assert ddpm(SCHEDULE, 5).stochastic
    assert not dpmpp_2m(SCHEDULE, 5).stochastic


# Times


@pytest.mark.parametrize("spacing", SPACINGS)
def test_times_fall_and_stay_in_range(spacing):
    for num_steps in [*range(1, 130), 250, 333, 500, 999, 1000]:
        times = SCHEDULE.timesteps(spacing, num_steps)
        assert len(times) == num_steps
        assert (np.diff(times) < 0).all()
        assert times.min() >= 0
        assert times.max() <= 999


def test_times_by_hand():
    np.testing.assert_array_equal(SCHEDULE.timesteps("uniform", 4), [999, 666, 333, 0])
    np.testing.assert_array_equal(SCHEDULE.timesteps("leading", 4), [750, 500, 250, 0])
    np.testing.assert_array_equal(SCHEDULE.timesteps("trailing", 4), [999, 749, 499, 249])
    np.testing.assert_allclose(SCHEDULE.timesteps("quadratic", 3), [999, 249.75, 0])
    ratios = np.log(np.divide(*SCHEDULE.alpha_sigma(SCHEDULE.timesteps("logsnr", 9))))
    np.testing.assert_allclose(np.diff(ratios), np.diff(ratios)[0], rtol=1e-9)


def test_alpha_and_sigma():
    alpha, sigma = SCHEDULE.alpha_sigma(np.array([0.0, 0.5, 500.0, 999.0]))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0)
    np.testing.assert_allclose(alpha[[0, 2, 3]] ** 2, SCHEDULE.alphas_cumprod[[0, 500, 999]])
    assert sigma[0] < sigma[1] < sigma[2]


# Errors and JSON


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("euler", 10, "uniform"), "euler"),
        (("ddim", 10, "karras"), "karras"),
        (("ddim", 0, "uniform"), "0 sampling steps"),
        (("ddpm", 1001, "leading"), "1001"),
    ],
)
def test_bad_samplers(args, word):
    with pytest.raises(TokenCacheError, match=word):
        make_sampler(*args)


@pytest.mark.parametrize("name", SAMPLERS)
def test_json_is_exact(name):
    table = make_sampler(name, 7, "logsnr")
    assert SamplerTable.from_json(table.to_json()) == table
    assert ("next_m_prev2" in table.to_json()) == (name == "dpmpp_3m")


@pytest.mark.parametrize(
    "change",
    [{"t": None}, {"t": [1.0]}, {"extra": []}, {"m_x": ["a", "b"]}, {"noise": [True, False]}, {"next_x": [1.0, float("nan")]}],
)
def test_bad_json(change):
    with pytest.raises(PlanError):
        SamplerTable.from_json(make_sampler("ddim", 2).to_json() | change)
    with pytest.raises(PlanError):
        SamplerTable.from_json([])  # type: ignore[arg-type]


def test_bad_tables():
    step = SamplerStep(1.0, 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(PlanError, match="no steps"):
        SamplerTable("x", "y", ())
    with pytest.raises(PlanError, match="not finite"):
        SamplerTable("x", "y", (step, dataclasses.replace(step, m_x=float("inf"))))
    for at, back in ((0, {"next_m_prev": 1.0}), (0, {"next_m_prev2": 1.0}), (1, {"next_m_prev2": 1.0})):
        steps = [step, step, step]
        steps[at] = dataclasses.replace(step, **back)
        with pytest.raises(PlanError, match=f"step {at} looks {1 + ('next_m_prev2' in back)} steps back"):
            SamplerTable("x", "y", tuple(steps))
