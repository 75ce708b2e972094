"""A manifest that was changed and signed again: what the runtime goes by has to follow from the plan and the graphs beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
from artefacts import rewrite_manifest
from conftest import FULL, make_plan, make_teacher

from export.compiler.compile import export_artefact
from export.runtime.contract import read_artefact
from export.runtime.manifest import ArtefactError, read_manifest, sha256_of
from export.runtime.onnx_header import read_header
from export.runtime.sampler import CachedSampler
from export.verify import rebuild_teacher
from tc_lightning.plan.segments import partial, skip

ALIKE = (FULL, FULL, (partial(0, 4, (1, 5)),), (partial(0, 2, (1, 5)), partial(2, 4, (2, 3))), (skip(0, 4, 1),), (skip(0, 4),))


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """Programs whose graphs differ inside, and take and give much the same."""
    out, teacher = tmp_path_factory.mktemp("artefacts") / "alike", make_teacher()
    export_artefact(teacher, make_plan(teacher, ALIKE), out, "fp32", "cpu", images=1, report=lambda _: None)
    return out


@pytest.fixture
def copied(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "copy"))


def refuses(folder: Path, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any session: there is none to be had."""
    monkeypatch.setattr(ort, "InferenceSession", None)
    with pytest.raises(ArtefactError, match=message) as caught:
        CachedSampler(folder)
    assert "Export it again" in str(caught.value)


def swap_steps(manifest: dict[str, Any]) -> None:
    schedule = manifest["schedule"]
    schedule[4], schedule[5] = schedule[5], schedule[4]


def swap_slots(manifest: dict[str, Any]) -> None:
    reads = next(bound["reads"] for bound in manifest["schedule"] if any(len(set(slots)) > 1 for slots in bound["reads"].values()))
    name = next(name for name, slots in reads.items() if len(set(slots)) > 1)
    reads[name].reverse()


def swap_weights(manifest: dict[str, Any]) -> None:
    weights = manifest["weights"]
    weights["blocks.0.mlp.fc1.weight"], weights["blocks.1.mlp.fc1.weight"] = (
        weights["blocks.1.mlp.fc1.weight"],
        weights["blocks.0.mlp.fc1.weight"],
    )


def swap_graphs(manifest: dict[str, Any]) -> None:
    programs = manifest["programs"]
    programs["step_00"], programs["step_01"] = programs["step_01"], programs["step_00"]


NETWORK = {"family": "dit", "config": {"depth": 4}}


