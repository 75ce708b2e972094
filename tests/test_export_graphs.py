"""Graphs, weights and manifest as written, and what ONNX Runtime makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import FULL, make_plan, make_teacher
from exporting import QUARTERS, export, graphs_of

from export.runtime.manifest import read_manifest, sha256_of
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from export.verify import rebuild_teacher
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import cache_bytes_per_image, macs_speedup
from tc_lightning.rollout.sampling import model_signature

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
