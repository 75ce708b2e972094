from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import EVERY_MODE, FULL, make_plan, make_teacher, random_steps

import export.compiler.compile
from export.command import run
from export.compiler.compile import export_artefact
from export.compiler.parity import Check, ParityError, relative_l2, require_parity
from export.runtime.manifest import read_manifest, sha256_of
from export.runtime.programs import condition_times, lower
from export.runtime.sampler import CachedSampler
from export.verify import _fitted_baseline, _table, rebuild_teacher, verify
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.measure.psnr import psnr
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import cache_bytes_per_image, macs_speedup
from tc_lightning.plan.given import drawn_labels
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import partial, skip
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, reference_plan, sample


def export(model: DiT, plan: CachePlan, out: Path, precision: str = "fp32") -> dict[str, Any]:
    return export_artefact(model, plan, out, precision, "cpu", images=2, report=lambda _: None)


def torch_latents(model: DiT, plan: CachePlan, labels: list[int], seed: int) -> np.ndarray:
    return sample(model, plan, noise_for(seed, range(len(labels)), model), torch.tensor(labels)).numpy()


def worst_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return max(relative_l2(a, e) for a, e in zip(actual, expected, strict=True))


def graphs_of(folder: Path) -> dict[str, onnx.ModelProto]:
    return {path.stem: onnx.load(str(path), load_external_data=False) for path in folder.glob("*.onnx")}


def snapshot(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir()}


# Parity


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


QUARTERS = [(partial(0, 4, kept, 1),) for kept in ((0, 3, 6, 15), (1, 2, 4, 9), (5,))]


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


@pytest.mark.parametrize("solvers", [("dpmpp_2m", "ddim"), ("ddim", "dpmpp_3m"), ("dpmpp_3m", "dpmpp_2m")])
def test_the_reference_has_steps_and_coefficients_of_its_own(tmp_path, teacher, solvers):
    """Other times, another number of them, and another memory of past outputs than the plan's."""
    reference = make_sampler(solvers[1], 8, "logsnr")
    plan = make_plan(teacher, (FULL, FULL, (skip(0, 4, 1),), (partial(0, 4, (1, 5)),), FULL), sampler=solvers[0], reference=reference)
    manifest = export(teacher, plan, tmp_path / "artefact")
    assert (manifest["steps"], manifest["full_steps"], manifest["full_offset"]) == (5, 8, 5)
    assert manifest["reference"] == {"name": solvers[1], "spacing": "logsnr"}
    assert manifest["macs_speedup"] == pytest.approx(macs_speedup(plan))
    checked = [row["where"] for row in manifest["parity"]["programs"]]
    assert {where for where in checked if "step_full" in where} == {f"step_full, step {i}" for i in range(reference.history + 1)}
    assert {where.split(",")[0] for where in checked} == {*manifest["programs"]}
    loaded, labels = CachedSampler(tmp_path / "artefact"), [1, 3]
    cached, full = (loaded.sample(labels, seed=5, full=full).latents for full in (False, True))
    assert worst_error(cached, torch_latents(teacher, plan, labels, 5)) < 1e-5
    assert worst_error(full, torch_latents(teacher, reference_plan(plan), labels, 5)) < 1e-5
    assert relative_l2(full, torch_latents(teacher, full_plan(plan.model, plan.sampler, plan.guidance), labels, 5)) > 1e-2
    features = next(t for t in graphs_of(tmp_path / "artefact")["condition"].graph.initializer if list(t.dims)[1:] == [256])
    assert features.dims[0] == 5 + 8


