from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FULL, make_plan, make_teacher
from test_commands import make_run
from test_content import content_plan, make_selector

from export.compiler import compile as compiler
from export.compiler import fidelity, weight_files
from export.compiler.weight_files import WeightFiles
from export.report import command, quality, verdict
from export.report.judge import Judge, find_judge
from export.report.measure import Exported, Failed, Made, Requests, export, make_in_turns
from export.report.page import page
from export.report.pictures import Pictures
from export.report.rows import Row, spread
from export.report.subjects import (
    FEWER,
    PLANNED,
    PUBLISHED,
    REFERENCE,
    Subject,
    distinct,
    fewer_steps,
    fitted,
    planned,
    published,
    rounded_down,
)
from export.runtime import manifest
from export.runtime.sampler import Result
from export.torch_device import torch_device
from tc_lightning.cli import main
from tc_lightning.errors import PlanError, RunError, TokenCacheError
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.conditions import Condition
from tc_lightning.plan.costs import full_step_macs, plan_macs
from tc_lightning.plan.segments import compute, partial, skip
from tc_lightning.policies.registry import standard_policies
from tc_lightning.rollout.sampling import full_plan, labels_for, model_signature, noise_for, reference_plan, sample
from tc_lightning.rollout.targets import TargetKey, cached_targets, compute_targets
from tc_lightning.runs.folder import read_run
from tc_lightning.runs.loaded import load_run, planning_context

STEPS = tuple(FULL if i in (0, 1, 2, 4, 7) else (skip(0, 4, 1),) for i in range(10))
RNG = np.random.default_rng(0)


def finished_run(folder: Path) -> Path:
    """A run folder with scores, of ten steps of which five are full."""
    run = make_run(folder, STEPS)
    plan = CachePlan.load(run / "plan.json")
    importance, sensitivity = RNG.random((10, 4, 16)), RNG.random((10, 4, 2))
    importance[0], sensitivity[0] = 1.0, 0.0
    Scores(importance, sensitivity, plan.model.teacher, sampler_digest(plan.sampler)).save(run / "scores.safetensors")
    return run


def subject(plan: CachePlan, reference: CachePlan, group: str = PLANNED, name: str = "x") -> Subject:
    return Subject(name, group, name, plan, plan_macs(reference) / plan_macs(plan))


def row(plan: CachePlan, reference: CachePlan, group: str, name: str, error: float, ms: float) -> Row:
    errors = {"ode": np.array([error, error]), "reference": np.array([2 * error, 2 * error])}
    return Row(subject(plan, reference, group, name), np.zeros((2, 1, 2, 2)), errors, {"ms_per_image": ms})


def test_identical_images_are_perfect():
    x = RNG.uniform(-1, 1, (4, 3, 16, 16)).astype(np.float32)
    similarity = quality.ssim(x, x, 2.0)
    assert similarity is not None
    assert similarity == pytest.approx(np.ones(4), abs=1e-12)
    features = RNG.normal(size=(5, 7))
    assert quality.frechet_distance(features, features) == pytest.approx(0.0, abs=1e-12)


def test_frechet_distance_by_hand():
    a = np.array([[0.0, 0.0], [2.0, 0.0]])  # mean (1, 0), covariance diag(2, 0)
    assert quality.frechet_distance(a, a + np.array([3.0, 4.0])) == pytest.approx(25.0)  # equal covariances: means alone
    wide = np.array([[-2.0, 0.0], [4.0, 0.0]])  # the same mean, standard deviation 3 sqrt 2 in place of sqrt 2
    assert quality.frechet_distance(a, wide) == pytest.approx((3 * np.sqrt(2) - np.sqrt(2)) ** 2)


def test_frechet_distance_agrees_with_a_matrix_root():
    from scipy.linalg import sqrtm

    a, b = RNG.normal(size=(40, 5)), RNG.normal(size=(30, 5)) * 1.5 + 0.3
    s, r = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + r - 2 * sqrtm(s @ r).real)
    assert quality.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_a_single_image_has_no_distribution():
    with pytest.raises(TokenCacheError, match="at least two images"):
        quality.frechet_distance(np.zeros((1, 3)), np.zeros((2, 3)))


