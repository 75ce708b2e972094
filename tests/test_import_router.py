"""Released routers as plans: the layout of the release, its MACs, and files that are none."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FULL, SIGNATURE, vp_sampler
from recipes import XL
from test_commands import make_run

from export.compiler.compile import export_artefact
from tc_lightning.cli import main
from tc_lightning.errors import PlanError, TeacherError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, reuse
from tc_lightning.policies.released_routers import ReleasedRouter, imported_plan, macs_share, read_router

GUIDANCE = Guidance(1.5, 3)
ON, OFF = 2.0, -3.0  # sigmoids 0.88 and 0.047


def logits(rows: dict[int, list[float]], num_steps: int = 4, entries: int = 8) -> dict[str, torch.Tensor]:
    """A state dict as released; rows that are not given would have everything computed."""
    return {f"{i}.prob": torch.tensor(rows.get(i, [ON] * entries)) for i in range(num_steps)}


def released(rows: dict[int, list[float]], **more: Any) -> dict[str, Any]:
    """What the release of DiT holds beside it."""
    args = argparse.Namespace(model="DiT-XL/2", thres=0.1)
    return {"routers": logits(rows), "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}, "args": args} | more


ROWS = {
    2: [ON, OFF, ON, OFF, OFF, OFF, ON, ON],  # sampling step 1: MLPs of blocks 0 and 1, block 2 whole
    0: [OFF, ON, ON, ON, ON, ON, ON, OFF],  # sampling step 3: attention of block 0, MLP of block 3
    1: [OFF] * 8,  # a full step whatever it says
}


def saved(folder: Path, held: Any) -> Path:
    torch.save(held, folder / "router.pt")
    return folder / "router.pt"


def test_rows_are_times_from_the_least_and_entries_attention_before_mlp(tmp_path: Path) -> None:
    router = read_router(saved(tmp_path, released(ROWS)))
    plan = imported_plan(router, SIGNATURE, vp_sampler("ddim", 4), GUIDANCE)
    assert plan.steps[0] == plan.steps[2] == (compute(0, 4),)
    assert plan.steps[1] == (reuse(0, 2, ("mlp",)), reuse(2, 3, ("attn", "mlp")), compute(3, 4))
    assert plan.steps[3] == (reuse(0, 1, ("attn",)), compute(1, 3), reuse(3, 4, ("mlp",)))
    assert plan.reference == plan.sampler
    assert plan.provenance["arguments"] == {"router": "router.pt", "sha256": router.digest, "threshold": 0.1}
    assert CachePlan.from_json(plan.to_json()) == plan


def test_macs_by_hand(tmp_path: Path) -> None:
    """16 tokens of width 32: an attention has 16 (4 32^2) + 2 16^2 32 = 81,920 MACs, an MLP 16 (8 32^2) = 131,072; of each of 4 steps
    4 blocks of both are 851,968. Two attentions and four MLPs are reused."""
    plan = imported_plan(read_router(saved(tmp_path, logits(ROWS))), SIGNATURE, vp_sampler("ddim", 4), GUIDANCE)
    whole = 4 * (851_968 + SIGNATURE.fixed_macs)
    assert macs_share(plan) == pytest.approx(1 - (2 * 81_920 + 4 * 131_072) / whole, rel=1e-12)


@pytest.mark.parametrize(
    ("num_steps", "attn", "mlp", "full", "cached"), [(50, 371, 365, 5.72, 4.36), (20, 157, 155, 2.29, 1.78)], ids=["50", "20"]
)
def test_macs_of_the_released_routers_are_those_published(num_steps: int, attn: int, mlp: int, full: float, cached: float) -> None:
    """As many branches as the released DDIM50_router.pt and DDIM20_router.pt compute in the steps that reuse; the paper's table 1 has
    the tera-MACs of DiT-XL/2 with and without them."""
    weight = np.ones((num_steps, 28, 2))
    for b, count in enumerate((attn, mlp)):
        cached_T28 = np.zeros(num_steps // 2 * 28)
        cached_T28[:count] = 1.0
        weight[1::2, :, b] = cached_T28.reshape(-1, 28)
    plan = imported_plan(ReleasedRouter(weight, "x.pt", ""), XL, vp_sampler("ddim", num_steps), GUIDANCE)
    assert macs_share(plan) == pytest.approx(cached / full, rel=0.01)


def test_thresholds(tmp_path: Path) -> None:
    router = read_router(saved(tmp_path, logits({2: [0.0, 2.0, -2.0, 3.0, 0.0, 0.0, 0.0, 0.0]})))
    assert router.weight_TL2[1, :2].ravel() == pytest.approx([0.5, 0.8808, 0.1192, 0.9526], abs=1e-4)
    assert router.reused_TL2(0.1).sum() == 0
    assert router.reused_TL2(0.9)[1].ravel().tolist() == [True, True, True, False, True, True, True, True]
    assert router.reused_TL2(0.5)[1].sum() == 6  # 0.5 itself is not above it
    assert router.reused_TL2(0.5)[[0, 2]].sum() == 0


def test_what_is_no_router_is_refused(tmp_path: Path) -> None:
    unlike = logits({}) | {"3.prob": torch.zeros(6)}
    damaged = logits({0: [float("nan")] * 8})
    for held, words in (
        ({"0.prob": torch.zeros(8), "2.prob": torch.zeros(8)}, "not 0.prob to 1.prob"),
        ({"routers": {}}, "a tensor `I.prob` of logits"),
        ([torch.zeros(8)], "holds list"),
        (unlike, r"unlike shapes or types \(\(6,\), \(8,\)\)"),
        (logits({}, entries=7), r"the shape \(7,\) for 4 steps"),
        (logits({}, num_steps=3), r"for 3 steps: .* an even number of steps"),
        ({f"{i}.prob": torch.zeros(8, dtype=torch.long) for i in range(4)}, "unlike shapes or types"),
        ({f"{i}.prob": 0.5 for i in range(4)}, "unlike shapes or types"),
        (damaged, "NaN or infinite"),
    ):
        with pytest.raises(PlanError, match=words):
            read_router(saved(tmp_path, held))
    with pytest.raises(PlanError, match="no router at"):
        read_router(tmp_path / "absent.pt")
    (tmp_path / "router.pt").write_bytes(b"PK not a zip")
    with pytest.raises(TeacherError, match="cannot be read"):
        read_router(tmp_path / "router.pt")
    with pytest.raises(TeacherError, match="can run code"):
        read_router(saved(tmp_path, {"routers": print}))


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    router = read_router(saved(tmp_path, logits(ROWS)))
    for signature, steps, words in (
        (XL, 4, "a router for 4 blocks, and the model has 28"),
        (SIGNATURE, 6, "for 4 sampling steps, and the sampler has 6: take 4"),
    ):
        with pytest.raises(PlanError, match=words):
            imported_plan(router, signature, vp_sampler("ddim", steps), GUIDANCE)
    with pytest.raises(PlanError, match="threshold 1"):
        imported_plan(router, SIGNATURE, vp_sampler("ddim", 4), GUIDANCE, 1.0)


def test_the_command_for_a_run_and_its_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, (FULL,) * 4)
    saved(tmp_path, released(ROWS))
    main(["import-router", "router.pt", "--run", str(run), "--out", "plan.json"])
    plan = CachePlan.load(tmp_path / "plan.json")
    assert plan.reference == CachePlan.load(run / "plan.json").reference
    out = capsys.readouterr().out
    assert "6 of 8 attentions and 4 of 8 MLPs are computed, 37.50% come from the cache (18.75% of all steps)" in out
    assert f"--run {run} --plan plan.json" in out
    model = load_teacher(TeacherSpec("teacher.safetensors"))
    manifest = export_artefact(model, plan, tmp_path / "artefact", "fp32", "cpu", images=2, report=lambda _: None)
    assert manifest["parity"]["trajectory_rel_l2"] < 1e-5


def test_the_command_for_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path, (FULL,) * 4)
    saved(tmp_path, logits(ROWS))
    arguments = ["import-router", "router.pt", "--teacher", "teacher.safetensors", "--out", "plan.json"]
    main([*arguments, "--guidance-channels", "2", "--guidance-scale", "2", "--spacing", "trailing"])
    plan = CachePlan.load(tmp_path / "plan.json")
    assert (plan.guidance, plan.sampler.spacing, plan.num_steps) == (Guidance(2.0, 2), "trailing", 4)
    for wrong, words in (
        (["--guidance-channels", "9"], "the teacher has 3, choose 1 to 3"),
        (["--sampler", "ddpmx"], "unknown"),
        (["--threshold", "2"], "threshold 2"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *wrong])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
