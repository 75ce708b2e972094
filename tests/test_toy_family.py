"""A new family is one file: `toy.py` goes through caching, training's soft forms, measurements, plans, export and runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
import torch
from conftest import Steps, make_plan
from toy import make_toy

from export.compiler.compile import export_artefact
from export.compiler.parity import relative_l2
from export.runtime.manifest import read_manifest
from export.runtime.sampler import CachedSampler
from tc_lightning.cache.soft_network import full_eps, mixed_branches_eps, mixed_eps
from tc_lightning.errors import PlanError
from tc_lightning.measure.calibrate import calibrate
from tc_lightning.measure.sensitivity import branch_sensitivity, probes_for
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import block_macs, segment_macs
from tc_lightning.plan.dataflow import Entry, entries_read
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, partial, reuse, skip
from tc_lightning.policies.routers import router_steps
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample, sample_steps

TOY, NAMES, GUIDANCE = make_toy(), ("look", "widen", "shade"), Guidance(1.5, 3)
SIGNATURE = model_signature(TOY)
LABELS = torch.tensor([0, 3])
FULL = (compute(0, 3),)
EVERY_MODE: Steps = (
    FULL,
    FULL,
    (reuse(0, 1, ("look",), 1), reuse(1, 2, ("widen", "shade")), skip(2, 3, 1)),
    (partial(0, 2, (0, 3, 7, 8), 1, NAMES), compute(2, 3)),
    (partial(0, 2, (1, 3, 9, 15), 1, NAMES), compute(2, 3)),
    (partial(0, 3, (2, 4), 0, ("widen", "shade")),),
    (partial(0, 3, tuple(range(16)), 0, NAMES),),
)


def torch_latents(plan: CachePlan) -> torch.Tensor:
    return sample(TOY, plan, noise_for(5, range(2), TOY), LABELS)


def test_full_compute_is_the_network_bit_for_bit() -> None:
    plan = make_plan(SIGNATURE, (FULL,) * 3, Guidance())
    for state in sample_steps(TOY, plan, noise_for(5, range(2), TOY), LABELS):
        t = torch.full((2,), plan.sampler.steps[state.step].t)
        assert torch.equal(state.eps, TOY(state.x, t, LABELS))
    kept = make_plan(SIGNATURE, (FULL, *((partial(0, 3, tuple(range(16)), 0, NAMES),),) * 2), Guidance())
    assert torch.equal(torch_latents(kept), torch_latents(plan))


def test_plans_name_its_branches(tmp_path: Path) -> None:
    plan = make_plan(SIGNATURE, EVERY_MODE, GUIDANCE)
    plan.save(tmp_path / "plan.json")
    loaded = CachePlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.digest == plan.digest
    assert plan.to_json()["model"]["branches"] == "look:kv widen shade"
    assert plan.model.block.names == NAMES
    with pytest.raises(PlanError, match=r"\['attn'\] must be distinct and of \['look', 'widen', 'shade'\]"):
        make_plan(SIGNATURE, (FULL, (reuse(0, 3, ("attn",)),)))
    with pytest.raises(PlanError, match="partial recomputes look and widen and shade, or widen and shade alone"):
        make_plan(SIGNATURE, (FULL, (partial(0, 3, (1,), 0, ("look", "shade")),)))
    with pytest.raises(PlanError, match=r"differ in family .*; branches"):
        plan.require_model(dataclasses.replace(SIGNATURE, family="dit", branches="attn:kv mlp"))
    reads = entries_read(partial(0, 1, (1,), 2, ("widen", "shade")), 16, SIGNATURE.block)
    assert reads == {Entry("span", 0, 1): 2, Entry("look", 0, 1): 2}
    look, widen = (block_macs(SIGNATURE, 16, (name,)) for name in NAMES[:2])
    assert segment_macs(SIGNATURE, reuse(0, 2, ("shade", "look"))) == 2 * widen
    assert block_macs(SIGNATURE, 16) == look + 2 * widen


@pytest.mark.parametrize(
    ("branches", "wrong"),
    [
        ("look:kv k", "not span, k, v, guidance"),
        ("a a", "a name .* to itself"),
        ("a:kv b:kv", "not of several"),
        ("", "are '': expected their names"),
        ("look:kv  widen", "expected their names in order, a space between them"),
        ("look:kb widen", "expected their names"),
        ("look:kv look", "expected their names"),
    ],
)
def test_branches_of_a_model_that_no_network_has(branches: str, wrong: str) -> None:
    with pytest.raises(PlanError, match=wrong):
        make_plan(dataclasses.replace(SIGNATURE, branches=branches), (FULL,))


def test_soft_forms_and_measurements_have_one_column_a_branch() -> None:
    x_prev, x = noise_for(0, range(2), TOY), noise_for(1, range(2), TOY)
    t_prev, t = torch.tensor([600.0, 300.0]), torch.tensor([560.0, 250.0])
    model = TOY
    eps, _ = full_eps(model, GUIDANCE, x, t, LABELS)
    _, caches = full_eps(model, GUIDANCE, x_prev, t_prev, LABELS)
    assert [set(cache) for cache in caches.branches] == [{*NAMES}] * 3
    ones, _ = mixed_branches_eps(model, GUIDANCE, caches.branches, x, t, LABELS, torch.ones(2, 3, 3))
    assert torch.equal(ones, eps)
    soft = mixed_eps(model, GUIDANCE, caches.blocks, x, t, LABELS, torch.ones(2, 3, 16))
    torch.testing.assert_close(soft, eps, rtol=1e-5, atol=1e-5)
    probes = probes_for(model, 0, [1, 2], 1)
    sensitivity = branch_sensitivity(model, GUIDANCE, x_prev, x, t_prev, t, LABELS, probes)
    assert sensitivity.shape == (2, 3, 3)
    assert (sensitivity > 0).all()
    table = make_plan(SIGNATURE, (FULL,) * 3, GUIDANCE).sampler
    measured = calibrate(model, full_plan(SIGNATURE, table, GUIDANCE), x, LABELS, 2, progress=False)
    assert measured.drift_TGL2.shape == (3, 2, 3, 3)
    reused = torch.eye(3, dtype=torch.bool)[None].numpy()
    assert router_steps(reused, NAMES) == (tuple(reuse(b, b + 1, NAMES[b : b + 1]) for b in range(3)),)


@pytest.mark.parametrize("modes", ["", "bb1bb1b"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_exporter_runs_it(tmp_path: Path, modes: str, precision: str) -> None:
    plan = make_plan(SIGNATURE, EVERY_MODE, GUIDANCE, "dpmpp_2m", modes=modes)
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    manifest = export_artefact(TOY, plan, tmp_path / "toy", precision, "cpu", 2, lambda _: None)
    assert manifest["parity"]["trajectory_rel_l2"] < tolerance
    assert read_manifest(tmp_path / "toy")["modulations"] == 3 * 2 + 1
    latents, expected = CachedSampler(tmp_path / "toy").sample(LABELS.tolist(), seed=5).latents, torch_latents(plan).numpy()
    assert max(relative_l2(a, e) for a, e in zip(latents, expected, strict=True)) < tolerance
    full = torch_latents(full_plan(plan.model, plan.sampler, plan.guidance)).numpy()
    assert relative_l2(expected, full) > 1e-3  # caching is not so harmless here that parity in fp32 would not notice it
    graph = onnx.load(str(tmp_path / "toy" / "step_full.onnx"), load_external_data=False).graph
    assert [node.name.split("/")[0] for node in graph.node if node.op_type == "Attention"] == [f"blocks.{b}" for b in range(3)]
    assert {"RMSNormalization", "Tanh", "Attention"} <= {node.op_type for node in graph.node}