def test_features_are_of_the_middle_block(teacher):
    x, y = RNG.normal(size=(3, 4, 8, 8)).astype(np.float32), torch.tensor([0, 1, 2])
    features = quality.teacher_features(teacher, x, y, batch=2)
    z = teacher.embed(torch.from_numpy(x))
    mods, _ = teacher.modulations(teacher.condition(torch.full((3,), quality.FEATURE_TIME), label=y))
    for block in (0, 1):
        z = teacher.blocks[block](z, mods[block])
    assert features.dtype == np.float64
    assert torch.from_numpy(features).float() == pytest.approx(z.mean(1), abs=1e-5)


def test_spread():
    assert spread(np.array([1.0, 3.0])) == {"mean": 2.0, "stderr": 1.0, "worst": 3.0}


def test_judge():
    images = np.concatenate([np.full((10, 1, 2, 2), -1.0), np.full((10, 1, 2, 2), 1.0)]) + RNG.normal(size=(20, 1, 2, 2)) * 0.1
    labels = np.repeat([0, 1], 10)
    mixed = RNG.permutation(20)
    judge = Judge(images[mixed], labels[mixed])
    assert judge.held_out == 1.0
    assert judge.accuracy(np.full((4, 1, 2, 2), 7.0), np.array([1, 1, 1, 0])) == 0.75


def test_judges_are_found(teacher):
    signature = model_signature(teacher)
    assert find_judge(signature, None) is None
    digits = dataclasses.replace(signature, in_channels=1, input_size=16)
    judge = find_judge(digits, "data.digits:load_digits")
    assert judge is not None
    assert judge.held_out > 0.93
    with pytest.raises(TokenCacheError, match=r"\(1797, 1, 8, 8\).*expected"):
        find_judge(signature, "data.digits:load_digits")
    with pytest.raises(TokenCacheError, match="no images and classes came from it"):
        find_judge(signature, "data.digits:nothing")


def test_the_shipped_digits_teacher_has_a_judge():
    from tc_lightning.models.checkpoints import TeacherSpec, load_teacher

    assert find_judge(model_signature(load_teacher(TeacherSpec("data/digits_dit.safetensors"))), None) is not None


def test_fid_needs_local_weights_and_torch_fidelity(tmp_path):
    x = np.zeros((2, 1, 8, 8), np.float32)
    with pytest.raises(TokenCacheError, match="no Inception weights at"):
        quality.InceptionFID(tmp_path / "gone.pth", x)
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    with pytest.raises(TokenCacheError, match="makes latents of 4 channels"):
        quality.InceptionFID(tmp_path / "weights.pth", np.zeros((2, 4, 8, 8)))
    with pytest.raises(TokenCacheError, match="torch-fidelity"):
        quality.InceptionFID(tmp_path / "weights.pth", x)


def test_targets_are_what_sampling_gives_and_are_kept(teacher, tmp_path):
    plan = make_plan(teacher, (FULL,) * 4)
    key = TargetKey(plan.model, plan.sampler, plan.guidance, seed=3, images=2, ode_steps=6)
    seen: list[int] = []
    targets = cached_targets(teacher, key, tmp_path, seen.append)
    assert sum(seen) == key.image_steps == 2 * (4 + 6)
    expected = full_plan(plan.model, plan.sampler, plan.guidance)
    assert torch.equal(targets.reference, sample(teacher, expected, targets.x_T, targets.given))
    seen.clear()
    again = cached_targets(teacher, key, tmp_path, seen.append)
    assert seen == [key.image_steps]
    assert torch.equal(again.ode, targets.ode)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    assert torch.equal(cached_targets(teacher, key, tmp_path).ode, targets.ode)
    other = dataclasses.replace(key, seed=4)
    assert not torch.equal(compute_targets(teacher, other).ode, targets.ode)


def test_equal_computations_are_one_subject(teacher):
    plan = make_plan(teacher, STEPS)
    reference = full_plan(plan.model, plan.sampler, plan.guidance)
    same = dataclasses.replace(plan, provenance={"policy": "another"})
    other = make_plan(teacher, (FULL, *STEPS[1:-1], FULL))
    kept = distinct([subject(plan, reference), subject(same, reference, PUBLISHED), subject(other, reference)])
    assert [(s.name, s.plan) for s in kept] == [("x", plan), ("x (2)", other)]


