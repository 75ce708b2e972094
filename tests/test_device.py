"""Torch's half of report and verify on the user's device: the same figures, results on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import FULL, VP, make_plan, make_teacher
from content_plans import content_plan, make_selector

from export import verify as verify_module
from export.compiler.compile import write_sharing
from export.compiler.parity import ParityError, prove, trajectory_error
from export.compiler.weight_files import WeightFiles
from export.report.quality import teacher_features
from export.runtime.manifest import read_manifest
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from export.verify import verify
from tc_lightning.measure.calibrate import run_calibration
from tc_lightning.models.companions import Companions
from tc_lightning.rollout.evaluation import RolloutEvaluator
from tc_lightning.rollout.sampling import device_of, full_plan
from tc_lightning.rollout.targets import TargetKey, compute_targets

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_verify_rebuilds_the_teacher_where_the_provider_is(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def stop(model, *_, **__):
        seen.append(device_of(model).type)
        raise ParityError("far enough")

    monkeypatch.setattr(verify_module, "torch_device", lambda provider, index=0: torch.device("meta"))
    monkeypatch.setattr(verify_module, "prove", stop)
    with pytest.raises(ParityError):
        verify(artefact, "cpu", 2, 2, seed=1, quiet=True)
    assert seen == ["meta"]


@gpu
def test_figures_of_a_report_do_not_depend_on_the_device(tmp_path: Path) -> None:
    model = make_teacher()
    selector = make_selector(model)
    plan = content_plan(model, selector)
    key = TargetKey(plan.model, VP, plan.sampler, plan.guidance, seed=3, images=20, ode_steps=20)
    reference = full_plan(plan.model, plan.sampler, plan.guidance)
    found = {}
    for device in ("cpu", "cuda"):
        there, looking = model.to(device), selector.to(device)
        targets = compute_targets(there, key)
        assert {x.device.type for x in (targets.x_T, *targets.given.values(), targets.reference, targets.ode)} == {"cpu"}
        mse_B = RolloutEvaluator(there, targets.x_T, targets.given, targets.reference, Companions(looking)).mse_per_image(plan)
        folder = tmp_path / device
        folder.mkdir()
        calibration = run_calibration(there, reference, folder)
        features = torch.from_numpy(teacher_features(there, targets.reference.numpy(), targets.given))
        found[device] = targets.reference, targets.ode, mse_B, torch.tensor(calibration.effect_T), features
    for here, there in zip(*found.values(), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-3 * float(here.abs().max()))


@gpu
@pytest.mark.parametrize("content", [False, True])
def test_a_proof_with_the_teacher_on_a_gpu(content: bool, tmp_path: Path) -> None:
    """ONNX Runtime on the CPU against torch on the GPU: weights, terms of the content predictor and states come from there."""
    model = make_teacher().to("cuda")
    selector = make_selector(make_teacher()).to("cuda")
    plan = content_plan(make_teacher(), selector) if content else make_plan(make_teacher(), (FULL,) * 4)
    weights, lowered, folder = WeightFiles(model, "fp32", tmp_path, Companions(selector)), lower(plan, "cpu"), tmp_path / "artefact"
    folder.mkdir()
    write_sharing(weights, plan, lowered, folder)
    sampler = CachedSampler(folder, manifest=read_manifest(folder, check_files=False))
    checks = prove(model, plan, lowered, sampler, 2, companions=Companions(selector))
    assert trajectory_error(checks) < 1e-3
