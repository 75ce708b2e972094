"""Files that were damaged or edited: a reader says so in the package's own words, or reads something that is valid. Never a traceback.

A few hundred examples each; FUZZ_EXAMPLES=10000 draws that many.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from conftest import SIGNATURE, VP, make_plan, make_teacher, random_modes, random_steps
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged, quickly
from safetensors.torch import save

from export.compiler.compile import export_artefact
from export.runtime.contract import planned, read_artefact
from export.runtime.layout import lay_out
from export.runtime.manifest import ArtefactError, _self_digest
from export.runtime.programs import lower
from tc_lightning.errors import PlanError, RunError, TokenCacheError
from tc_lightning.measure.calibration import Calibration
from tc_lightning.measure.scores import Scores
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, save_teacher
from tc_lightning.models.content_predictor import ContentPredictor, Selector
from tc_lightning.models.dit import DiT, DiTConfig
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.segments import compute, content, partial, reuse, skip
from tc_lightning.rollout.targets import TargetKey, cached_targets
from tc_lightning.runs.folder import read_run, write_run

TINY = DiTConfig(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=1, num_classes=2)
# What a manifest may say without the runtime going by it.
FREE = {"condition_values", "versions", "parity", "fidelity", "needs", "weights", "files", "network"}


def outcome(read: Callable[[], Any], *expected: type[TokenCacheError]) -> tuple[Any, str]:
    """What a reader returns, or None and what it says."""
    try:
        return read(), ""
    except expected as error:
        return None, str(error)


def plans() -> list[Any]:
    """Plans of every mode, as JSON: guided and not, with halves left out, factors of eps, a reference and content tokens, and branches
    of another family."""
    guided = [make_plan(SIGNATURE, random_steps(seed), modes=random_modes(seed, 7), eps_scale=(0.99,) * 7) for seed in range(3)]
    chosen = make_plan(SIGNATURE, random_steps(3)).to_json()
    chosen["steps"][-1]["segments"] = [content(0, 4, 5, 1).to_json()]
    names = ("look", "widen", "shade")
    steps = ((compute(0, 4),), (reuse(0, 2, names[:1], 1), skip(2, 4)), (partial(0, 4, (1, 5), 0, names),))
    other = make_plan(
        dataclasses.replace(SIGNATURE, branches="look:kv widen shade", macs=(*SIGNATURE.macs, SIGNATURE.macs[1])), steps
    ).to_json()
    return [plan.to_json() for plan in guided] + [chosen | {"selector": "a" * 64}, make_plan(SIGNATURE).to_json(), other]


@quickly
@given(st.sampled_from(plans()).flatmap(damaged))
def test_plans(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "damaged-plan.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    plan, told = outcome(lambda: CachePlan.load(path), PlanError)
    if plan is None:
        assert str(path) in told
        return
    assert CachePlan.from_json(json.loads(json.dumps(plan.to_json()))).digest == plan.digest
    assert plan.summary
    assert planned(plan, lower(plan, "cpu"), "fp32")["macs_speedup"] > 0


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """An artefact whose programs share graphs, without guidance."""
    out = tmp_path_factory.mktemp("artefacts") / "shared"
    model = make_teacher(depth=2)
    plan = make_plan(model, random_steps(5, 5, depth=2), modes="")
    export_artefact(model, plan, out, "fp16", "cpu", images=1, report=lambda _: None)
    return out


@quickly
@given(data=st.data())
def test_manifests(artefact, shared, tmp_path_factory, data):
    """With a sha256 of its own that was made again, as a tool would that changes a figure."""
    folder = tmp_path_factory.getbasetemp() / "damaged-artefact"
    source = data.draw(st.sampled_from((artefact, shared)))
    intact = json.loads((source / "manifest.json").read_text(encoding="utf-8"))
    if not (folder / source.name).exists():
        shutil.copytree(source, folder / source.name)
    raw = data.draw(damaged(intact))
    if isinstance(raw, dict):
        raw.pop("sha256", None)
        raw["sha256"] = _self_digest(raw)
    (folder / source.name / "manifest.json").write_text(json.dumps(raw), encoding="utf-8")
    manifest, told = outcome(lambda: read_artefact(folder / source.name, ort.__version__), ArtefactError)
    if manifest is None:
        assert str(folder) in told
        return
    assert {key: manifest[key] for key in intact if key not in FREE | {"sha256"}} == {
        key: value for key, value in intact.items() if key not in FREE | {"sha256"}
    }
    read = {name for program in (*manifest["programs"].values(), manifest["condition"]) for name in program["weights"]}
    assert all(manifest["weights"][name] == intact["weights"][name] for name in read)
    assert lay_out(manifest, 2, 3)


def runs(folder: Path) -> list[Any]:
    """Run listings, as JSON."""
    listings = []
    for dit, predictor in ((None, False), (TINY, True)):
        write_run(folder, "tiny", TeacherSpec("teacher.pt", None if dit else "DiT-S/8", dit, dit and 4), "0" * 64, predictor)
        listings.append(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    return listings


@quickly
@given(data=st.data())
def test_run_listings(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged-run"
    folder.mkdir(exist_ok=True)
    raw = data.draw(st.sampled_from(runs(folder)).flatmap(damaged))
    (folder / "run.json").write_text(json.dumps(raw), encoding="utf-8")
    run, told = outcome(lambda: read_run(folder), RunError)
    if run is None:
        assert str(folder / "run.json") in told
        return
    assert all(not path.exists() for path in (run.plan, run.scores, run.content or run.plan))
    assert run.name not in ("", ".", "..")
    assert all(isinstance(text, str) for text in (run.teacher_digest, run.teacher.weights, run.teacher.preset or ""))
    assert isinstance(run.teacher.input_size or 1, int)
    assert all(path.parent == folder for path in (folder / run.name, run.plan, run.scores))
    with pytest.raises(TokenCacheError):  # there is none, or "..", which is no model
        load_teacher(run.teacher)


# Safetensors


def with_header(raw: bytes, header: Any) -> bytes:
    """The file with another header before its data."""
    size = int.from_bytes(raw[:8], "little")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def header_of(raw: bytes) -> Any:
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


@pytest.fixture(scope="module")
def tensor_files(tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    """Each kind of file that is read, and its reader."""
    folder, model = tmp_path_factory.mktemp("tensors"), DiT(TINY).requires_grad_(False)
    Scores(np.ones((2, 1, 4)), np.zeros((2, 1, 2)), "t", "s", np.ones((2, 1, 2)), "x").save(folder / "scores.safetensors")
    Calibration(np.ones((2, 1, 1, 2)), np.ones((2, 1, 1, 3)), np.ones(2), "t", "s").save(folder / "calibration.safetensors")
    Selector.of(ContentPredictor(TINY)).save(folder / "content.safetensors")
    save_teacher(model, folder / "teacher.safetensors")
    (folder / "bare.safetensors").write_bytes(save(model.state_dict()))
    plan = make_plan(model, (random_steps(0, 2, 1, 4)[0],) * 2)
    key = TargetKey(plan.model, VP, plan.reference, plan.guidance, 0, 2, ode_steps=2)
    cached_targets(model, key, folder / "targets")
    readers = {
        "scores": Scores.load,
        "calibration": Calibration.load,
        "content": lambda path: Selector.load(path, TINY),
        "teacher": lambda path: load_teacher(TeacherSpec(str(path))),
        "bare": lambda path: load_teacher(TeacherSpec(str(path), dit=TINY)),
    }
    found = {name: (folder / f"{name}.safetensors", reader) for name, reader in readers.items()}
    target = next((folder / "targets").iterdir())
    return found | {"targets": (target, lambda path: cached_targets(model, key, path.parent))}


BITS = {"BOOL": 8, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F16": 16, "BF16": 16, "I32": 32, "F32": 32, "F64": 64, "I64": 64, "C64": 64}


@st.composite
def recast(draw: st.DrawFn, header: dict[str, Any]) -> dict[str, Any]:
    """The bytes of one tensor taken for numbers of another type or shape: whole by safetensors' own rules."""
    name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    start, stop = header[name]["data_offsets"]
    dtype = draw(st.sampled_from(sorted(BITS)))
    count, left = divmod(8 * (stop - start), BITS[dtype])
    shapes = ([count], [1, count], [count, 1, 1], [1, 1, 1, count], header[name]["shape"], [*header[name]["shape"][:-1], -1])
    changed = draw(st.sampled_from(shapes))
    if changed[-1] == -1:
        changed[-1] = count // max(math.prod(changed[:-1]), 1)
    return header | {name: header[name] | {"dtype": dtype, "shape": [count] if left else changed}}


@quickly
@given(data=st.data())
def test_safetensors_headers(tensor_files, data):
    path, read = tensor_files[data.draw(st.sampled_from(sorted(tensor_files)))]
    intact = path.read_bytes()
    header = data.draw(st.one_of(damaged(header_of(intact)), recast(header_of(intact))))
    path.write_bytes(with_header(intact, header))
    try:
        value, told = outcome(lambda: read(path), TokenCacheError)
    finally:
        path.write_bytes(intact)
    assert value is not None or str(path) in told