def test_fewer_steps_round_in_their_favour(teacher):
    reference = make_plan(teacher, (FULL,) * 10)

    def judge(plan: CachePlan) -> float:  # the best spacing is logsnr, the best sampler dpmpp_2m
        return (plan.sampler.spacing != "logsnr") + 0.1 * (plan.sampler.name != "dpmpp_2m")

    found = list(fewer_steps(reference, (3.0,), judge))
    assert {s.plan.sampler.spacing for s in found} == {"logsnr"}
    assert {s.plan.num_steps for s in found[:-1]} == {4}
    assert (found[-1].plan.sampler.name, found[-1].plan.num_steps) == ("dpmpp_2m", 5)
    assert {s.group for s in found} == {FEWER}


def test_front_of_the_planner(teacher, tmp_path):
    reference = make_plan(teacher, (FULL,) * 10)
    plans = [make_plan(teacher, (FULL,) * n + ((skip(0, 4, 1),),) * (10 - n)) for n in (1, 2, 3, 4, 5)]
    (tmp_path / "front").mkdir()
    entries = []
    for plan in plans:
        plan.save(tmp_path / "front" / f"{plan.digest[:8]}.json")
        speedup, name = plan_macs(reference) / plan_macs(plan), f"front/{plan.digest[:8]}.json"
        entries.append(
            {
                "plan": name,
                "macs_speedup": speedup,
                "mse_ode": 1 / len(plan.full_steps),
                "mse_reference": None,
                "target": "ode",
                "chosen": False,
                "role": "planned",
                "budgets": [],
            }
        )
    (tmp_path / "front" / "front.json").write_text(json.dumps(entries), encoding="utf-8")
    own = make_plan(teacher, STEPS)
    found = list(planned(reference, own, tmp_path, budgets=(2.0, 3.0), most=3))
    assert [s.plan for s in found[:1]] == [own]
    for budget in (2.0, 3.0):  # of the plans that reach a budget the dearest has the least error
        reaches = [plan for plan in plans if plan_macs(reference) / plan_macs(plan) >= budget]
        assert reaches[-1] in [s.plan for s in found[1:]]
    assert len(found) == 4
    fewer = make_plan(teacher, (FULL,) * 5, reference=reference.sampler)
    fewer.save(tmp_path / "front" / "fewer.json")
    row = entries[0] | {"plan": "front/fewer.json", "macs_speedup": 2.0, "role": "fewer steps", "target": "reference"}
    (tmp_path / "front" / "front.json").write_text(json.dumps([*entries, row]), encoding="utf-8")
    context: Any = SimpleNamespace(model=teacher)
    told: list[str] = []
    rivals = list(fitted(context, reference, tmp_path, (2.0, 4.6, 5.0), told.append))  # the last two pay for two steps each
    assert [(s.group, s.plan.num_steps, s.plan.caches) for s in rivals] == [(FEWER, 5, False), (FEWER, 2, False)]
    assert rivals[0].plan == fewer
    assert rivals[1].plan.sampler.name == "dpmpp_2m-fitted"
    assert told == ["fewer steps, fitted and refined, 4.6x"]
    (tmp_path / "front" / "front.json").write_text(json.dumps([row | {"target": "ode"}]), encoding="utf-8")
    rivals = list(fitted(context, reference, tmp_path, (2.0,), told.append))  # one fitted to the ODE is not one for the reference
    assert [s.method.rsplit(" ", 1)[1] for s in rivals] == ["ODE", "reference"]
    assert fewer not in [s.plan for s in planned(reference, own, tmp_path, (2.0,), 9)]
    (tmp_path / "front" / "front.json").write_text("[{}]", encoding="utf-8")
    with pytest.raises(RunError, match="is damaged"):
        list(planned(reference, own, tmp_path, (2.0,), 3))


