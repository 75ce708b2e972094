"""Exported plans whose tokens are chosen by content: the same tokens, the same images, and the predictor itself."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import CONFIG, make_plan, make_teacher
from content_plans import content_plan, make_selector

from export.compiler.compile import export_artefact, write_sharing
from export.compiler.parity import relative_l2
from export.compiler.weight_files import WeightFiles, tensors_of
from export.runtime.manifest import read_manifest
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from export.verify import rebuild_companions
from tc_lightning.errors import PlanError
from tc_lightning.models.companions import Companions
from tc_lightning.models.content_predictor import Selector
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import plan_macs, selector_macs, step_macs
from tc_lightning.plan.guidance import BOTH, Guidance, GuidanceMode
from tc_lightning.rollout.sampling import noise_for, sample


@pytest.fixture(scope="module")
def selector(teacher: DiT) -> Selector:
    return make_selector(teacher)


@pytest.fixture(scope="module")
def exported(teacher: DiT, selector: Selector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("content") / "artefact"
    export_artefact(teacher, content_plan(teacher, selector), out, "fp32", "cpu", 2, lambda _: None, Companions(selector))
    return out


def check_export(model: DiT, plan: CachePlan, out: Path, selector: Selector, precision: str = "fp32", tolerance: float = 1e-5) -> Any:
    manifest = export_artefact(model, plan, out, precision, "cpu", 2, lambda _: None, Companions(selector))
    assert manifest["parity"]["trajectory_rel_l2"] < tolerance
    assert max(row["rel_l2"] for row in manifest["parity"]["programs"]) < tolerance
    return manifest


def test_export_agrees_with_torch(tmp_path: Path) -> None:
    model = make_teacher(2, in_channels=1)
    selector = make_selector(model, 3)
    check_export(model, content_plan(model, selector, guidance=Guidance()), tmp_path / "plain", selector)
    check_export(model, content_plan(model, selector), tmp_path / "half", selector, "fp16", 3e-2)


def test_exported_tokens_are_those_of_torch(exported: Path, teacher: DiT, selector: Selector) -> None:
    plan, sampler = content_plan(teacher, selector), CachedSampler(exported)
    for labels in ([4], [0, 3, 1], [2, 2, 0, 4, 1]):  # one artefact, any batch
        with torch.no_grad():
            x = noise_for(11, range(len(labels)), teacher)
            expected = sample(teacher, plan, x, torch.tensor(labels), companions=Companions(selector)).numpy()
        actual = sampler.sample(labels, seed=11).latents
        assert max(relative_l2(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-5
    other = make_selector(teacher, 1)
    with torch.no_grad():
        theirs = sample(teacher, content_plan(teacher, other), x, torch.tensor(labels), companions=Companions(other)).numpy()
    assert relative_l2(theirs, expected) > 1e-3  # which tokens are chosen is not so harmless that parity would not notice


@pytest.mark.parametrize("mode", [GuidanceMode("forecast", 1), GuidanceMode("cond")])
def test_steps_of_one_half_choose_tokens_too(tmp_path: Path, teacher: DiT, selector: Selector, mode: GuidanceMode) -> None:
    modes = (BOTH, BOTH, BOTH, mode, mode, BOTH)
    plan = dataclasses.replace(content_plan(teacher, selector), guidance_modes=modes)
    check_export(teacher, plan, tmp_path / "a", selector)
    halves = [1, 1, 1, 0.5, 0.5, 1]
    runs = [0.5 * any(s.is_content for s in segments) for segments in plan.steps]  # once an image, of two samples
    blocks = sum(h * step_macs(plan.model, segments, 0) for h, segments in zip(halves, plan.steps, strict=True))
    assert plan_macs(plan) == pytest.approx(blocks + sum(runs) * selector_macs(plan.model))


def test_views_that_an_artefact_reads_stay_its_own(teacher: DiT, selector: Selector, tmp_path: Path) -> None:
    """Others that share the file begin with what is in it, and list no more than their own graphs take."""
    plan, shared = content_plan(teacher, selector), WeightFiles(teacher, "fp32", tmp_path, Companions(selector))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    write_sharing(shared, plan, lower(plan, "cpu"), tmp_path / "first")
    in_file = set(tensors_of(teacher, plan, Companions(selector)))
    assert {"selector.block.attn.q.weight", *in_file} <= set(read_manifest(tmp_path / "first")["weights"])
    assert set(shared.link(plan, tmp_path / "second")[0]) == in_file


def test_only_programs_with_content_run_the_predictor(exported: Path, teacher: DiT, selector: Selector) -> None:
    programs = {p.name: p for p in lower(content_plan(teacher, selector), "cpu").programs}
    weights = read_manifest(exported)["weights"]
    held = {name.removeprefix("selector.") for name in weights if name.startswith("selector.")}
    thirds = {name for name in held if any(f".{letter}." in name for letter in "qkv")}  # views of qkv
    assert set(selector.predictor.state_dict()) == held - thirds - {"modulations"}
    for name, program in programs.items():
        graph = onnx.load(str(exported / f"{name}.onnx"), load_external_data=False).graph
        ops = Counter(node.op_type for node in graph.node)
        chosen = [s for s in program.segments if s.is_content and s.keep < 16]  # where all are kept there is nothing to choose
        assert ops["TopK"] == len(chosen)
        assert any(node.name.startswith("selector.block/") for node in graph.node) == bool(chosen)
        reads = {tensor.name for tensor in graph.initializer if tensor.name.startswith("selector.")}
        assert not any("adaLN" in tensor for tensor in reads)
        assert bool(reads) == bool(chosen)


def test_predictor_can_be_rebuilt_bit_for_bit(exported: Path, teacher: DiT, selector: Selector) -> None:
    plan = CachePlan.load(exported / "plan.json")
    rebuilt = rebuild_companions(CachedSampler(exported, preload=False), plan, CONFIG).selector
    assert rebuilt is not None
    assert Selector.of(rebuilt.predictor).digest == rebuilt.digest == selector.digest
    assert rebuild_companions(CachedSampler(exported, preload=False), make_plan(teacher), CONFIG).selector is None


def test_export_without_the_predictor_leaves_nothing(tmp_path: Path, teacher: DiT, selector: Selector) -> None:
    with pytest.raises(PlanError, match="but none was given"):
        export_artefact(teacher, content_plan(teacher, selector), tmp_path / "a", "fp32", "cpu", 1, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_predictor_is_refused_by_the_manifest(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    _, _, offset, _ = read_manifest(copy)["weights"]["selector.head.weight"]
    content = bytearray((copy / "weights.data").read_bytes())
    content[offset] ^= 1
    (copy / "weights.data").write_bytes(content)
    with pytest.raises(Exception, match=r"weights\.data is damaged"):
        CachedSampler(copy)
