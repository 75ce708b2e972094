"""A new family is one file: `toy.py` goes through caching, training's soft forms, measurements, plans, export and runtime."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Steps, make_plan
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from toy import REGISTERS, Toy, make_toy

from data.trajectory_module import TrajectoryDataModule
from export.compiler.compile import export_artefact
from export.compiler.parity import relative_l2
from export.runtime.admission import predicted_bytes
from export.runtime.distinct import distinct_rows
from export.runtime.manifest import read_manifest
from export.runtime.sampler import CachedSampler
from export.verify import verify
from tc_lightning.cache.soft_network import full_eps, mixed_branches_eps, mixed_eps
from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.learn import distiller
from tc_lightning.measure.calibrate import calibrate
from tc_lightning.measure.sensitivity import branch_sensitivity, probes_for
from tc_lightning.models.checkpoints import TeacherSpec, save_teacher
from tc_lightning.models.conditions import Given
from tc_lightning.models.dit import DiTConfig
from tc_lightning.models.families import FAMILIES, Family
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.conditions import Condition
from tc_lightning.plan.costs import block_macs, segment_macs
from tc_lightning.plan.dataflow import Entry, entries_read
from tc_lightning.plan.forecasts import Forecast
from tc_lightning.plan.given import TRAINING
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.nulls import with_nulls
from tc_lightning.plan.rows_file import read_rows
from tc_lightning.plan.segments import compute, partial, reuse, skip
from tc_lightning.planner.policy import PlannerPolicy
from tc_lightning.policies.routers import router_steps
from tc_lightning.rollout.sampling import Rollout, full_plan, given_for, labels_for, model_signature, noise_for, sample, sample_steps

TOKENS = 16 + REGISTERS
TOY, NAMES, GUIDANCE = make_toy(), ("look", "widen", "shade"), Guidance(1.5, 3)
SIGNATURE = model_signature(TOY)
GIVEN = Given({"kind": torch.tensor([0, 3]), "mood": torch.tensor([[[0.5, -1, 0], [2, 0, 1]], [[0.1, 0, 1], [-2, 1, 0]]])})
ARRAYS = {name: value.numpy() for name, value in GIVEN.items()}
FULL = (compute(0, 3),)
EVERY_MODE: Steps = (
    FULL,
    FULL,
    (reuse(0, 1, ("look",), 1), reuse(1, 2, ("widen", "shade")), skip(2, 3, 1)),
    (partial(0, 2, (0, 1, 2, 3, 7, 18), 1, NAMES), compute(2, 3)),
    (partial(0, 2, (0, 1, 2, 5, 9, 15), 1, NAMES), compute(2, 3)),
    (partial(0, 3, (0, 1, 2, 4), 0, ("widen", "shade")),),
    (partial(0, 3, tuple(range(TOKENS)), 0, NAMES),),
)


def torch_latents(plan: CachePlan) -> torch.Tensor:
    return sample(TOY, plan, noise_for(5, range(2), TOY), GIVEN)


def test_full_compute_is_the_network_bit_for_bit() -> None:
    plan = make_plan(SIGNATURE, (FULL,) * 3, Guidance())
    for state in sample_steps(TOY, plan, noise_for(5, range(2), TOY), GIVEN):
        t = torch.full((2,), plan.sampler.steps[state.step].t)
        assert torch.equal(state.eps, TOY(state.x, t, GIVEN))
    kept = make_plan(SIGNATURE, (FULL, *((partial(0, 3, tuple(range(TOKENS)), 0, NAMES),),) * 2), Guidance())
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
        make_plan(SIGNATURE, (FULL, (partial(0, 3, (0, 1, 2), 0, ("look", "shade")),)))
    with pytest.raises(PlanError, match=r"step 1, .*partial keeps tokens 0 to 2, which are none of the image"):
        make_plan(SIGNATURE, (FULL, (partial(0, 3, (0, 2, 5), 0, NAMES),)))
    with pytest.raises(PlanError, match=r"differ in family .*; branches"):
        plan.require_model(dataclasses.replace(SIGNATURE, family="dit", branches="attn:kv mlp"))
    reads = entries_read(partial(0, 1, (1,), 2, ("widen", "shade")), TOKENS, SIGNATURE.block)
    assert reads == {Entry("span", 0, 1): Forecast(2), Entry("look", 0, 1): Forecast(2)}
    look, widen = (block_macs(SIGNATURE, TOKENS, (name,)) for name in NAMES[:2])
    assert segment_macs(SIGNATURE, reuse(0, 2, ("shade", "look"))) == 2 * widen
    assert (look, widen) == (TOKENS * (3 * 16**2 + TOKENS * 2 * 16), TOKENS * 4 * 16**2)
    assert block_macs(SIGNATURE, TOKENS) == look + widen + TOKENS * 5 * 16


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
    eps, _ = full_eps(model, GUIDANCE, x, t, GIVEN)
    _, caches = full_eps(model, GUIDANCE, x_prev, t_prev, GIVEN)
    assert [set(cache) for cache in caches.branches] == [{*NAMES}] * 3
    ones, _ = mixed_branches_eps(model, GUIDANCE, caches.branches, x, t, GIVEN, torch.ones(2, 3, 3))
    assert torch.equal(ones, eps)
    soft = mixed_eps(model, GUIDANCE, caches.blocks, x, t, GIVEN, torch.ones(2, 3, TOKENS - REGISTERS))
    torch.testing.assert_close(soft, eps, rtol=1e-5, atol=1e-5)
    probes = probes_for(model, 0, [1, 2], 1)
    sensitivity = branch_sensitivity(model, GUIDANCE, caches.branches, x, t, GIVEN, probes)
    assert sensitivity.shape == (2, 3, 3)
    assert (sensitivity > 0).all()
    table = make_plan(SIGNATURE, (FULL,) * 3, GUIDANCE).sampler
    measured = calibrate(model, full_plan(SIGNATURE, table, GUIDANCE), x, GIVEN, 2, progress=False)
    assert measured.drift_TGL2.shape == (3, 2, 3, 3)
    reused = torch.eye(3, dtype=torch.bool)[None].numpy()
    assert router_steps(reused, NAMES) == (tuple(reuse(b, b + 1, NAMES[b : b + 1]) for b in range(3)),)


def with_examples() -> Toy:
    """A toy that has moods for images that nobody gave any."""
    toy = make_toy()
    toy.examples = {"mood": np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)}
    return toy


@pytest.mark.parametrize("modes", ["", "bb1bb1b"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_exporter_runs_it(tmp_path: Path, modes: str, precision: str) -> None:
    plan = make_plan(SIGNATURE, EVERY_MODE, GUIDANCE, "dpmpp_2m", modes=modes)
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    manifest = export_artefact(with_examples(), plan, tmp_path / "toy", precision, "cpu", 2, lambda _: None)
    assert manifest["parity"]["trajectory_rel_l2"] < tolerance
    assert read_manifest(tmp_path / "toy")["modulations"] == 3 * 2 + 1
    sampler = CachedSampler(tmp_path / "toy")
    latents, expected = sampler.sample(seed=5, **ARRAYS).latents, torch_latents(plan).numpy()
    assert max(relative_l2(a, e) for a, e in zip(latents, expected, strict=True)) < tolerance
    full = torch_latents(full_plan(plan.model, plan.sampler, plan.guidance)).numpy()
    assert relative_l2(expected, full) > 1e-3  # caching is not so harmless here that parity in fp32 would not notice it
    graph = onnx.load(str(tmp_path / "toy" / "step_full.onnx"), load_external_data=False).graph
    assert [node.name.split("/")[0] for node in graph.node if node.op_type == "Attention"] == [f"blocks.{b // 2}" for b in range(6)]
    assert {"RMSNormalization", "Tanh", "Attention"} <= {node.op_type for node in graph.node}


def test_what_conditions_alone_say_is_computed_once(served: Path) -> None:
    manifest, width = read_manifest(served), SIGNATURE.width
    told = {f"constant.{b}.{name}": [2, width] for b in range(3) for name in ("k", "v")}
    assert manifest["constants"] == {"constant.start.registers": [1, width], "constant.0.bias": [1, 1, 2]} | told
    listeners = ("opening", *(f"blocks.{b}.told" for b in range(3)))
    for path in served.glob("*.onnx"):
        graph = onnx.load(str(path), load_external_data=False).graph
        hears = {name.rpartition(".")[0] for name in (tensor.name for tensor in graph.initializer) if name.startswith(listeners)}
        assert bool(hears) == (path.stem == "condition")
        assert len({value.name for value in graph.input}) == len(graph.input)
    receipt = CachedSampler(served).sample(seed=5, **ARRAYS).receipt
    assert receipt["constant_bytes"] == 4 * 3 * (width + 2 + 3 * 4 * width)  # of three rows: two images, and the null one
    assert predicted_bytes(manifest, 2) - predicted_bytes(manifest | {"constants": {}}, 2) == receipt["constant_bytes"]


def test_constants_of_a_half_are_those_of_its_rows() -> None:
    run = Rollout(TOY, make_plan(SIGNATURE, (FULL,) * 2, GUIDANCE), GIVEN)
    for found, expected in zip(run.constants.part(slice(2)).tensors, TOY.constants(**GIVEN).tensors, strict=True):
        torch.testing.assert_close(found, expected)
    assert TOY.terms(torch.ones(2), GIVEN).blocks[0]._fields == ("widen", "shade", "k", "v", "bias")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefacts") / "toy"
    export_artefact(with_examples(), make_plan(SIGNATURE, EVERY_MODE, GUIDANCE), out, "fp32", "cpu", 1, lambda _: None)
    return out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kind": [0, 3]}, "condition mood is missing: the model takes kind .classes 0 to 3., mood .fp32 of shape .2, 3.."),
        (ARRAYS | {"taste": [1, 2]}, "no condition taste"),
        ({"labels": [0]}, "labels are for models whose one condition is a class"),
        (ARRAYS | {"kind": [0]}, "mood has 2 rows for 1 images"),
        (ARRAYS | {"kind": [0, 4]}, "kind 4 is out of range: the model has classes 0 to 3"),
        (ARRAYS | {"kind": [0.5, 1]}, "kind has the type float64"),
        (ARRAYS | {"kind": [True, False]}, "kind has the type bool"),
        (ARRAYS | {"mood": np.zeros((2, 3))}, r"mood has the shape \[2, 3\]"),
        (ARRAYS | {"mood": [[1.0], [2.0, 3.0]]}, "mood cannot be read as numbers"),
        (ARRAYS | {"mood": ARRAYS["mood"] * np.nan}, "mood holds NaN or infinite values, first in row 0"),
        (ARRAYS | {"mood": ARRAYS["mood"].astype(np.float64) * 1e300}, "mood holds NaN or infinite"),
        ({"kind": [], "mood": np.zeros((0, 2, 3))}, "no images were asked for"),
    ],
)
def test_requests_that_are_refused(served: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenCacheError, match=message):
        CachedSampler(served, preload=False).sample(**asked)


def test_each_image_of_a_request_is_the_one_that_it_would_be_alone(served: Path) -> None:
    sampler, rows = CachedSampler(served), [1, 0, 1]
    together = sampler.sample(conditions={name: value[rows] for name, value in ARRAYS.items()}, seed=5)
    assert together.receipt["conditions"] == {"kind": [3, 0, 3], "mood": [3, 2, 3]}
    assert np.array_equal(together.images, np.clip(together.latents, -1, 1))
    for place, row in enumerate(rows):
        alone = sampler.sample(conditions={name: value[[row]] for name, value in ARRAYS.items()}, seed=5, first_index=place).latents
        np.testing.assert_allclose(alone[0], together.latents[place], atol=1e-5)


def test_rows_of_conditions_are_computed_once() -> None:
    given = {name: value[[1, 0, 1]] for name, value in ARRAYS.items()}
    rows, distinct = distinct_rows(TOY.conditions, True, given)
    assert rows[0] == rows[2] != rows[1]
    assert len({*rows.tolist()}) == len(distinct["kind"]) == 3
    assert [distinct["kind"][row] for row in rows] == [3, 0, 3, 4, 4, 4]
    for name, value in with_nulls(TOY.conditions, given).items():
        assert np.array_equal(distinct[name][rows], value)


def test_rows_of_texts_are_compared_without_taking_much_memory() -> None:
    """By way of numpy.unique each byte of them would be a field of a type, hundreds of bytes each, and a request take half a minute."""
    conditions = (Condition("text", "fp32", (16, 512), "stored"), Condition("text_mask", "int64", (16,), "stored"))
    text = np.random.default_rng(0).normal(size=(3, 16, 512)).astype(np.float32)[[0, 1, 0, 2]]
    given = {"text": text, "text_mask": np.ones((4, 16), np.int64)}
    tracemalloc.start()
    places, rows = distinct_rows(conditions, True, given, {name: value[3:] for name, value in given.items()})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows["text"]) == 3
    assert np.array_equal(rows["text"][places], np.concatenate([text, text[[3] * 4]]))
    assert peak < 8 * text.nbytes


def test_conditions_that_cannot_be_drawn_are_asked_for() -> None:
    with pytest.raises(TokenCacheError, match=r"mood cannot be drawn.*\.npz"):
        given_for(0, range(2), TOY)
    toy = with_examples()
    assert toy.examples is not None
    given = given_for(7, range(4, 7), toy)
    assert np.array_equal(given["mood"].numpy(), toy.examples["mood"][[4, 0, 1]])
    assert given["kind"].tolist() == labels_for(7, range(4, 7), 4).tolist()


def test_examples_are_read_from_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "moods.npz", mood=np.ones((2, 2, 3)))
    assert read_rows(tmp_path / "moods.npz", TOY.conditions).examples["mood"].dtype == np.float32
    np.savez(tmp_path / "others.npz", mood=np.ones((2, 3, 2)))
    with pytest.raises(TokenCacheError, match=r"others\.npz: mood has the shape"):
        read_rows(tmp_path / "others.npz", TOY.conditions)
    (tmp_path / "torn.npz").write_bytes(b"PK")
    for name in ("torn.npz", "none.npz"):
        with pytest.raises(TokenCacheError, match="cannot read the conditions"):
            read_rows(tmp_path / name, TOY.conditions)


def test_it_is_distilled_planned_exported_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with the real trainer: a recorded set, predictor, sensitivities, planner, artefact, torch rebuilt from it."""
    toy = with_examples()
    monkeypatch.setitem(FAMILIES, "toy", Family(Toy, DiTConfig))
    save_teacher(toy, tmp_path / "toy.safetensors")
    np.savez(tmp_path / "moods.npz", **toy.examples)
    teacher = TeacherSpec(str(tmp_path / "toy.safetensors"), conditions=str(tmp_path / "moods.npz"))
    policy = PlannerPolicy(1.5, "reference", (), 3, 1, "keep", 2, 2, 2, 2, 0, 0, progress=False)
    module = distiller.TokenCacheDistiller(
        teacher, num_steps=6, guidance_channels=3, policy=policy, sensitivity_samples=2, sensitivity_probes=1
    )
    data = TrajectoryDataModule(str(tmp_path / "set"), num_train=4, num_val=2, batch_size=4)
    logger = CSVLogger(str(tmp_path), name="", version="run")
    switches = {"logger": logger, "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    Trainer(accelerator="cpu", devices=1, max_steps=2, **switches).fit(module, data)
    sample, kept = data.trajectories, given_for(0, range(16), toy, use=TRAINING)
    assert torch.equal(sample.endpoints(range(3)).given["mood"], kept["mood"][:3])
    assert data.pairs[7]["kind"] == kept["kind"][1]
    plan = CachePlan.load(tmp_path / "run" / "plan.json")
    assert plan.model == model_signature(toy)
    assert plan.caches
    export_artefact(toy, plan, tmp_path / "toy", "fp32", "cpu", 2, lambda _: None)
    report = verify(tmp_path / "toy", "cpu", 2, 2, 3, quiet=True, examples=tmp_path / "moods.npz")
    assert report["rel_l2_export"] < 1e-4