def test_verify_compares_with_the_reference(tmp_path, teacher):
    """18 steps of DDIM at full compute, replaced by six of DPM-Solver++ of which three are skipped."""
    reference, cheap = make_sampler("ddim", 18, "trailing"), (skip(0, 4, 1),)
    plan = make_plan(teacher, (FULL, FULL, cheap, FULL, cheap, cheap), sampler="dpmpp_2m", spacing="logsnr", reference=reference)
    export(teacher, plan, tmp_path / "artefact")
    report = verify(tmp_path / "artefact", "cpu", images=2, batch=2, seed=3, quiet=True)
    assert report["macs_speedup"] == macs_speedup(plan) > 5.0
    assert report["rel_l2_export"] < 1e-5
    assert list(report["baselines_psnr_db"]) == ["ddim, 4 steps", "reuse, 3 of 18 full", "fitted, 4 steps"]
    labels = drawn_labels(3, range(2), 5).tolist()
    x, x_full = (torch_latents(teacher, p, labels, 3) for p in (plan, reference_plan(plan)))
    assert report["psnr_db"] == pytest.approx(psnr(x, x_full), abs=1e-2)
    own = dataclasses.replace(plan, reference=dataclasses.replace(reference, name="calibrated"))
    export(teacher, own, tmp_path / "artefact")
    report = verify(tmp_path / "artefact", "cpu", 1, 1, seed=3, quiet=True)
    assert list(report["baselines_psnr_db"]) == ["reuse, 3 of 18 full", "fitted, 4 steps"]


def test_verify_prints_the_fitted_run_that_the_plan_names(tmp_path, teacher):
    """It is run as it stands, with the coefficients that the plan holds: an exact one is an exact rival."""
    table = make_sampler("ddim", 6)
    plan = make_plan(teacher, (FULL, FULL, (skip(0, 4, 0),), FULL, FULL, FULL), fit={"target": "reference"})
    export(teacher, dataclasses.replace(plan, fewer_steps=table), tmp_path / "artefact")
    report = verify(tmp_path / "artefact", "cpu", 2, 2, seed=3, quiet=True)
    assert report["baselines_psnr_db"]["fitted, 6 steps"] > 100 > report["psnr_db"]
    assert not report["beats_baselines"]
    assert "no cache is the better one (plan with --no-cache)" in _table(report)


@pytest.mark.parametrize("wrong", ["another target", "a step too many"])
def test_a_named_run_that_is_no_rival_is_not_printed(teacher, wrong):
    """One that was fitted to the ODE, or costs a whole step more: another is fitted in its place."""
    steps = (FULL, FULL, (skip(0, 4, 0),), FULL, (skip(0, 4, 0),), (skip(0, 4, 0),), (skip(0, 4, 0),))
    plan = make_plan(teacher, steps, fit={"target": "ode" if wrong == "another target" else "reference"})
    named = make_sampler("ddim", 4 if wrong == "another target" else 6)
    found = _fitted_baseline(teacher, dataclasses.replace(plan, fewer_steps=named), quiet=True)
    assert list(found) == ["fitted, 4 steps"]
    assert next(iter(found.values())).sampler.name == "dpmpp_2m-fitted"


def test_a_reference_at_the_plans_times_is_conditioned_once(tmp_path, teacher):
    table = make_sampler("ddim", 4)
    reference = dataclasses.replace(table, steps=tuple(dataclasses.replace(s, next_m=0.9 * s.next_m) for s in table.steps))
    plan = make_plan(teacher, (FULL, (skip(0, 4),), FULL, FULL), reference=reference)
    manifest = export(teacher, plan, tmp_path / "artefact")
    assert (manifest["full_steps"], manifest["full_offset"]) == (4, 0)
    loaded = CachedSampler(tmp_path / "artefact")
    expected = torch_latents(teacher, reference_plan(plan), [2], 5)
    assert worst_error(loaded.sample([2], seed=5, full=True).latents, expected) < 1e-5


def test_eps_scale_costs_no_node_and_leaves_the_reference_alone(tmp_path, teacher):
    steps = (FULL, FULL, (skip(0, 4, 1),), FULL, (skip(0, 4, 1),))
    plans = [make_plan(teacher, steps, sampler="dpmpp_2m", eps_scale=scale) for scale in ((), (0.5, 0.9, 1.2, 0.8, 0.95))]
    folders = [tmp_path / "plain", tmp_path / "scaled"]
    for plan, folder in zip(plans, folders, strict=True):
        export(teacher, plan, folder)
    (plain, scaled), loaded = map(graphs_of, folders), CachedSampler(folders[1])
    assert [[n.op_type for n in plain[name].graph.node] for name in plain] == [
        [n.op_type for n in scaled[name].graph.node] for name in plain
    ]
    assert plain["step_full"] == scaled["step_full"]
    x = torch_latents(teacher, plans[1], [1, 3], 5)
    assert worst_error(loaded.sample([1, 3], seed=5).latents, x) < 1e-5
    assert relative_l2(x, torch_latents(teacher, plans[0], [1, 3], 5)) > 1e-2
    full = torch_latents(teacher, reference_plan(plans[0]), [1, 3], 5)
    assert worst_error(loaded.sample([1, 3], seed=5, full=True).latents, full) < 1e-5