def test_comparisons_by_hand(teacher):
    reference = make_plan(teacher, (FULL,) * 10)
    cached = make_plan(teacher, (FULL,) * 4 + ((skip(0, 4, 1),),) * 6)
    few = [make_plan(teacher, (FULL,) * n) for n in (5, 6, 7)]
    rows = [
        row(cached, reference, PLANNED, "ours", 1.0, ms=50.0),
        row(few[0], reference, FEWER, "five", 4.0, ms=45.0),
        row(few[1], reference, FEWER, "six", 2.0, ms=51.0),
        row(few[2], reference, FEWER, "seven", 0.5, ms=60.0),
    ]
    base = row(reference, reference, REFERENCE, "reference", 0.0, 100.0)
    found = verdict.compare(rows, base, (2.0,))
    assert {(c.equal, c.target, c.best) for c in found} == {(e, t, "six") for e in ("MACs", "time") for t in ("ode", "reference")}
    assert {c.ratio for c in found} == {0.5}
    assert {c.closer for c in found} == {1.0}
    assert "wins at every budget" in verdict.headline(found)
    beaten = verdict.compare([rows[0], row(few[0], reference, FEWER, "five", 0.5, ms=45.0)], base, (2.0,))
    assert "loses at every budget" in verdict.headline(beaten)
    assert any("LOSES to five: its error is 2 times as large" in s for s in verdict.sentences(beaten, 0, 0, 2))
    assert verdict.compare(rows, base, (9.0,)) == []
    assert plan_macs(few[1]) == full_step_macs(reference.model) * 6
    uncached = row(few[0], reference, PLANNED, "planned without a cache", 1.5, ms=45.0)
    found = verdict.compare([rows[0], uncached, rows[1]], base, (2.0,))
    assert {(c.planned, c.best, c.fewer) for c in found} == {("ours", uncached.name, uncached.name)}


def test_a_plan_that_fails_is_told(tmp_path):
    model = make_teacher()
    model.final_layer.linear.bias.fill_(1e6)
    plan = make_plan(model, STEPS)
    reference = full_plan(plan.model, plan.sampler, plan.guidance)
    failed = export(WeightFiles(model, "fp16", tmp_path), subject(plan, reference), tmp_path / "a", "cpu", 2)
    assert isinstance(failed, Failed)
    assert "is not finite in fp16" in failed.reason


def test_artefacts_share_one_file_of_weights(teacher, tmp_path):
    plans = [make_plan(teacher, STEPS), make_plan(teacher, (FULL,) * 4)]
    weights = WeightFiles(teacher, "fp32", tmp_path)
    made = [export(weights, subject(plan, plans[1]), tmp_path / str(j), "cpu", 2) for j, plan in enumerate(plans)]
    assert all(isinstance(artefact, Exported) for artefact in made)
    assert (tmp_path / "0" / "weights.data").samefile(tmp_path / "1" / "weights.data")
    results = make_in_turns([a for a in made if isinstance(a, Exported)], Requests(seed=2, images=3, batch=2), 5)
    for plan, result in zip(plans, results, strict=True):
        assert isinstance(result, Made)
        assert len(result.ms_per_image) == 2
        expected = sample(teacher, plan, noise_for(2, range(3), teacher), labels_for(2, range(3), 5))
        assert torch.from_numpy(result.latents) == pytest.approx(expected, rel=1e-3, abs=1e-3 * float(expected.abs().max()))


def test_missing_policies_are_told(tmp_path):
    run = finished_run(tmp_path)
    loaded = load_run(dataclasses.replace(read_run(run), teacher=_teacher(tmp_path)))
    reference = reference_plan(loaded.plan)
    targets = compute_targets(loaded.model, TargetKey(reference.model, reference.sampler, reference.guidance, 1, 2, ode_steps=4))
    context = planning_context(loaded, targets)
    subjects, missing = published(context, reference, (2.0, 50.0), lambda s: {"fora": standard_policies(s)["fora"]})
    assert [(s.group, s.method) for s in subjects] == [(PUBLISHED, "fora")]
    assert [(m.method, m.budget) for m in missing] == [("fora", 50.0)]
    assert "not reachable" in missing[0].reason
    greatest, missing = published(context, reference, (50.0,), lambda s: {"fora": standard_policies(s)["fora"]})
    assert [(m.method, m.budget) for m in missing] == [("fora", 50.0)]
    assert f"up to {greatest[0].speedup:.2f}" in missing[0].reason  # what it does reach is shown


def _teacher(folder: Path):
    from tc_lightning.models.checkpoints import TeacherSpec

    return TeacherSpec(str(folder / "teacher.safetensors"))


