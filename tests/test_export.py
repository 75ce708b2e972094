from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from conftest import EVERY_MODE, FULL, make_plan, make_teacher, random_steps
from exporting import QUARTERS, export, graphs_of, torch_latents, worst_error

from export.compiler.parity import relative_l2
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.costs import cache_bytes_per_image
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import partial

VARIANTS: dict[str, tuple[dict[str, Any], str, str, Guidance]] = {
    "three of four channels": ({}, "ddim", "uniform", Guidance(1.5, 3)),
    "all channels, no sigma, diffusers' conventions": (
        {"learn_sigma": False, "freq_shift": 1.0, "mlp_norm_eps": 1e-2},
        "dpmpp_2m",
        "logsnr",
        Guidance(2.5, 4),
    ),
    "two past outputs": ({"depth": 4}, "dpmpp_3m", "logsnr", Guidance(1.5, 4)),
    "no guidance, one channel": ({"in_channels": 1}, "ddim", "trailing", Guidance()),
    "no guidance, multistep": ({"in_channels": 3, "mlp_norm_eps": 1e-5}, "dpmpp_2m", "uniform", Guidance()),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_mode_agrees_with_torch(tmp_path, name):
    changes, sampler, spacing, guidance = VARIANTS[name]
    model = make_teacher(2, **changes)
    plan = make_plan(model, EVERY_MODE, guidance, sampler, spacing)
    manifest = export(model, plan, tmp_path / "artefact")
    assert manifest["parity"]["trajectory_rel_l2"] < 1e-5
    assert max(row["rel_l2"] for row in manifest["parity"]["programs"]) < 1e-5
    loaded = CachedSampler(tmp_path / "artefact")
    for labels in ([4], [0, 3, 1], [2, 2, 0, 4, 1]):  # one artefact, any batch
        expected = torch_latents(model, plan, labels, seed=11)
        assert worst_error(loaded.sample(labels, seed=11).latents, expected) < 1e-5
    full = make_plan(model, (FULL,) * 8, guidance, sampler, spacing)
    full_x = torch_latents(model, full, labels, seed=11)
    assert worst_error(loaded.sample(labels, seed=11, full=True).latents, full_x) < 1e-5
    assert relative_l2(expected, full_x) > 1e-2  # caching is not so harmless here that parity would not notice it


@pytest.mark.parametrize("seed", range(4))
def test_random_plans_agree_with_torch(tmp_path, seed):
    model = make_teacher(seed, depth=3)
    plan = make_plan(model, random_steps(seed, num_steps=6, depth=3), sampler=("ddim", "dpmpp_2m")[seed % 2])
    export(model, plan, tmp_path / "artefact")
    loaded = CachedSampler(tmp_path / "artefact", preload=False)
    assert worst_error(loaded.sample([1, 3], seed=5).latents, torch_latents(model, plan, [1, 3], 5)) < 1e-5


@pytest.mark.parametrize("modes", ["", "bb111bb1"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_graph_for_any_number_of_tokens_agrees_with_torch(tmp_path, modes, precision):
    model = make_teacher(4)
    plan = make_plan(model, (FULL, FULL, QUARTERS[0], FULL, QUARTERS[1], FULL, QUARTERS[2], QUARTERS[0]), modes=modes)
    manifest = export(model, plan, tmp_path / "artefact", precision)
    graphs = {program["graph"] for program in manifest["programs"].values()}
    assert {f"{name}.onnx" for name in graphs} == {path.name for path in (tmp_path / "artefact").glob("step_*.onnx")}
    assert len(graphs) == (3 if modes else 2) < len(manifest["programs"])
    loaded, tolerance = CachedSampler(tmp_path / "artefact"), 1e-5 if precision == "fp32" else 3e-2
    for seed in (5, 6):  # what the first request left in memory is not seen by the second
        result = loaded.sample([1, 3], seed=seed)
        assert worst_error(result.latents, torch_latents(model, plan, [1, 3], seed)) < tolerance
    assert result.receipt["steps_reading_cache"] == (5 if modes else 4)
    assert sum(result.receipt["steps_per_program"].values()) == 8
    assert set(result.receipt["nodes_per_provider"]) == {"condition", *result.receipt["steps_per_program"]}


def test_shared_graphs_are_for_the_cpu(tmp_path):
    model = make_teacher(4)
    export(model, make_plan(model, (FULL, QUARTERS[0])), tmp_path / "artefact")
    with pytest.raises(TokenCacheError, match=r"exported for the CPU.*--provider cuda"):
        CachedSampler(tmp_path / "artefact", provider="cuda")


def test_token_sets_of_two_segments_do_not_mix(tmp_path):
    """Same counts, other tokens, in one program, changing from step to step in one segment alone."""
    model = make_teacher(3)
    p = [(partial(0, 2, (0, 1, 2)), partial(2, 4, kept)) for kept in ((0, 1, 2), (3, 9, 12), (13, 14, 15))]
    plan = make_plan(model, (FULL, *p))
    assert len(lower(plan, "cpu").programs) == 3
    export(model, plan, tmp_path / "artefact")
    loaded = CachedSampler(tmp_path / "artefact", preload=False)
    assert worst_error(loaded.sample([1, 3], seed=5).latents, torch_latents(model, plan, [1, 3], 5)) < 1e-5


def test_full_plan(tmp_path):
    model = make_teacher()
    plan = make_plan(model, (FULL,) * 4)
    manifest = export(model, plan, tmp_path / "artefact")
    assert list(manifest["programs"]) == ["step_full"]
    assert manifest["entries"] == {}
    assert manifest["fidelity"]["psnr_db"] == 200.0


def test_fp16(tmp_path):
    model = make_teacher(2)
    plan = make_plan(model)
    manifest = export(model, plan, tmp_path / "half", "fp16")
    parity = manifest["parity"]["trajectory_rel_l2"]
    assert 1e-6 < parity < 3e-2
    assert manifest["cache_bytes_per_image"] == cache_bytes_per_image(plan, 2)
    parameters = sum(p.numel() for p in model.parameters())
    assert 2 * parameters <= (tmp_path / "half" / "weights.data").stat().st_size < 2.1 * parameters
    result = CachedSampler(tmp_path / "half").sample([1, 2], seed=3)
    assert result.latents.dtype == np.float32
    assert result.receipt["cache_bytes"] == 2 * cache_bytes_per_image(plan, 2)
    graph = graphs_of(tmp_path / "half")["step_full"].graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    assert types == {
        "x": onnx.TensorProto.FLOAT,
        "step": onnx.TensorProto.INT64,
        "first_bad": onnx.TensorProto.INT64,
        "first_step": onnx.TensorProto.INT64,
        "mods": onnx.TensorProto.FLOAT16,
        "rows": onnx.TensorProto.INT64,
        "guidance": onnx.TensorProto.FLOAT,
        "x_next": onnx.TensorProto.FLOAT,
        "step_next": onnx.TensorProto.INT64,
        "first_bad_next": onnx.TensorProto.INT64,
    }
