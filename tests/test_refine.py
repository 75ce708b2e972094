"""Robust means, the choice of images, and Gauss-Newton: by hand, by identities, against finite differences."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import vp_sampler
from torch import Tensor

from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, skip
from tc_lightning.planner import fit, gradients, refine
from tc_lightning.planner.fit import fit_sampler
from tc_lightning.planner.image_choice import dealt, difficulty, images, stratified
from tc_lightning.planner.refine import refine_sampler, solve
from tc_lightning.planner.robust import TAIL, robust_mean, robust_weights, weighted_median
from tc_lightning.planner.target import TargetRun, run_target
from tc_lightning.planner.theta import Places
from tc_lightning.rollout.ranks import ALONE, Ranks
from tc_lightning.rollout.sampling import Rollout, full_plan, model_signature, sample

GUIDANCE = Guidance(1.5, 1)
SHIPPED = TeacherSpec(str(Path(__file__).parents[1] / "data" / "digits_dit.safetensors"))


@pytest.fixture(scope="module")
def model() -> DiT:
    """The shipped one: random weights do not denoise, and what they make has no paths to keep to."""
    return load_teacher(SHIPPED)


@pytest.fixture(scope="module")
def target(model: DiT) -> TargetRun:
    noise, _ = images(model, list(range(6)))
    run = run_target(model, vp_sampler("ddim", 12), GUIDANCE, noise, torch.arange(6), batch=3)
    return dataclasses.replace(run, weights_B=torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 2.0]))


@pytest.fixture(scope="module")
def fitted(model: DiT, target: TargetRun) -> CachePlan:
    """Six steps of which two skip all blocks."""
    steps = tuple((skip(0, 12, 1),) if i in (3, 4) else (compute(0, 12),) for i in range(6))
    plan = dataclasses.replace(full_plan(model_signature(model), vp_sampler("dpmpp_2m", 6, "mix:0.5"), GUIDANCE), steps=steps)
    return fit_sampler(model, plan, target, 6).plan


def theta(plan: CachePlan) -> Tensor:
    return Places.of(plan, weights=False).pack(plan)


def moved(plan: CachePlan, delta_P: Tensor) -> CachePlan:
    return Places.of(plan, weights=False).moved(plan, delta_P)


def signs(vectors: int, images: int) -> Tensor:
    return torch.stack([refine._signs(b, vectors, torch.Size((1, 16, 16))) for b in range(images)], 1)


def error(model: DiT, plan: CachePlan, target: TargetRun) -> float:
    mse_B = (sample(model, plan, target.x_T, target.given) - target.x_0).square().flatten(1).mean(1)
    return float(robust_mean(mse_B, target.counts_B))


def two_processes(work: Callable[[Ranks], CachePlan]) -> list[CachePlan]:
    """Run two processes' work in two threads that really wait for each other's sums."""
    barrier, given, found = threading.Barrier(2, timeout=60), {}, {}

    def run(rank: int) -> None:
        def total(values: Tensor) -> Tensor:
            given[rank] = values
            barrier.wait()
            both = given[0] + given[1]
            barrier.wait()
            return both

        found[rank] = work(Ranks(rank, 2, total))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[0], found[1]]


class TestRobust:
    def test_median_by_hand(self) -> None:
        values = torch.tensor([3.0, 1.0, 2.0])
        assert weighted_median(values, torch.ones(3)) == 2.0
        assert weighted_median(values, torch.tensor([5.0, 1.0, 1.0])) == 3.0

    def test_equal_errors_by_hand(self) -> None:
        mean = robust_mean(torch.full((4,), 0.5, dtype=torch.float64), torch.ones(4))
        assert float(mean) == pytest.approx(0.5 * TAIL * float(torch.tensor(1 / TAIL, dtype=torch.float64).log1p()))

    def test_twice_the_errors_twice_the_mean(self) -> None:
        errors, weights = torch.rand(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
        assert float(robust_mean(2 * errors, weights)) == pytest.approx(2 * float(robust_mean(errors, weights)))

    def test_one_image_cannot_make_it(self) -> None:
        errors = torch.ones(33, dtype=torch.float64)
        errors[7] = 1e6
        assert robust_mean(errors, torch.ones(33)) < 10 < errors.mean()

    def test_weights_are_its_derivative(self) -> None:
        errors = torch.tensor([0.1, 0.4, 0.2, 90.0, 0.3], dtype=torch.float64, requires_grad=True)
        counts = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
        (slope,) = torch.autograd.grad(robust_mean(errors, counts), errors)
        median = int((errors == weighted_median(errors, counts)).nonzero())
        others = [j for j in range(5) if j != median]  # the scale hangs on the median itself
        assert torch.allclose(slope[others], robust_weights(errors, counts)[others])

    def test_nothing_wrong_and_nothing_finite(self) -> None:
        assert robust_mean(torch.zeros(3), torch.ones(3)) == 0.0
        assert robust_mean(torch.tensor([1.0, torch.inf]), torch.ones(2)) == torch.inf

    def test_where_most_have_no_error_it_is_small_and_finite(self) -> None:
        assert 0 < robust_mean(torch.tensor([0.0, 0.0, 0.0, 5.0]), torch.ones(4)) < 1e-3


class TestPilot:
    def test_stratified_by_hand(self) -> None:
        chosen = stratified([0, 2, 4, 3, 1, 5], 3)
        assert chosen.indices == (0, 4, 1)  # the hardest; places 1 and 3 of 2, 4, 3, 1, 5
        assert chosen.weights == (1.0, 2.5, 2.5)

    @pytest.mark.parametrize(("pool", "count"), [(160, 32), (96, 24), (7, 5)])
    def test_they_stand_for_the_pool(self, pool: int, count: int) -> None:
        chosen = stratified(torch.randperm(pool, generator=torch.Generator().manual_seed(0)).tolist(), count)
        assert len(set(chosen.indices)) == count
        assert sum(chosen.weights) == pytest.approx(pool)

    @pytest.mark.parametrize("first", [1, 5, 12, 31])
    def test_parts_have_hard_and_easy_ones(self, first: int) -> None:
        chosen = stratified(list(range(160)), 32)
        parts = chosen.split(first)
        assert [len(part.indices) for part in parts] == [first, 32 - first]
        assert {*parts[0].indices, *parts[1].indices} == set(chosen.indices)
        if 3 <= first <= 29:
            assert all(len(set(part.weights)) == 2 for part in parts)

    def test_a_pool_of_no_more_is_taken_whole(self) -> None:
        chosen = stratified([2, 0, 3, 1], 5)
        assert (chosen.indices, chosen.weights) == ((2, 0, 3, 1), (1.0,) * 4)

    def test_two_parts_of_a_pool_share_no_image_and_are_equally_hard(self) -> None:
        assert dealt(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0]), 0.5) == ([2, 3, 5], [0, 4, 1])
        difficulty_P = torch.rand(96, generator=torch.Generator().manual_seed(0))
        first, second = dealt(difficulty_P, 0.6)
        assert not set(first) & set(second)
        assert sorted(first + second) == list(range(96))
        assert abs(len(first) - 0.6 * 96) < 1
        assert difficulty_P[first].mean() == pytest.approx(float(difficulty_P[second].mean()), rel=0.05)

    def test_difficulty_is_that_of_the_image_whatever_the_batch(self, model: DiT) -> None:
        noise = images(model, list(range(4)))
        one, other = (difficulty(model, GUIDANCE, 20, *noise, batch, None) for batch in (4, 3))
        assert torch.allclose(one, other, rtol=1e-3)
        assert (one > 0).all()


class TestRefine:
    def test_solve_by_hand(self) -> None:
        gram = torch.diag(torch.tensor([2.0, 0.0, 8.0]))
        assert solve(gram, torch.tensor([2.0, 0.0, -8.0]), 0.5).tolist() == pytest.approx([-1 / 1.5, 0.0, 1 / 1.5])

    def test_moving_by_nothing(self, fitted: CachePlan) -> None:
        assert moved(fitted, torch.zeros(theta(fitted).numel())) == fitted

    def test_products_are_those_of_finite_differences(self, model: DiT, target: TargetRun, fitted: CachePlan) -> None:
        run = target.part(slice(0, 2))
        _, (of_error, *_) = refine._Refiner(model, run, ALONE)._products(fitted, run, signs(1, 2), refine.Passes(1))
        for place in (0, 9, 17):  # x at step 0, m at step 2, m at step 4, which skips
            by = torch.zeros(theta(fitted).numel())
            by[place] = 2e-3
            ends = [sample(model, moved(fitted, sign * by), run.x_T, run.given) for sign in (1, -1)]
            error = sample(model, fitted, run.x_T, run.given) - run.x_0
            expected = ((ends[0] - ends[1]) / 4e-3 * error).flatten(1).sum(1)
            assert of_error[:, place] == pytest.approx(expected.double(), rel=0.03, abs=1e-6)

    def test_random_signs_estimate_the_gram_matrix(self, model: DiT, target: TargetRun) -> None:
        """Its diagonal against the sum over unit vectors, which is exact."""
        plan = full_plan(model_signature(model), vp_sampler("ddim", 2), GUIDANCE)
        run = target.part(slice(0, 1))
        refiner = refine._Refiner(model, run, ALONE)
        _, estimate, _ = refiner.normal_equations(plan, refine.Passes(1, vectors=65), 64)
        end, pull = gradients.whole(Rollout(model, plan, run.given), run.x_T, Places.of(plan, weights=False))
        rows = pull([unit.view_as(end) for unit in torch.eye(end.numel())])
        exact = torch.cat(rows).double().square().sum(0) * float(robust_weights(refiner.errors(plan), run.counts_B))
        used = exact > 0
        assert (estimate.diagonal()[used] / exact[used]).log().abs().median() < 0.3

    def test_where_there_are_many_images_some_make_the_gram_matrix_and_all_the_slope(
        self, model: DiT, target: TargetRun, fitted: CachePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Three of six images, those of places 0, 2, 4, weigh as much as all do; the slope is that of all."""
        monkeypatch.setattr(refine, "CURVED", 3)
        refiner = refine._Refiner(model, target, ALONE)
        errors_B, gram, slope = refiner.normal_equations(fitted, refine.Passes(2), 1)
        assert errors_B == pytest.approx(refiner.errors(fitted).double(), rel=1e-3)
        _, (of_error, rows) = refiner._products(fitted, target, signs(1, 6), refine.Passes(6))
        weights = robust_weights(errors_B, target.counts_B.double())
        expected = (rows * weights[:, None])[::2].T @ rows[::2] * (weights.sum() / weights[::2].sum())
        assert torch.linalg.matrix_norm(gram - expected) < 1e-3 * torch.linalg.matrix_norm(expected)
        assert torch.linalg.vector_norm(slope - weights @ of_error) < 1e-3 * torch.linalg.vector_norm(slope)

    def test_errors_fall_and_weights_stay(self, model: DiT, target: TargetRun, fitted: CachePlan) -> None:
        before, passes = [p.clone() for p in model.parameters()], []
        refined = refine_sampler(model, fitted, target, 3, on_pass=lambda: passes.append(1))
        assert error(model, refined, target) < 0.9 * error(model, fitted, target)
        assert 1 <= len(passes) <= 3
        assert refined.steps == fitted.steps
        assert [row.t for row in refined.sampler.steps] == [row.t for row in fitted.sampler.steps]
        assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))

    def test_no_iterations_no_change(self, model: DiT, target: TargetRun, fitted: CachePlan) -> None:
        assert refine_sampler(model, fitted, target, 0) is fitted

    def test_how_many_images_share_a_graph_does_not_matter(
        self, model: DiT, target: TargetRun, fitted: CachePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = refine_sampler(model, fitted, target, 1)
        monkeypatch.setattr(refine._Refiner, "passes", lambda self, plan: refine.Passes(1))
        single = refine_sampler(model, fitted, target, 1)
        assert torch.allclose(theta(whole), theta(single), atol=1e-4)

    def test_one_step_after_the_other_leads_to_the_same_plan(
        self, model: DiT, target: TargetRun, fitted: CachePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = refine_sampler(model, fitted, target, 1)
        monkeypatch.setattr(refine, "free_bytes", lambda device: 8 << 20)  # too little for the graph of one image's six steps
        by_step, stepwise = [], refine.stepwise
        monkeypatch.setattr(refine, "stepwise", lambda *run: by_step.append(len(run[1])) or stepwise(*run))
        single = refine_sampler(model, fitted, target, 1)
        assert sum(by_step) == len(target.x_0)
        assert torch.allclose(theta(whole), theta(single), atol=1e-4)

    @pytest.mark.parametrize("by_step", [True, False])
    @pytest.mark.parametrize("vectors", [1, 3])
    def test_how_many_vectors_are_pulled_back_together_does_not_matter(
        self, model: DiT, target: TargetRun, fitted: CachePlan, by_step: bool, vectors: int
    ) -> None:
        refiner, run = refine._Refiner(model, target, ALONE), target.part(slice(0, 2))
        (_, together), (_, apart) = (refiner._products(fitted, run, signs(4, 2), refine.Passes(2, by_step, v)) for v in (5, vectors))
        assert len(together) == len(apart) == 5
        assert all(torch.allclose(one, other, rtol=1e-5) for one, other in zip(together, apart, strict=True))

    def test_with_little_memory_fewer_vectors_are_pulled_back_together(
        self, model: DiT, target: TargetRun, fitted: CachePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = target.part(slice(0, 1))
        need = refine.graph_size(Rollout(model, fitted, one.given), one.x_T, Places.of(fitted, weights=False))
        monkeypatch.setattr(refine, "free_bytes", lambda device: 1000)
        monkeypatch.setattr(refine, "spare_bytes", lambda device, world: need.stepwise(3))
        passes = refine._Refiner(model, target, ALONE).passes(fitted)
        assert passes is not None
        assert passes[:2] == (1, True)
        assert 3 <= passes.vectors < 1 + refine.PROBES

    def test_without_memory_the_plan_stays(
        self, model: DiT, target: TargetRun, fitted: CachePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(refine, "free_bytes", lambda device: 1000)
        monkeypatch.setattr(refine, "spare_bytes", lambda device, world: 1000)
        with pytest.warns(UserWarning, match="stays as it was fitted"):
            assert refine_sampler(model, fitted, target, 2) is fitted

    def test_latents_that_are_not_finite_are_told(self, model: DiT, target: TargetRun, fitted: CachePlan) -> None:
        broken = moved(fitted, 1e30 * theta(fitted))
        with pytest.raises(TokenCacheError, match="cannot be refined"):
            refine_sampler(model, broken, target, 1)

    def test_gradients_that_overflow_leave_the_plan(
        self, model: DiT, target: TargetRun, fitted: CachePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = theta(fitted).numel()
        bad = lambda *_: (torch.ones(6), torch.full((size, size), torch.nan), torch.ones(size))  # noqa: E731
        monkeypatch.setattr(refine._Refiner, "normal_equations", bad)
        assert refine_sampler(model, fitted, target, 2) is fitted

    def test_a_sampler_that_adds_noise_is_refused(self, model: DiT, target: TargetRun) -> None:
        with pytest.raises(PlanError, match="cannot be refined"):
            refine_sampler(model, full_plan(model_signature(model), vp_sampler("ddpm", 5), GUIDANCE), target, 1)

    @pytest.mark.parametrize(("at_a_time", "curved"), [(None, 12), (1, 12), (3, 12), (None, 2)])
    def test_two_processes_end_where_one_does(
        self, model: DiT, target: TargetRun, fitted: CachePlan, monkeypatch: pytest.MonkeyPatch, at_a_time: int | None, curved: int
    ) -> None:
        """Unequal shares: two images in one, four in the other, all of them together or a few at a time, all or some of them for H."""
        monkeypatch.setattr(refine, "CURVED", curved)
        alone = refine_sampler(model, fit_sampler(model, fitted, target, 6).plan, target, 1)
        if at_a_time:
            for module in (fit, refine):
                monkeypatch.setattr(module, "images_at_a_time", lambda plan, device: at_a_time)

        def work(ranks: Ranks) -> CachePlan:
            run = target.part(slice(0, 2) if ranks.first else slice(2, 6))
            plan = fit_sampler(model, fitted, run, len(run.x_0), ranks=ranks).plan
            return refine_sampler(model, plan, run, 1, ranks)

        first, second = two_processes(work)
        assert first == second
        assert torch.allclose(theta(first), theta(alone), atol=1e-3)
