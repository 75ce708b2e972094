"""What a report exports and measures: shared weights, predictors, failures, and which images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import FULL, VP, make_plan, make_teacher
from content_plans import content_plan, make_selector
from reports import STEPS, subject

from export.compiler import fidelity
from export.compiler.weight_files import WeightFiles
from export.report.measure import ContenderArtefact, Failed, Made, Requests, export, make_in_turns
from export.runtime import manifest
from export.runtime.sampler import Result
from tc_lightning.models.companions import Companions
from tc_lightning.plan.conditions import Condition
from tc_lightning.plan.segments import compute, partial
from tc_lightning.rollout.sampling import full_plan, labels_for, model_signature, noise_for, sample
from tc_lightning.rollout.targets import TargetKey, cached_targets, compute_targets


def test_targets_are_what_sampling_gives_and_are_kept(teacher, tmp_path):
    plan = make_plan(teacher, (FULL,) * 4)
    key = TargetKey(plan.model, VP, plan.sampler, plan.guidance, seed=3, images=2, ode_steps=6)
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
    assert all(isinstance(artefact, ContenderArtefact) for artefact in made)
    assert (tmp_path / "0" / "weights.data").samefile(tmp_path / "1" / "weights.data")
    results = make_in_turns([a for a in made if isinstance(a, ContenderArtefact)], Requests(seed=2, images=3, batch=2))
    for plan, result in zip(plans, results, strict=True):
        assert isinstance(result, Made)
        assert len(result.ms_per_image) == 2
        expected = sample(teacher, plan, noise_for(2, range(3), teacher), labels_for(2, range(3), 5))
        assert torch.from_numpy(result.latents) == pytest.approx(expected, rel=1e-3, abs=1e-3 * float(expected.abs().max()))


def test_content_predictors_are_in_a_weights_file_of_their_own(teacher, tmp_path):
    """One for each set of steps, whose terms it holds; plans without one share the teacher's."""
    selector = make_selector(teacher)
    looking = [content_plan(teacher, selector), dataclasses.replace(content_plan(teacher, selector), provenance={"policy": "same"})]
    shared = WeightFiles(teacher, "fp32", tmp_path, Companions(selector))
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


def test_evaluation_images_are_of_all_classes(teacher):
    """Sixteen images of a model of 1,000 classes are not its first sixteen, and as recording draws them."""
    signature = dataclasses.replace(model_signature(teacher), conditions=(Condition("label", "int64", null=1000, classes=1000),))
    plan = make_plan(teacher, (FULL,) * 2)
    labels = TargetKey(signature, VP, plan.sampler, plan.guidance, seed=7, images=16).given["label"]
    assert labels.max() > 500
    assert len(set(labels.tolist())) == 16
    asked = []

    class Sampler:
        conditions, manifest = signature.conditions, {"model": {"output": "pixels"}}

        def sample(self, conditions, seed, first_index, full, pixels):
            labels = conditions["label"].tolist()
            asked.append((first_index, labels))
            latents = np.zeros((len(labels), 1, 2, 2), np.float32)
            return Result(latents, None, {"ms": 1.0})

    fidelity.measure(Sampler(), images=16, batch=10, seed=7)
    assert [label for first, part in asked[::2] for label in part] == labels.tolist()
    assert [first for first, _ in asked[::2]] == [0, 10]