def test_planted_bug_in_the_reference_is_found(tmp_path, monkeypatch, teacher):
    """Its steps looked up at the plan's times."""
    monkeypatch.setattr("export.runtime.contract.condition_times", lambda plan: (condition_times(plan)[0], 0))
    plan = make_plan(teacher, (FULL, (skip(0, 4),), FULL), reference=make_sampler("ddim", 5, "leading"))
    with pytest.raises(ParityError, match=r"step_full, step 0 +x_next") as caught:
        export(teacher, plan, tmp_path / "artefact")
    assert "step_00" not in str(caught.value)


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


# Graphs


def test_graphs_are_lean(artefact, plan):
    programs = {p.name: p for p in lower(plan, "cpu").programs}
    graphs = graphs_of(artefact)
    assert set(graphs) == {"condition", *programs}
    for name, model in graphs.items():
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 23), ("com.microsoft", 1)]
        assert {node.op_type for node in model.graph.node if node.domain} == {"FusedMatMul"}
        ops = Counter(node.op_type for node in model.graph.node)
        assert not {"If", "Loop", "Scan", "NonZero", "Shape", "TopK", "Conv", "ScatterElements", "Identity"} & set(ops)
        assert not any(a.type == onnx.AttributeProto.GRAPH for node in model.graph.node for a in node.attribute)
        if name == "condition":
            assert not {"Attention", "Transpose", "Split"} & set(ops)
            continue
        segments = programs[name].segments
        attends = [b for s in segments for b in s.blocks if _computes(s, "attn")]
        thinks = [b for s in segments for b in s.blocks if _computes(s, "mlp")]
        attention = [node.name for node in model.graph.node if node.op_type == "Attention"]
        assert [node.split("/")[0] for node in attention] == [f"blocks.{b}" for b in attends]
        assert ops["Gelu"] == len(thinks)
        assert ops["Transpose"] == 2  # patches in, patches out
        assert ops["Split"] == 2  # adaLN terms, halves of guidance
        assert ops["FusedMatMul"] == 4 * len(attends) + 2 * len(thinks) + 2
        assert ops["Where"] == ops["IsNaN"] == 1  # the watch for NaN
        partials = [s for s in segments if s.mode == "partial"]  # one gather on entry, one scatter on exit, keys and values in place
        placed = [b for s in partials for b in s.blocks if "attn" in s.branches]
        assert ops["ScatterND"] == len(partials) + 2 * len(placed)


def _computes(segment: Any, branch: str) -> bool:
    if segment.mode == "reuse":
        return branch not in segment.branches
    return segment.mode == "compute" or (segment.mode == "partial" and branch in segment.branches)


def test_only_the_batch_is_symbolic(artefact, plan):
    for name, model in graphs_of(artefact).items():
        free = {"steps", "given", "batch", "rows"}
        for value in [*model.graph.input, *model.graph.output]:
            dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            assert {d for d in dims if isinstance(d, str)} <= free, (name, value.name)
            assert all(d in free or d > 0 for d in dims)


def test_programs_take_and_give_what_their_plan_says(artefact, plan):
    graphs = graphs_of(artefact)
    for program in lower(plan, "cpu").programs:
        graph = graphs[program.name].graph
        inputs, outputs = [v.name for v in graph.input], [v.name for v in graph.output]
        reads = [f"{e.name}.{j}" for e, n in program.reads for j in range(n)]
        numbers = ["numbers"] if any(s.mode == "partial" for s in program.segments) else []
        assert inputs == ["x", "step", "first_bad", "first_step", "mods", "rows", "guidance", *numbers, *reads]
        assert outputs == ["x_next", "step_next", "first_bad_next", *(f"{e.name}.new" for e in program.writes)]
        assert read_manifest(artefact)["programs"][program.name]["inputs"] == inputs