def put(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value."""

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in path[:-1]:
            place = place[key]
        assert json.dumps(place[path[-1]]) != json.dumps(to)
        place[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_steps, "schedule is not what follows from the plan"),
        (swap_slots, "schedule is not what follows from the plan"),
        (swap_graphs, "programs is not what follows from the plan"),
        (swap_weights, r"weight blocks\.\d\.mlp\.fc1\.weight is not what the graph step_\w+ takes it for"),
        (put("guidance", "scale", to=3.0), "guidance is not what follows"),
        (put("guidance", "channels", to=True), "guidance is not what follows"),
        (put("steps", to=6.0), "steps is not what follows"),
        (put("full_steps", to=4), "full_steps is not what follows"),
        (put("full_offset", to=1), "full_offset is not what follows"),
        (put("model", "conditions", 0, "classes", to=6), "model is not what follows"),
        (put("precision", to="fp16"), "not what follows|weight .* must be"),
        (put("precision", to=["fp32"]), "precision is .* not one of fp32, fp16, bf16"),
        (put("condition", "weights", to=[]), "condition is not what follows"),
        (put("condition_values", to=0), "condition_values is 0; a positive integer was expected"),
        (put("condition_values", to=1.5), "condition_values is 1.5"),
        (put("modulations", to=25), "modulations is not what follows from the plan and the graphs"),
        (put("modulations", to=26.0), "modulations is not what follows"),
        (put("constants", to={"constant.start.text": [1]}), "constants is not what follows"),
        (put("network", "family", to="sit"), "network is of the family 'sit', and the plan was made for 'dit'"),
        (put("network", "config", "depth", to=[5]), r"network.config.depth is \[5\]; a plain value was expected"),
        (put("network", "config", "mlp_norm_eps", to=float("nan")), "network.config.mlp_norm_eps is nan"),
        (put("network", to=None), "network must be an object"),
        (put("network", "config", to=[]), "network.config must be an object"),
        (put("network", to=NETWORK | {"schedule": []}), "network.schedule must be an object"),
        (put("network", to=NETWORK | {"schedule": {"kind": None}}), "network.schedule.kind is None; a plain value was expected"),
        (put("network", to=NETWORK | {"more": {}}), "network must be an object with family and config"),
        (put("weights", "pos_embed", 2, to=-64), "weight pos_embed has a shape, an offset or a size that is no such thing"),
        (put("weights", "blocks.0.attn.qkv.weight", 2, to=10**9), "beyond the end of weights.data"),
        (put("weights", "blocks.0.attn.qkv.weight", 1, to=[10**9, 10**9]), "not those of its shape"),
        (put("weights", "blocks.0.attn.qkv.weight", to=[]), "must be .fp32, shape, offset, bytes."),
        (put("weights", to=[]), "weights must be an object"),
        (put("parity", to=[]), "parity must be an object"),
        (put("files", "plan.json", "bytes", to=True), r"does not list the size and sha256 of plan\.json"),
        (put("programs", "step_00", to="step_00"), "every program must name its graph"),
        (put("programs", "step_00", "graph", to=None), "every program must name its graph"),
    ],
)
def test_changes_that_are_refused(copied, change, message, monkeypatch):
    manifest = read_manifest(copied, check_files=False)
    change(manifest)
    rewrite_manifest(copied, **manifest)
    refuses(copied, rf"manifest\.json is damaged: .*({message})", monkeypatch)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a\0b"])
def test_only_files_of_the_folder_are_listed(copied, name, monkeypatch):
    files = read_manifest(copied, check_files=False)["files"]
    rewrite_manifest(copied, files=files | {name: {"bytes": 1, "sha256": "0" * 64}})
    refuses(copied, "which is no plain name", monkeypatch)


def replace(folder: Path, name: str, content: bytes) -> None:
    """Another file under a name, vouched for."""
    (folder / name).write_bytes(content)
    files = read_manifest(folder, check_files=False)["files"]
    rewrite_manifest(folder, files=files | {name: {"bytes": len(content), "sha256": sha256_of(folder / name)}})


def test_a_graph_in_place_of_another_is_refused(copied, monkeypatch):
    first, second = sorted(path.name for path in copied.glob("step_0?.onnx"))[-2:]
    replace(copied, first, (copied / second).read_bytes())
    refuses(copied, "programs is not what follows from the plan and the graphs", monkeypatch)


def test_what_is_no_graph_is_refused(copied, monkeypatch):
    replace(copied, "condition.onnx", (copied / "condition.onnx").read_bytes()[:-1])
    refuses(copied, "a graph of the artefact .* cannot be read: it is not an ONNX file, or it is cut short", monkeypatch)


def test_a_plan_in_place_of_another_is_refused(copied, monkeypatch):
    replace(copied, "plan.json", json.dumps(make_plan(make_teacher(), ALIKE[:3]).to_json()).encode())
    refuses(copied, "plan_digest is not what follows", monkeypatch)


def test_a_plan_that_is_invalid_is_refused(copied, monkeypatch):
    replace(copied, "plan.json", b"{}")
    refuses(copied, r"the artefact .* cannot be used: .*plan\.json: plan: missing", monkeypatch)


def test_a_teacher_that_lacks_a_weight_is_not_rebuilt(copied):
    """Which no graph reads: queries, keys and values are read apart."""
    for change in ({}, {"blocks.0.attn.qkv.weight": ["fp32", [32, 96], 0, 4 * 32 * 96]}):
        weights = {
            name: entry for name, entry in read_manifest(copied, check_files=False)["weights"].items() if ".attn.qkv.w" not in name
        }
        rewrite_manifest(copied, weights=weights | change)
        with pytest.raises(ArtefactError, match=r"lists no weight blocks\.0\.attn\.qkv\.weight of the shape that its model has"):
            rebuild_teacher(CachedSampler(copied, preload=False))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("depth", 5, r"differ in depth \(plan 4, model 5\)"),
        ("patch_size", 4, "differ in tokens"),
        ("patch_size", 0, "patch_size is 0; it must be at least 1"),
        ("learn_sigma", False, "differ in out_channels"),
        ("output", "pixels", "differ in output"),
        ("bogus", 1, "the shape of a dit cannot be"),
    ],
)
def test_a_network_is_rebuilt_as_its_plan_knows_it_or_not_at_all(copied, name, value, message):
    network = read_manifest(copied, check_files=False)["network"]
    rewrite_manifest(copied, network=network | {"config": network["config"] | {name: value}})
    with pytest.raises(ArtefactError, match=message):
        rebuild_teacher(CachedSampler(copied, preload=False))


def test_headers_are_read_as_onnx_reads_them(intact):
    for path in intact.glob("*.onnx"):
        graph, header = onnx.load(path, load_external_data=False).graph, read_header(path)
        assert header.inputs == [value.name for value in graph.input]
        assert header.outputs == [value.name for value in graph.output]
        for value in (*graph.input, *graph.output):
            assert header.sizes[value.name] == tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        external = [tensor for tensor in graph.initializer if tensor.external_data]
        assert list(header.weights) == [tensor.name for tensor in external]
        for tensor in external:
            place = {pair.key: pair.value for pair in tensor.external_data}
            found = (tensor.data_type, tuple(tensor.dims), place["location"], int(place["offset"]), int(place["length"]))
            assert header.weights[tensor.name] == found


def test_headers_that_are_cut_short(intact, tmp_path):
    content = (intact / "condition.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    for size in [*range(64), *range(64, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="it is not an ONNX file, or it is cut short"):
            read_header(path)


def test_figures_may_be_anything(copied):
    """What was measured is for readers; the runtime does not go by it."""
    rewrite_manifest(copied, fidelity={"psnr_db": 1e9}, versions={})
    assert read_artefact(copied, ort.__version__)["fidelity"] == {"psnr_db": 1e9}
