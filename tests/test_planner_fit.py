"""What the planner fits to: the target by identities, and the fit of a sampler to it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import VP, vp_sampler
from planning import GUIDANCE, STEPS

from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.models.dit import DiT
from tc_lightning.planner.fit import fit_sampler
from tc_lightning.planner.target import TargetRun
from tc_lightning.rollout.ranks import Ranks
from tc_lightning.rollout.sampling import full_plan, model_signature, sample


class TestTarget:
    def test_it_is_the_full_run_whatever_the_batch(self, model: DiT, target: TargetRun) -> None:
        plan = full_plan(model_signature(model), vp_sampler("ddim", STEPS), GUIDANCE)
        again = sample(model, plan, target.x_T, target.given)
        assert (again - target.x_0).norm() < 1e-5 * target.x_0.norm()  # processors round differently

    def test_at_its_own_times_it_is_what_it_passed_through(self, target: TargetRun) -> None:
        for j, t in enumerate(target.times):
            assert torch.equal(target.at(float(t)), target.path_SBCHW[j])
        assert torch.equal(target.at(None), target.x_0)

    def test_between_them_a_cubic_in_log_sigma_over_alpha_is_met(self) -> None:
        schedule = VP
        times = schedule.timesteps("logsnr", 9)

        def path(t: float) -> torch.Tensor:
            u = schedule.log_ratio(t)
            return torch.full((1, 1, 1, 1), float(schedule.alpha_sigma(t)[0] * (1 - 0.3 * u + 0.2 * u**2 - 0.05 * u**3)))

        run = TargetRun(VP, times, torch.stack([path(t) for t in times]), torch.zeros(1), path(0.0))
        for t in (950.0, 333.3, 17.5, 1.0):
            assert float(run.at(t)) == pytest.approx(float(path(t)), abs=1e-5)

    def test_outside_its_times_nothing_runs_away(self) -> None:
        schedule, image, eps = VP, 0.3, -1.2
        times = schedule.timesteps("trailing", 6) - 5.0
        alpha_S, sigma_S = schedule.alpha_sigma(times)
        states = torch.tensor(alpha_S * image + sigma_S * eps, dtype=torch.float32).view(-1, 1, 1, 1, 1)
        run = TargetRun(VP, times, states, torch.zeros(1), torch.full((1, 1, 1, 1), image))
        assert torch.equal(run.at(999.0), run.x_T)
        for t in (100.0, 10.0, 0.0):  # after the last one
            alpha, sigma = schedule.alpha_sigma(t)
            assert float(run.at(t)) == pytest.approx(float(alpha * image + sigma * eps), abs=1e-5)


class TestFit:
    def test_a_run_fitted_to_itself_keeps_its_coefficients(self, model: DiT, target: TargetRun) -> None:
        plan = full_plan(model_signature(model), vp_sampler("ddim", STEPS), GUIDANCE)
        fitted = fit_sampler(model, plan, target, 4)
        assert fitted.mse_B.max() < 1e-9 * target.x_0.square().mean()
        for ours, theirs in zip(fitted.plan.sampler.steps, plan.sampler.steps, strict=True):
            assert (ours.next_x, ours.next_m) == pytest.approx((theirs.next_x, theirs.next_m), abs=1e-3)

    def test_the_plan_that_comes_back_is_the_run_that_was_made(self, model: DiT, target: TargetRun) -> None:
        plan = full_plan(model_signature(model), vp_sampler("dpmpp_2m", 5, "logsnr"), GUIDANCE)
        fitted = fit_sampler(model, plan, target, 4)
        again = (sample(model, fitted.plan, target.x_T, target.given) - target.x_0).square().flatten(1).mean(1)
        assert torch.allclose(again, fitted.mse_B, rtol=1e-3)
        assert fitted.plan.sampler.name == "dpmpp_2m-fitted"

    def test_it_brings_images_that_it_did_not_see_nearer(self, model: DiT, target: TargetRun) -> None:
        plan = full_plan(model_signature(model), vp_sampler("ddim", 5), GUIDANCE)
        before = (sample(model, plan, target.x_T, target.given) - target.x_0).square().flatten(1).mean(1)
        assert fit_sampler(model, plan, target, 4).mse_B[4:].mean() < 0.5 * before[4:].mean()

    def test_images_beyond_the_fit_do_not_matter_to_it(self, model: DiT, target: TargetRun) -> None:
        plan = full_plan(model_signature(model), vp_sampler("ddim", 5), GUIDANCE)
        other = dataclasses.replace(target, x_0=torch.cat([target.x_0[:4], -target.x_0[4:]]))
        assert fit_sampler(model, plan, target, 4).plan == fit_sampler(model, plan, other, 4).plan

    def test_all_processes_stop_if_one_has_to(self, model: DiT, target: TargetRun) -> None:
        """The other process's latents are not finite, ours are: without a word from it, we would wait for its sums."""

        def total(values: torch.Tensor) -> torch.Tensor:
            return values + 1 if values.ndim == 0 else 2 * values

        plan = full_plan(model_signature(model), vp_sampler("ddim", 5), GUIDANCE)
        with pytest.raises(TokenCacheError, match="at step 0 of a fit"):
            fit_sampler(model, plan, target, 4, ranks=Ranks(0, 2, total))

    def test_a_sampler_that_adds_noise_is_refused(self, model: DiT, target: TargetRun) -> None:
        plan = full_plan(model_signature(model), vp_sampler("ddpm", 5), GUIDANCE)
        with pytest.raises(PlanError, match="cannot be fitted"):
            fit_sampler(model, plan, target, 4)