def test_weights_are_stored_once(artefact, teacher):
    parameters = {name: p.numel() * 4 for name, p in teacher.state_dict().items()}
    size, total = (artefact / "weights.data").stat().st_size, sum(parameters.values())
    assert total <= size < total + 32 * 4 + 64 * 6 * len(parameters)
    placed: dict[str, set[tuple[str, ...]]] = {}
    for model in graphs_of(artefact).values():
        for tensor in model.graph.initializer:
            if tensor.external_data:
                place = {e.key: e.value for e in tensor.external_data}
                assert place["location"] == "weights.data"
                placed.setdefault(tensor.name, set()).add((place["offset"], place["length"]))
            else:
                assert int(np.prod(tensor.dims)) <= 8 * 256  # a timestep table is the largest
    assert all(len(places) == 1 for places in placed.values())
    thirds = [name for name in placed if any(f".attn.{letter}." in name for letter in "qkv")]  # views of qkv
    assert len(thirds) == 3 * 2 * len(teacher.blocks)
    views = {*thirds, "x_embedder.proj.matrix.weight"}
    assert set(parameters) == set(placed) - views | {name for name in parameters if ".qkv." in name or name == "x_embedder.proj.weight"}
    graphs_size = sum(path.stat().st_size for path in artefact.glob("*.onnx"))
    assert graphs_size < total


def test_the_teacher_can_be_rebuilt_bit_for_bit(artefact, teacher):
    rebuilt = rebuild_teacher(CachedSampler(artefact, preload=False))
    assert rebuilt.config == teacher.config
    original, state = teacher.state_dict(), rebuilt.state_dict()
    assert set(state) == set(original)
    assert all(torch.equal(state[name], original[name]) for name in original)
    assert model_signature(rebuilt).teacher == model_signature(teacher).teacher


def test_manifest(artefact, plan, teacher):
    manifest = read_manifest(artefact)
    assert set(manifest["files"]) == {p.name for p in artefact.iterdir()} - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"sha256": sha256_of(artefact / name), "bytes": (artefact / name).stat().st_size}
    assert manifest["plan_digest"] == plan.digest == CachePlan.load(artefact / "plan.json").digest
    assert manifest["teacher"] == model_signature(teacher).teacher
    assert manifest["macs_speedup"] == pytest.approx(macs_speedup(plan))
    assert manifest["cache_bytes_per_image"] == cache_bytes_per_image(plan)
    assert manifest["parity"]["images"] == 2
    checked = {row["where"].split(",")[0] for row in manifest["parity"]["programs"]}
    assert checked == {*manifest["programs"]}
    assert manifest["fidelity"]["mse"] > 0
    assert [b["program"] for b in manifest["schedule"]] == [b.program for b in lower(plan, "cpu").bindings]
    assert (artefact.stat().st_mode & 0o777) == 0o755


# What must not happen


