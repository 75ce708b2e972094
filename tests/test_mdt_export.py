"""MDTv2 through the exporter and the runtime: what ONNX Runtime computes is what torch computes, over whole trajectories."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Steps, make_plan
from exporting import graphs_of, planned, torch_latents, worst_error
from mdt_models import make_mdt
from test_skips import EVERY_MODE, FULL

from export.compiler.compile import export_artefact
from export.runtime.manifest import read_manifest
from export.runtime.sampler import CachedSampler
from export.verify import verify
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, partial, reuse, skip
from tc_lightning.policies.tprr import tprr_plan
from tc_lightning.rollout.sampling import full_plan, model_signature

MDT = make_mdt()
SIGNATURE = model_signature(MDT)
GUIDED = Guidance(1.5, 3)
PLAIN: Steps = (
    FULL,
    FULL,
    (partial(0, 6, (0, 3, 7, 12), 1),),
    (reuse(0, 6, ("attn",), 1),),
    (skip(0, 6, 1),),
    (compute(0, 1), skip(1, 3, 1), compute(3, 6)),
    (partial(0, 6, (1, 2, 9, 15), 1),),
)


def tprr() -> CachePlan:
    """Two-Phase Round-Robin whose P-steps recompute a quarter of the tokens of all blocks."""
    sampler = make_plan(SIGNATURE, (FULL,) * 9).sampler
    chosen = [tuple(range(i % 4, 16, 4)) for i in range(9)]
    return tprr_plan(
        SIGNATURE, sampler, GUIDED, sampler, boundary=4, k1=3, k2=2, pruned_step=lambda i: (partial(0, 6, chosen[i], 1),), warmup=2
    )


PLANS = {
    "tprr": tprr(),
    "plain": make_plan(SIGNATURE, PLAIN, GUIDED, "dpmpp_2m"),
    "every mode": make_plan(SIGNATURE, EVERY_MODE, GUIDED),
    "halves": make_plan(SIGNATURE, EVERY_MODE, GUIDED, modes="bb1bb0bb1b"),
    "planned": planned(MDT, GUIDED),
    "unguided": make_plan(SIGNATURE, EVERY_MODE, Guidance()),
}


@pytest.mark.parametrize("name", PLANS)
def test_whole_trajectories_are_those_of_torch(name: str, tmp_path: Path) -> None:
    plan = PLANS[name]
    manifest = export_artefact(MDT, plan, tmp_path / "mdt", "fp32", "cpu", 2, lambda _: None)
    assert manifest["parity"]["trajectory_rel_l2"] < 1e-4
    assert read_manifest(tmp_path / "mdt")["model"]["skips"] == SIGNATURE.skips.to_json()
    got, expected = CachedSampler(tmp_path / "mdt").sample([1, 4], seed=5).latents, torch_latents(MDT, plan, [1, 4], 5)
    assert worst_error(got, expected) < 1e-4
    full = torch_latents(MDT, full_plan(plan.model, plan.sampler, plan.guidance), [1, 4], 5)
    assert worst_error(expected, full) > 1e-3  # caching is not so harmless here that parity would not notice it


def test_verify_rebuilds_it_from_the_artefact(tmp_path: Path) -> None:
    export_artefact(MDT, PLANS["plain"], tmp_path / "mdt", "fp32", "cpu", 2, lambda _: None)
    assert verify(tmp_path / "mdt", "cpu", 2, 2, seed=1, quiet=True)["rel_l2_export"] < 1e-4


def test_fp16_is_near(tmp_path: Path) -> None:
    manifest = export_artefact(MDT, PLANS["tprr"], tmp_path / "mdt", "fp16", "cpu", 2, lambda _: None)
    assert manifest["parity"]["trajectory_rel_l2"] < 3e-2


def test_graphs_are_lean(tmp_path: Path) -> None:
    """One attention node a block, and skips by names of their own; a step that skips all blocks computes none of it."""
    export_artefact(MDT, PLANS["plain"], tmp_path / "mdt", "fp32", "cpu", 1, lambda _: None)
    graphs = graphs_of(tmp_path / "mdt")
    full = graphs["step_full"].graph
    assert [n.name.split("/")[0] for n in full.node if n.op_type == "Attention"] == [f"blocks.{b}" for b in range(6)]
    merged = [n.name for n in full.node if n.op_type == "FusedMatMul" and "skip_linear" in n.name]
    assert len(merged) == 4
    idle = [name for name, g in graphs.items() if name != "condition" and not any(n.name.startswith("blocks.") for n in g.graph.node)]
    assert len(idle) == 1  # the step that skips all blocks
