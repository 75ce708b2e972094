"""Exported plans with corrected skips: the same images as torch's, in the graph and from one weights file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import CONFIG, FULL, make_teacher
from corrected_plans import STEPS, corrected_plan, make_corrector, uncorrected

from export.compiler.compile import export_artefact
from export.compiler.parity import relative_l2
from export.compiler.weight_files import WeightFiles
from export.runtime.manifest import read_manifest
from export.runtime.sampler import CachedSampler
from export.verify import rebuild_companions
from tc_lightning.errors import PlanError
from tc_lightning.models.companions import Companions
from tc_lightning.models.corrector import Corrector
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import BOTH, Guidance, GuidanceMode
from tc_lightning.plan.segments import skip
from tc_lightning.rollout.sampling import noise_for, sample


@pytest.fixture(scope="module")
def companions(teacher: DiT) -> Companions:
    return Companions(corrector=make_corrector(teacher))


@pytest.fixture(scope="module")
def exported(teacher: DiT, companions: Companions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corrected") / "artefact"
    export_artefact(teacher, corrected_plan(teacher, companions), out, "fp32", "cpu", 2, lambda _: None, companions)
    return out


def check_export(model: DiT, plan: CachePlan, out: Path, found: Companions, precision: str = "fp32", tolerance: float = 1e-5) -> Any:
    manifest = export_artefact(model, plan, out, precision, "cpu", 2, lambda _: None, found)
    assert manifest["parity"]["trajectory_rel_l2"] < tolerance
    assert max(row["rel_l2"] for row in manifest["parity"]["programs"]) < tolerance
    return manifest


def test_exported_images_are_those_of_torch(exported: Path, teacher: DiT, companions: Companions) -> None:
    plan, sampler = corrected_plan(teacher, companions), CachedSampler(exported)
    assert read_manifest(exported)["corrector"] == plan.corrector
    for labels in ([4], [2, 2, 0, 4, 1]):  # one artefact, any batch
        x = noise_for(11, range(len(labels)), teacher)
        expected = sample(teacher, plan, x, torch.tensor(labels), companions=companions).numpy()
        actual = sampler.sample(labels, seed=11).latents
        assert max(relative_l2(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-5
    without = sample(teacher, uncorrected(plan), x, torch.tensor(labels)).numpy()
    assert relative_l2(without, expected) > 1e-3  # so that parity would notice its absence


def test_without_guidance_and_in_half_precision(tmp_path: Path) -> None:
    model = make_teacher(2, in_channels=1)
    found = Companions(corrector=make_corrector(model, 3, std=0.1))
    check_export(model, corrected_plan(model, found, guidance=Guidance()), tmp_path / "plain", found)
    check_export(model, corrected_plan(model, found), tmp_path / "half", found, "fp16", 3e-2)


@pytest.mark.parametrize("mode", [GuidanceMode("forecast", 1), GuidanceMode("cond")])
def test_steps_of_one_half_are_corrected_too(tmp_path: Path, teacher: DiT, companions: Companions, mode: GuidanceMode) -> None:
    modes = (BOTH, BOTH, BOTH, mode, mode, BOTH, BOTH, mode)
    plan = dataclasses.replace(corrected_plan(teacher, companions), guidance_modes=modes)
    check_export(teacher, plan, tmp_path / "a", companions)


def test_only_corrected_programs_run_it(exported: Path, companions: Companions) -> None:
    manifest = read_manifest(exported)
    held = {name.removeprefix("corrector.") for name in manifest["weights"] if name.startswith("corrector.")}
    thirds = {name for name in held if any(f".{letter}." in name for letter in "qkv")}  # views of qkv
    assert set(companions.corrector.module.state_dict()) == held - thirds - {"terms"}
    schedule = [binding["program"] for binding in manifest["schedule"]]
    corrected = {program for program, segments in zip(schedule, STEPS, strict=True) if segments[0].corrected}
    for name, program in manifest["programs"].items():
        graph = onnx.load(str(exported / f"{program['graph']}.onnx"), load_external_data=False).graph
        reads = {tensor.name for tensor in graph.initializer if tensor.name.startswith("corrector.")}
        assert bool(reads) == (name in corrected)
        assert any(node.name.startswith("corrector.block/") for node in graph.node) == (name in corrected)
        assert not any("adaLN" in tensor or "clock" in tensor for tensor in reads)  # of these come terms, which are constants
    assert len(corrected) == 2  # histories of two values, and of three


def test_corrector_can_be_rebuilt_bit_for_bit(exported: Path, companions: Companions) -> None:
    plan = CachePlan.load(exported / "plan.json")
    rebuilt = rebuild_companions(CachedSampler(exported, preload=False), plan, CONFIG).corrector
    assert Corrector.of(rebuilt.module).digest == rebuilt.digest == companions.corrector.digest
    assert rebuild_companions(CachedSampler(exported, preload=False), uncorrected(plan), CONFIG).corrector is None


def test_plans_share_weights_where_their_times_are_the_same(teacher: DiT, companions: Companions, tmp_path: Path) -> None:
    """Terms depend on what a step reads, not on its order; a plan that reads other steps has others."""
    plan, shared = corrected_plan(teacher, companions), WeightFiles(teacher, "fp32", tmp_path, companions)
    plain = dataclasses.replace(plan, steps=(*plan.steps[:7], (skip(0, 4, 1, corrected=True),)))
    moved = dataclasses.replace(plan, steps=(*plan.steps[:3], (skip(0, 4, 1, corrected=True),), FULL, *plan.steps[5:]))
    files = []
    for j, one in enumerate((plan, plain, moved, uncorrected(plan))):
        (tmp_path / f"a{j}").mkdir()
        shared.link(one, tmp_path / f"a{j}")
        files.append((tmp_path / f"a{j}" / "weights.data").stat().st_ino)
    assert files[0] == files[1]
    assert len({*files}) == 3


def test_export_without_it_leaves_nothing(tmp_path: Path, teacher: DiT, companions: Companions) -> None:
    with pytest.raises(PlanError, match="but none was given"):
        export_artefact(teacher, corrected_plan(teacher, companions), tmp_path / "a", "fp32", "cpu", 1, lambda _: None)
    assert list(tmp_path.iterdir()) == []
