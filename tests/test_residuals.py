"""Statistics of the summed residual: by hand, and against the tokens of a full run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_plan, make_teacher
from torch import Tensor

from tc_lightning.cache.semantics import Step, run_blocks
from tc_lightning.cache.soft_network import enter
from tc_lightning.errors import RunError
from tc_lightning.measure.calibrate import NAME, calibrate, run_calibration
from tc_lightning.measure.calibration import Calibration
from tc_lightning.measure.residuals import Residuals, forecast_error
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute
from tc_lightning.rollout.sampling import noise_for, sample_steps

T, L, G = 5, 2, 3
MODEL = make_teacher(1, input_size=4, in_channels=2, hidden_size=16, depth=L)
PLAN = make_plan(MODEL, ((compute(0, L),),) * T, Guidance(1.5, 1))
X_T, LABELS = noise_for(0, range(2), MODEL), torch.arange(2)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(MODEL, PLAN, X_T, LABELS, max_gap=G, progress=False)


@pytest.fixture(scope="module")
def residuals(calibration: Calibration) -> Residuals:
    assert calibration.residuals is not None
    return calibration.residuals


@pytest.fixture(scope="module")
def spans() -> list[Tensor]:
    """What the blocks add to the tokens of both halves, step by step."""
    found = []
    for state in sample_steps(MODEL, PLAN, X_T, LABELS):
        t = torch.full((len(X_T),), PLAN.sampler.steps[state.step].t)
        z, mods, _ = enter(MODEL, PLAN.guidance, state.x, t, LABELS)
        out, _ = run_blocks(Step((compute(0, L),), (None,), {}, []), z, list(MODEL.blocks), mods)
        found.append((out - z).double())
    return found


def test_statistics_are_those_of_the_run(residuals: Residuals, spans: list[Tensor]) -> None:
    for i in range(T):
        for j in range(T):
            assert residuals.products_TT[i, j] == pytest.approx(float((spans[i] * spans[j]).mean()), rel=1e-4, abs=1e-6)
        for g in range(1, min(G, i) + 1):
            change = float((spans[i] - spans[i - g]).abs().sum() / spans[i].abs().sum())
            assert residuals.change_TG[i, g - 1] == pytest.approx(change, rel=1e-4)
        if i:
            ratio = float((spans[i].norm(dim=-1) / spans[i - 1].norm(dim=-1)).mean())
            assert residuals.ratio_T[i] == pytest.approx(ratio, rel=1e-4)
    assert residuals.ratio_T[0] == 1.0
    assert not residuals.change_TG[0].any()


def test_errors_of_forecasts_follow_from_products(residuals: Residuals, spans: list[Tensor]) -> None:
    forecast = 1.5 * spans[2] - 0.25 * spans[0]
    expected = float((forecast - spans[4]).square().mean())
    assert forecast_error(residuals.products_TT, [2, 0], [1.5, -0.25], 4) == pytest.approx(expected, rel=1e-3)
    best = residuals.least_squares([2, 0], 4)
    A = torch.stack([spans[2].flatten(), spans[0].flatten()], 1)
    assert best == pytest.approx(torch.linalg.lstsq(A, spans[4].flatten()[:, None]).solution[:, 0].numpy(), rel=1e-3)
    for step in np.eye(2):
        moved = forecast_error(residuals.products_TT, [2, 0], best + 0.01 * step, 4)
        assert forecast_error(residuals.products_TT, [2, 0], best, 4) < moved


def test_by_hand() -> None:
    """r_0 = (1, 0), r_1 = (0, 2), r_2 = (1, 2): the last is the sum of the others."""
    r = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0]])
    residuals = Residuals(r @ r.T / 2, np.ones(3), np.zeros((3, 2)))
    assert residuals.least_squares([1, 0], 2) == pytest.approx([1.0, 1.0])
    assert forecast_error(residuals.products_TT, [1, 0], [1.0, 1.0], 2) == pytest.approx(0.0)
    assert forecast_error(residuals.products_TT, [1], [1.0], 2) == pytest.approx(0.5)
    assert residuals.least_squares([1], 2, ridge=1.0) == pytest.approx([0.5])


def test_round_trip_and_files_of_before(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "new.safetensors")
    again = Calibration.load(tmp_path / "new.safetensors")
    assert again.digest == calibration.digest
    assert again.residuals is not None
    before = dataclasses.replace(calibration, residuals=None)
    before.save(tmp_path / "old.safetensors")
    assert Calibration.load(tmp_path / "old.safetensors").residuals is None
    assert before.digest != calibration.digest


def test_a_run_that_was_calibrated_before_residuals_is_measured_again(tmp_path: Path) -> None:
    measured = run_calibration(MODEL, PLAN, tmp_path)
    dataclasses.replace(measured, residuals=None).save(tmp_path / NAME)
    assert run_calibration(MODEL, PLAN, tmp_path).digest == measured.digest
    assert Calibration.load(tmp_path / NAME).residuals is not None


def test_bad_values_are_refused(calibration: Calibration) -> None:
    good = calibration.residuals
    assert good is not None
    lopsided = np.array(good.products_TT)
    lopsided[0, 1] += 1.0
    for arrays, message in (
        ((lopsided, good.ratio_T, good.change_TG), "not symmetric"),
        ((good.products_TT * np.nan, good.ratio_T, good.change_TG), "products_TT is not finite"),
        ((good.products_TT, -good.ratio_T, good.change_TG), "ratio_T is negative"),
        ((good.products_TT, good.ratio_T[1:], good.change_TG), "were expected"),
    ):
        with pytest.raises(RunError, match=message):
            Residuals(*arrays)
    with pytest.raises(RunError, match="residuals are of"):
        dataclasses.replace(calibration, residuals=Residuals(good.products_TT, good.ratio_T, good.change_TG[:, :1]))