@dataclasses.dataclass
class Work:
    """How often weights were written and hashed during a report, by what they were written to and by inode."""

    written: list[str] = dataclasses.field(default_factory=list)
    hashed: list[int] = dataclasses.field(default_factory=list)

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Count in what the report calls."""
        write, sha256_of = weight_files.write_weights, manifest.sha256_of

        def counted_write(tensors, path, dtype):
            self.written.append(path.name)
            return write(tensors, path, dtype)

        def counted_hash(path):
            self.hashed += [path.stat().st_ino] if path.suffix == ".data" else []
            return sha256_of(path)

        patch.setattr(weight_files, "write_weights", counted_write)
        patch.setattr(compiler, "write_weights", counted_write)
        patch.setattr(manifest, "sha256_of", counted_hash)


WORK = Work()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A report of a tiny run, by the command as a user gives it, at a budget that the run's own plan does not reach."""
    folder = tmp_path_factory.mktemp("report")
    finished_run(folder)
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    WORK.watch(patch)
    main(["report", "--images", "4", "--batch", "2", "--budgets", "3", "--policies", "fora", "toca"])
    patch.undo()
    return folder / "runs" / "tiny" / "version_0" / "report"


def test_weights_are_written_and_hashed_once_whatever_the_number_of_plans(written):
    """Each is 2.7 GB for DiT-XL/2."""
    rows = json.loads((written / "report.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) > 5
    assert WORK.written == ["0.data"]
    assert len(WORK.hashed) == 1


def test_the_plans_own_speedup_is_compared(written):
    report = json.loads((written / "report.json").read_text(encoding="utf-8"))
    own = next(row["macs_speedup"] for row in report["rows"] if row["method"] == "this run's plan")
    assert report["settings"]["budgets"] == [math.floor(100 * own) / 100, 3.0]
    assert 1.8 < own < 2.0
    compared = {c["budget"] for c in report["comparisons"]}
    assert compared == {report["settings"]["budgets"][0]}
    assert {row["method"] for row in report["rows"] if row["group"] == PUBLISHED and row["macs_speedup"] < 2.0} == {"fora", "toca"}


@pytest.mark.parametrize(("given", "expected"), [(1.8, 1.8), (1.899, 1.89), (1.7999999999999998, 1.8), (2.0, 2.0), (1.15, 1.15)])
def test_rounding_down_keeps_what_rounding_alone_took(given, expected):
    assert rounded_down(given) == expected


def test_content_predictors_are_in_a_weights_file_of_their_own(teacher, tmp_path):
    """One for each set of steps, whose terms it holds; plans without one share the teacher's."""
    selector = make_selector(teacher)
    looking = [content_plan(teacher, selector), dataclasses.replace(content_plan(teacher, selector), provenance={"policy": "same"})]
    shared = WeightFiles(teacher, "fp32", tmp_path, selector)
    made = []
    for j, plan in enumerate([make_plan(teacher, STEPS), *looking, make_plan(teacher, (FULL,) * 3)]):
        reference = full_plan(plan.model, plan.sampler, plan.guidance)
        made.append(export(shared, subject(plan, reference), tmp_path / str(j), "cpu", 2))
    assert [one.reason for one in made if isinstance(one, Failed)] == []
    inodes = [(tmp_path / str(j) / "weights.data").stat().st_ino for j in range(4)]
    assert inodes[0] == inodes[3] != inodes[1] == inodes[2]
    other = dataclasses.replace(content_plan(teacher, selector), selector="1" * 64)
    failed = export(shared, subject(other, reference), tmp_path / "other", "cpu", 2)
    assert isinstance(failed, Failed)
    assert f"but {selector.digest[:8]} was given" in failed.reason


def test_artefacts_for_cuda_share_no_graphs(tmp_path):
    """Its runtime refuses those that do. There is no GPU here: the artefact is written, and then cannot be run."""
    model = make_teacher()
    two, three = (partial(0, 2, (1, 5)), compute(2, 4)), (partial(0, 2, (0, 9, 11)), compute(2, 4))
    plan = make_plan(model, (FULL, two, three, FULL, two))
    reference = full_plan(plan.model, plan.sampler, plan.guidance)
    shared = {}
    for provider in ("cpu", "cuda"):
        export(WeightFiles(model, "fp32", tmp_path), subject(plan, reference), tmp_path / provider, provider, 2)
        programs = manifest.read_manifest(tmp_path / provider)["programs"]
        shared[provider] = [name for name, program in programs.items() if program["graph"] != name]
    assert shared["cpu"]
    assert shared["cuda"] == []


def test_nothing_is_exported_after_a_reference_run_that_fails(written, monkeypatch, capsys):
    tried = []

    def fail(_, subject, *__):
        tried.append(subject.group)
        return Failed(subject, "it is too large")

    monkeypatch.setattr("export.report.measure.export", fail)
    monkeypatch.chdir(written.parents[3])
    with pytest.raises(SystemExit):
        main(["report", "--images", "4", "--batch", "2", "--budgets", "3", "--policies", "fora"])
    assert tried == [REFERENCE]
    assert "the reference run itself cannot be measured: it is too large" in capsys.readouterr().err


def test_torch_follows_the_provider(written, monkeypatch, capsys):
    """Teacher and content predictor of a report are where ONNX Runtime will be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torch_device("cuda", 1).index == 1
    assert torch_device("cuda", 2).type == "cpu"
    assert [torch_device(provider).type for provider in ("cuda", "cpu")] == ["cuda", "cpu"]
    monkeypatch.chdir(written.parents[3])
    asked = []

    def load(run, device):
        asked.append(torch.device(device).type)
        raise TokenCacheError("far enough")

    monkeypatch.setattr(command, "load_run", load)
    for provider in ("cuda", "cpu"):
        with pytest.raises(SystemExit):
            main(["report", "--provider", provider])
    assert asked == ["cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_device("cuda").type == "cpu"


def test_evaluation_images_are_of_all_classes(teacher):
    """Sixteen images of a model of 1,000 classes are not its first sixteen, and as recording draws them."""
    signature = dataclasses.replace(model_signature(teacher), conditions=(Condition("label", "int64", null=1000, classes=1000),))
    plan = make_plan(teacher, (FULL,) * 2)
    labels = TargetKey(signature, plan.sampler, plan.guidance, seed=7, images=16).given["label"]
    assert labels.max() > 500
    assert len(set(labels.tolist())) == 16
    asked = []

    class Sampler:
        conditions = signature.conditions

        def sample(self, conditions, seed, first_index, full):
            labels = conditions["label"].tolist()
            asked.append((first_index, labels))
            latents = np.zeros((len(labels), 1, 2, 2), np.float32)
            return Result(latents, None, {"ms": 1.0})

    fidelity.measure(Sampler(), images=16, batch=10, seed=7)
    assert [label for first, part in asked[::2] for label in part] == labels.tolist()
    assert [first for first, _ in asked[::2]] == [0, 10]


def test_report_end_to_end(written):
    report = json.loads((written / "report.json").read_text(encoding="utf-8"))
    text = (written / "index.html").read_text(encoding="utf-8")
    assert {row["group"] for row in report["rows"]} == {PLANNED, PUBLISHED, FEWER}
    assert {row["method"] for row in report["rows"] if row["group"] == PUBLISHED} == {"fora", "toca"}
    assert report["failed"] == []
    for row in [report["reference"], *report["rows"]]:
        assert row["name"].replace("'", "&#x27;") in text
        assert row["ms_per_image"] > 0
        assert row["export_rel_l2"] < 1e-4
    assert report["reference"]["mse_reference"]["mean"] < 1e-6
    assert report["reference"]["macs_speedup"] == 1.0
    assert report["comparisons"]
    assert report["settings"]["command"].startswith("python -m tc_lightning report")


def test_the_page_needs_nothing_from_elsewhere(written):
    text = (written / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|@import|//[a-z]", text)
    files = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert len(files) > 10
    assert [name for name in files if not (written / name).is_file()] == []
    assert "FID" not in text.replace("It is not FID", "")


def test_what_was_found_is_in_the_page():
    report = json.loads(json.dumps(REPORT))
    text = page(report, Pictures({}, None, "figures/tokens.png", {}))
    assert "could not &lt;b&gt; be exported" in text
    assert "needs routers" in text


REPORT = {
    "run": "x",
    "run_folder": "runs/x",
    "teacher": {"weights": "w", "sha256": "0" * 64},
    "model": {"depth": 1, "tokens": 1, "conditions": [{"name": "label", "classes": 1}]},
    "guidance": {"scale": 1.0, "channels": 0},
    "headline": "h",
    "sentences": [],
    "comparisons": [],
    "reference": {
        "name": "reference run",
        "group": "reference",
        "plan": "p",
        "sampler": "ddim uniform",
        "steps": 2,
        "macs_speedup": 1.0,
        "wall_speedup": 1.0,
        "ms_per_image": 1.0,
        "mse_ode": {"mean": 1.0, "stderr": 0.0, "worst": 1.0},
        "mse_reference": {"mean": 0.0, "stderr": 0.0, "worst": 0.0},
        "psnr_db": 200.0,
        "ssim": None,
        "frechet_teacher_features": 0.0,
        "classifier_accuracy": None,
        "fid_inception": None,
        "export_rel_l2": 0.0,
        "cache_bytes_per_image": 0,
    },
    "rows": [],
    "failed": [{"name": "bad", "group": "planned", "reason": "could not <b> be exported"}],
    "missing": [{"method": "harmonica", "budget": 2.0, "reason": "needs routers"}],
    "classifier_held_out_accuracy": None,
    "settings": {"images": 2, "seed": 1, "batch": 1, "command": "c", "provider": "cpu", "precision": "fp32"},
    "environment": {},
}


def test_interrupted_report_leaves_the_old_one(written, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in written.iterdir()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.report.build.page", interrupted)
    monkeypatch.chdir(written.parents[3])
    with pytest.raises(SystemExit) as stop:
        main(["report", "--images", "4", "--batch", "4", "--budgets", "1.8", "--policies", "fora"])
    assert stop.value.code == command.command.EXIT_INTERRUPTED
    assert {path.name: path.stat().st_mtime_ns for path in written.iterdir()} == before
    assert [path.name for path in written.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "gone"], "gone is not a finished run"),
        (["--out", "."], "exists and is not a report"),
        (["--policies", "magic", "--out", "new"], "--policies magic: choose from"),
        (["--real", "nowhere:images", "--out", "new"], "no images and classes came from it"),
        (["--inception", "gone.pth", "--images", "4", "--out", "new"], "no Inception weights"),
    ],
)
def test_what_is_wrong_is_said_in_one_paragraph(written, arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(written.parents[3])
    with pytest.raises(SystemExit) as stop:
        main(["report", *arguments])
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in told
    assert not Path("new").exists()


def test_help_names_the_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "report" in capsys.readouterr().out


def test_runs_are_checked(tmp_path, teacher):
    run = finished_run(tmp_path)
    info = dataclasses.replace(read_run(run), teacher=_teacher(tmp_path))
    make_plan(teacher, STEPS).save(info.plan)
    with pytest.raises(PlanError, match="made for another model"):
        load_run(info)


def test_plan_maps_show_every_mode(teacher, tmp_path):
    from export.report.figures import plan_maps, write_both

    steps = (FULL, FULL, (skip(0, 1, 1), partial(1, 3, (1, 2), 1), compute(3, 4)))
    write_both(tmp_path, "plans", plan_maps({"one": make_plan(teacher, steps)}))
    assert {path.name for path in tmp_path.iterdir()} == {"plans.svg", "plans-dark.svg"}
    assert (tmp_path / "plans.svg").read_text(encoding="utf-8") != (tmp_path / "plans-dark.svg").read_text(encoding="utf-8")


def test_plan_maps_tell_the_halves_of_guidance(teacher):
    from export.report.figures import HALVES, LIGHT, plan_maps
    from tc_lightning.plan.guidance import GuidanceMode

    both = make_plan(teacher, (FULL,) * 3)
    fewer = dataclasses.replace(both, guidance_modes=(GuidanceMode(), GuidanceMode("forecast", 0), GuidanceMode("cond")))
    told = [[text.get_text() for text in plan_maps({"one": plan})(LIGHT).legends[0].get_texts()] for plan in (both, fewer)]
    assert told == [["compute"], ["compute", *HALVES.values()]]
