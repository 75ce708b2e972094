"""What a run holds, and which run is found when none is named."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import VP, make_teacher
from content_plans import content_plan, make_selector
from reports import finished_run

from tc_lightning.errors import PlanError, RunError
from tc_lightning.measure.calibrate import IMAGES, NAME, SEED, calibrate, run_calibration
from tc_lightning.measure.calibration import Calibration
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.checkpoints import TeacherSpec, save_teacher
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.rollout.sampling import labels_for, noise_for
from tc_lightning.rollout.targets import TargetKey, compute_targets
from tc_lightning.runs.folder import ABLATION, CONTENT, FIT, find_run, read_run, write_run
from tc_lightning.runs.loaded import load_run, planning_context


def empty_run(root: Path, name: str, age: int, **more: str) -> Path:
    """A folder with a run.json that is `age` seconds old."""
    folder = root / name
    folder.mkdir(parents=True)
    write_run(folder, "x", TeacherSpec("teacher.safetensors"), "0" * 64, **more)
    written = (folder / "run.json").stat().st_mtime - age
    os.utime(folder / "run.json", (written, written))
    return folder


def older_version(folder: Path) -> None:
    """Make a run.json what it was before runs said what they are for."""
    path = folder / "run.json"
    times = (path.stat().st_atime, path.stat().st_mtime)
    content = json.loads(path.read_text(encoding="utf-8")) | {"format_version": 1}
    del content["purpose"]
    path.write_text(json.dumps(content), encoding="utf-8")
    os.utime(path, times)


def test_the_newest_run_of_fit_is_found(tmp_path: Path) -> None:
    empty_run(tmp_path, "digits/version_0", age=30)
    newest = empty_run(tmp_path, "digits/version_1", age=20)
    empty_run(tmp_path, "ablation/0123/seed_0/v1", age=10, purpose=ABLATION)
    older_version(empty_run(tmp_path, "ablation/4567/seed_0/v1", age=0))
    assert find_run(tmp_path) == newest
    assert read_run(newest).purpose == FIT


def test_others_are_read_when_they_are_named(tmp_path: Path) -> None:
    ablation = empty_run(tmp_path, "ablation/v1", age=1, purpose=ABLATION)
    old = empty_run(tmp_path, "digits/version_0", age=0)
    older_version(old)
    with pytest.raises(RunError, match=r"no finished run.*\(2 of other purposes, or of an older version, must be named\)"):
        find_run(tmp_path)
    assert read_run(ablation).purpose == ABLATION
    assert read_run(old).purpose == FIT


def test_an_older_run_is_not_taken_in_place_of_a_damaged_one(tmp_path: Path) -> None:
    empty_run(tmp_path, "digits/version_0", age=10)
    newest = empty_run(tmp_path, "digits/version_1", age=0)
    for damage in ("{", "[]", '"fit"'):
        (newest / "run.json").write_text(damage, encoding="utf-8")
        for reading in (lambda: find_run(tmp_path), lambda: read_run(newest)):
            with pytest.raises(RunError, match="is damaged"):
                reading()


def test_a_purpose_is_one_of_those_that_exist(tmp_path: Path) -> None:
    run = empty_run(tmp_path, "digits/version_0", age=0, purpose="play")
    with pytest.raises(RunError, match="purpose 'play' is none of fit, ablation"):
        read_run(run)


def content_run(folder: Path) -> Path:
    """A run whose plan looks at the image."""
    teacher = make_teacher()
    selector = make_selector(teacher)
    plan = content_plan(teacher, selector)
    save_teacher(teacher, folder / "teacher.safetensors")
    plan.save(folder / "plan.json")
    selector.save(folder / CONTENT)
    write_scores(folder, plan, selector.digest)
    write_run(folder, "content", TeacherSpec(str(folder / "teacher.safetensors")), plan.model.teacher, content=True)
    return folder


def write_scores(folder: Path, plan: CachePlan, selector: str) -> None:
    shape = (plan.num_steps, plan.model.depth)
    importance, sensitivity = np.ones((*shape, plan.model.tokens)), np.ones((*shape, 2))
    sensitivity[0] = 0.0
    scores = Scores(importance, sensitivity, plan.model.teacher, sampler_digest(plan.sampler), selector=selector)
    scores.save(folder / "scores.safetensors")


def test_a_loaded_run_holds_its_content_predictor(tmp_path: Path) -> None:
    run = read_run(content_run(tmp_path))
    loaded = load_run(run)
    assert loaded.companions.selector is not None
    assert loaded.companions.selector.digest == loaded.plan.selector == loaded.scores.selector
    key = TargetKey(loaded.plan.model, VP, loaded.plan.sampler, loaded.plan.guidance, 1, 2, ode_steps=4)
    context = planning_context(loaded, compute_targets(loaded.model, key))
    assert 0 < context.evaluate(loaded.plan, None) < float("inf")
    with pytest.raises(PlanError, match="none was given"):
        load_run(dataclasses.replace(run, content=None))
    write_scores(run.folder, loaded.plan, "1" * 64)
    with pytest.raises(RunError, match="another content predictor"):
        load_run(run)


def test_a_runs_calibration_is_of_stated_images_and_kept(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    loaded = load_run(dataclasses.replace(read_run(run), teacher=TeacherSpec(str(tmp_path / "teacher.safetensors"))))
    images = range(IMAGES)
    noise, labels = noise_for(SEED, images, loaded.model), labels_for(SEED, images, loaded.model.config.num_classes)
    expected = calibrate(loaded.model, loaded.reference, noise, labels, progress=False)
    assert (loaded.calibration.drift_TGL2 == expected.drift_TGL2).all()
    kept = Calibration.load(run / NAME)
    assert kept.digest == loaded.calibration.digest
    assert kept.made_of == f"guidance 1.5 on 3 channels, 8 images of seed {SEED}"

    written = (run / NAME).stat().st_mtime_ns
    assert run_calibration(loaded.model, loaded.reference, run).digest == kept.digest
    assert (run / NAME).stat().st_mtime_ns == written  # it was read
    dataclasses.replace(kept, made_of="4 images of another seed", drift_TGL2=2 * kept.drift_TGL2).save(run / NAME)
    assert run_calibration(loaded.model, loaded.reference, run, keep=False).digest == kept.digest  # what is of others is not taken
    assert Calibration.load(run / NAME).made_of == "4 images of another seed"
    assert run_calibration(loaded.model, loaded.reference, run).digest == Calibration.load(run / NAME).digest == kept.digest
