from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_plan, make_teacher
from torch import Tensor

from tc_lightning.cache.soft_network import enter, record_caches, reused_eps
from tc_lightning.errors import RunError, TokenCacheError
from tc_lightning.measure.calibrate import BATCH, calibrate
from tc_lightning.measure.calibration import Calibration
from tc_lightning.measure.scores import sampler_digest
from tc_lightning.measure.step_effect import step_effect
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, skip
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample_steps

T, L, G = 6, 2, 3
MODEL = make_teacher(1, input_size=4, in_channels=2, hidden_size=16, depth=L)
PLAN = make_plan(MODEL, ((compute(0, L),),) * T, Guidance(1.5, 1))
X_T, LABELS = noise_for(0, range(BATCH + 1), MODEL), torch.arange(BATCH + 1) % 5


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(MODEL, PLAN, X_T, LABELS, max_gap=G, progress=False)


def full_run() -> tuple[list[Tensor], list[Tensor]]:
    states = list(sample_steps(MODEL, PLAN, X_T, LABELS))
    return [s.x for s in states], [s.eps for s in states]


def test_gap_errors_of_neighbours_are_those_of_a_plan_that_skips_one_step(calibration: Calibration):
    _, eps = full_run()
    for i in range(1, T):
        for order in range(3):
            steps = tuple((skip(0, L, order),) if j == i else (compute(0, L),) for j in range(T))
            states = list(sample_steps(MODEL, make_plan(MODEL, steps, PLAN.guidance), X_T, LABELS))
            expected = float((states[i].eps - eps[i]).square().mean())
            assert calibration.gap_error_TGSO[i, 0, 0, order] == pytest.approx(expected, rel=1e-3)


def test_gap_errors_of_repeating_are_those_of_reuse(calibration: Calibration):
    x, eps = full_run()
    t = [torch.full((len(X_T),), step.t) for step in PLAN.sampler.steps]
    for i in range(1, T):
        for g in range(1, min(G, i) + 1):
            caches = record_caches(MODEL, PLAN.guidance, x[i - g], t[i - g], LABELS)
            reused = reused_eps(MODEL, PLAN.guidance, caches, x[i], t[i], LABELS)
            assert calibration.gap_error_TGSO[i, g - 1, :, 0] == pytest.approx(float((reused - eps[i]).square().mean()), rel=1e-3)


def test_forecasts_fall_back_on_the_sources_that_exist(calibration: Calibration):
    error = calibration.gap_error_TGSO
    assert (error[2, 1, :, 1] == error[2, 1, :, 0]).all()  # step 0 is the only source
    assert error[3, 1, 0, 1] != error[3, 1, 0, 0]  # steps 1 and 0
    assert error[3, 1, 0, 2] == error[3, 1, 0, 1]
    assert error[5, 1, 0, 2] != error[5, 1, 0, 1]  # steps 3, 2 and 1
    assert not error[1, 1:].any()


def test_drift_is_the_relative_l1_change_of_branch_outputs(calibration: Calibration):
    x, _ = full_run()

    def first_attention(i: int) -> Tensor:
        z, mods, _ = enter(MODEL, PLAN.guidance, x[i], torch.full((len(X_T),), PLAN.sampler.steps[i].t), LABELS)
        return MODEL.blocks[0].attn_branch(z, mods[0])[0]

    halves = [torch.tensor([*range(a, b), *(j + len(X_T) for j in range(a, b))]) for a, b in ((0, BATCH), (BATCH, BATCH + 1))]
    now, before = first_attention(4), first_attention(2)
    ratios = [float((now[h] - before[h]).abs().sum() / now[h].abs().sum()) for h in halves]
    assert calibration.drift_TGL2[4, 1, 0, 0] == pytest.approx((BATCH * ratios[0] + ratios[1]) / (BATCH + 1), rel=1e-4)
    assert not calibration.drift_TGL2[0].any()
    assert (calibration.drift_TGL2[T - 1] > 0).all()


def test_effects_and_names(calibration: Calibration):
    assert calibration.effect_T == pytest.approx(step_effect(MODEL, PLAN, X_T, LABELS).numpy(), rel=1e-4)
    assert (calibration.teacher, calibration.sampler) == (model_signature(MODEL).teacher, sampler_digest(PLAN.sampler))
    assert calibration.max_gap == G


def test_short_processes_and_nothing_to_measure():
    short = full_plan(PLAN.model, make_plan(MODEL, ((compute(0, L),),) * 2).sampler, PLAN.guidance)
    assert calibrate(MODEL, short, X_T[:1], LABELS[:1], progress=False).gap_error_TGSO.shape == (2, 1, 1, 3)
    with pytest.raises(TokenCacheError, match="0 trajectories"):
        calibrate(MODEL, PLAN, X_T[:0], LABELS[:0], progress=False)


def test_round_trip_is_exact_and_damage_is_refused(calibration: Calibration, tmp_path: Path):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    assert Calibration.load(path).digest == calibration.digest
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RunError, match="cannot read the calibration"):
        Calibration.load(path)


def test_bad_values_are_refused(calibration: Calibration):
    drift, error, effect = calibration.drift_TGL2, calibration.gap_error_TGSO, calibration.effect_T
    bad = np.array(error)
    bad[2, 0, 0, 1] = np.nan
    for arrays, message in (
        ((drift, bad, effect), "gap_error is negative or not finite at step 2"),
        ((drift, error, -effect), "effect is negative or not finite at step 0"),
        ((drift, error[:, :2], effect), "gap_error has the shape"),
        ((drift[..., 0], error, effect), "drift has the shape"),
        ((drift, error, effect[1:]), "effect has the shape"),
    ):
        with pytest.raises(RunError, match=message):
            Calibration(*arrays, "", "")