def test_interrupted_export_leaves_the_old_artefact(tmp_path, monkeypatch, teacher, plan):
    out = tmp_path / "artefact"
    export(teacher, make_plan(teacher, (FULL, (skip(0, 4),))), out)
    before = snapshot(out)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for stage in ("_write_graphs", "prove", "measure", "write_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(export_module(), stage, interrupted)
            with pytest.raises(KeyboardInterrupt):
                export(teacher, plan, out)
        assert snapshot(out) == before
        assert [p.name for p in tmp_path.iterdir()] == ["artefact"]
    assert CachedSampler(out).sample([1]).latents.shape == (1, 4, 8, 8)


def export_module() -> Any:
    return sys.modules["export.compiler.compile"]


def test_interrupted_exchange_leaves_the_old_artefact(tmp_path, monkeypatch, teacher):
    """The old folder is moved away before the new one takes its place; a failure in between must bring it back."""
    out, plan = tmp_path / "artefact", make_plan(teacher, (FULL, (skip(0, 4),)))
    export(teacher, plan, out)
    before, rename = snapshot(out), Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial") and ".old." not in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(KeyboardInterrupt):
        export(teacher, plan, out)
    assert snapshot(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


def test_what_a_killed_export_left_is_cleared(tmp_path, teacher):
    """Of a process that is gone; the folders of one that runs, and of exports to other places, stay."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    stale = tmp_path / f".artefact.{gone.pid}-abc123.partial"
    stale.mkdir()
    running = tmp_path / f".artefact.{os.getppid()}-abc123.partial"
    running.mkdir()
    (stale / "weights.data").write_bytes(b"x")
    other = tmp_path / f".another.{gone.pid}-abc123.partial"
    other.mkdir()
    export(teacher, make_plan(teacher, (FULL,)), tmp_path / "artefact")
    assert not stale.exists()
    assert running.exists()
    assert other.exists()


def test_a_folder_that_is_no_artefact_is_never_replaced(tmp_path, teacher):
    plan = make_plan(teacher, (FULL,))
    precious = tmp_path / "runs"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(TokenCacheError, match=r"runs.*not an artefact"):
        export(teacher, plan, precious)
    assert (precious / "thesis.txt").read_text(encoding="utf-8") == "years of work"
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    with pytest.raises(TokenCacheError, match=r"file.*not an artefact"):
        export(teacher, plan, tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"
    empty = tmp_path / "empty"
    empty.mkdir()
    export(teacher, plan, empty)
    assert (empty / "manifest.json").is_file()


def planted_scale_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of shift and scale exchanged in the final layer."""
    from export.compiler import emit

    original = emit.unpack

    def unpack(*args: Any) -> Any:
        terms = original(*args)
        return terms._replace(final=terms.final._replace(shift=terms.final.scale, scale=terms.final.shift))

    monkeypatch.setattr(emit, "unpack", unpack)


def test_planted_bug_is_found(tmp_path, monkeypatch, teacher, plan):
    planted_scale_bug(monkeypatch)
    with pytest.raises(ParityError, match=r"disagrees with the torch reference.*\n *step_00, step 0 +x_next ") as caught:
        export(teacher, plan, tmp_path / "artefact")
    assert "trajectory" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_planted_bug_in_one_program_is_found(tmp_path, monkeypatch, teacher):
    """Forecast weights of the wrong step: full compute is right, and so is each graph's arithmetic."""
    from export.compiler import emit

    original = emit.forecast_table
    monkeypatch.setattr(emit, "forecast_table", lambda *args: np.roll(original(*args), 1, axis=0))
    plan = make_plan(teacher, (FULL, FULL, (skip(0, 4, 1),), (skip(0, 4, 1),)))
    with pytest.raises(ParityError) as caught:
        export(teacher, plan, tmp_path / "artefact")
    assert "step_01, step 2" in str(caught.value)
    assert "step_full" not in str(caught.value)


def test_command_exits_with_3(tmp_path, monkeypatch, capsys, teacher, plan):
    from export import to_onnx
    from tc_lightning.models.checkpoints import TeacherSpec, save_teacher
    from tc_lightning.runs.folder import write_run

    planted_scale_bug(monkeypatch)
    save_teacher(teacher, tmp_path / "teacher.safetensors")
    plan.save(tmp_path / "plan.json")
    write_run(tmp_path, "tiny", TeacherSpec(str(tmp_path / "teacher.safetensors")), plan.model.teacher)
    monkeypatch.setattr(sys, "argv", ["to_onnx", "--run", str(tmp_path), "--out", str(tmp_path / "out" / "tiny"), "--images", "1"])
    with pytest.raises(SystemExit) as caught:
        run(to_onnx.main)
    assert caught.value.code == 3
    assert "error: the artefact disagrees" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_parity_of_nan_is_refused():
    assert relative_l2(np.array([np.nan]), np.array([1.0])) == float("inf")
    for value in (float("nan"), float("inf"), 2e-4):
        with pytest.raises(ParityError):
            require_parity([Check("step_00", "x_next", value)], "fp32", "try again")
    require_parity([Check("step_00", "x_next", 9e-5)], "fp32", "try again")


def test_plan_of_another_model_is_refused(tmp_path, teacher, plan):
    for other, field in ((make_teacher(7), "teacher"), (make_teacher(depth=5), "depth"), (make_teacher(input_size=12), "tokens")):
        with pytest.raises(PlanError, match=f"differ in .*{field}"):
            export(other, plan, tmp_path / "artefact")
    assert list(tmp_path.iterdir()) == []


def test_stochastic_sampler_is_refused(tmp_path, teacher, plan):
    for change in ("sampler", "reference"):
        noisy = dataclasses.replace(plan, **{change: make_sampler("ddpm", 8)})
        with pytest.raises(TokenCacheError, match=r"ddpm adds noise .* cannot be exported: plan with ddim"):
            export(teacher, noisy, tmp_path / "artefact")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "precision"), [(float("nan"), "fp32"), (1e6, "fp16")])
def test_weights_that_do_not_fit_are_named(tmp_path, value, precision):
    model = make_teacher()
    model.blocks[2].mlp.fc1.bias[3] = value
    with pytest.raises(TokenCacheError, match=rf"weight blocks\.2\.mlp\.fc1\.bias is not finite in {precision}"):
        export(model, make_plan(model, (FULL,)), tmp_path / "artefact", precision)
    assert list(tmp_path.iterdir()) == []


def test_replacing_an_artefact(tmp_path, teacher, plan):
    out = tmp_path / "artefact"
    export(teacher, plan, out)
    assert len(list(out.glob("step_*.onnx"))) > 2
    export(teacher, make_plan(teacher, (FULL,)), out)
    assert sorted(p.name for p in out.glob("*.onnx")) == ["condition.onnx", "step_full.onnx"]
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["steps"] == 1


def optimised(graph: Path, tmp_path: Path) -> Counter[str]:
    """Operators of a graph after ONNX Runtime's own optimisation."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node)


def test_what_onnxruntime_makes_of_the_graphs_is_lean(artefact, plan, tmp_path):
    """Operators after ONNX Runtime's own optimisation: a fusion that is lost, or a copy that creeps in, shows here.

    A block: two norms, each with two nodes of adaLN; six products, five biases (that of fc1 is in FastGelu); attention; two gates and
    two sums.
    """
    for program in lower(plan, "cpu").programs:
        ops = optimised(artefact / f"{program.graph}.onnx", tmp_path)
        blocks = sum(len(s.blocks) for s in program.segments if s.mode == "compute")
        assert ops["Transpose"] == 2
        assert not {"Cast", "Identity", "Gelu", "MatMul", "Expand", "Shape", "Conv"} & set(ops)
        if program.name == "step_full":
            fixed = {"LayerNormalization": 1, "FusedMatMul": 2, "Attention": 0, "FastGelu": 0}
            each = {"LayerNormalization": 2, "FusedMatMul": 6, "Attention": 1, "FastGelu": 1}
            assert {op: ops[op] for op in each} == {op: fixed[op] + blocks * count for op, count in each.items()}
            assert ops["Add"] == 9 * blocks + 8  # bias and positions, norm and bias of the readout, guidance, sampler, the next step
            assert ops["Mul"] == 4 * blocks + 7  # one is the watch for NaN


def test_what_onnxruntime_makes_of_a_shared_graph_is_lean(tmp_path):
    """One gather and one scatter of tokens, and in each block one scatter of keys and one of values: nothing else is moved."""
    model = make_teacher(4)
    export(model, make_plan(model, (FULL, QUARTERS[0], QUARTERS[2])), tmp_path / "artefact")
    full, shared = (optimised(tmp_path / "artefact" / f"{name}.onnx", tmp_path) for name in ("step_full", "step_01"))
    for op in ("LayerNormalization", "FusedMatMul", "Attention", "FastGelu", "Transpose"):
        assert shared[op] == full[op], op
    assert (shared["ScatterND"], shared["Slice"] - full["Slice"]) == (2 * 4 + 1, 1)
    assert not {"Cast", "Identity", "MatMul", "Expand", "Shape", "Conv"} & set(shared)
