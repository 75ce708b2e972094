"""Reports of runs as `lightning fit` leaves them: every shipped digits config, and what must not depend on how a run was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from distilling import fit, make_teacher
from test_cli import distil, workplace  # noqa: F401 (a fixture)

from tc_lightning.cli import main
from tc_lightning.measure.calibrate import NAME
from tc_lightning.measure.calibration import Calibration
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.policies import registry
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.choice import PlanChoice
from tc_lightning.policies.dp_placement import DPPlacementPolicy
from tc_lightning.policies.fora import FORAPolicy
from tc_lightning.runs.folder import find_run

SMALL = ["--images", "2", "--batch", "2", "--budgets", "1.5", "--front", "1"]
REACHED = {"digits_v2.yaml": "1.15", "digits_l2c.yaml": "1.2", "digits_router.yaml": "1.2"}  # by so small a teacher
POLICIES = {  # of a config those that use what it learns, and all of one
    "digits.yaml": ["tokencache_v1", "learning_to_cache", "harmonica"],
    "digits_v2.yaml": list(registry.standard_policies(2.0)),
    "digits_router.yaml": ["harmonica"],
    "digits_l2c.yaml": ["learning_to_cache"],
    "digits_flow.yaml": ["tokencache_v1", "fora"],
    "digits_captions.yaml": ["tokencache_v1", "fora"],
}


def report_of(run: Path, *more: str) -> dict[str, Any]:
    """What `python -m tc_lightning report` writes of a run."""
    main(["report", "--run", str(run), *SMALL, *more])
    return json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("config", POLICIES)
def test_shipped_configs_are_reported(config: str, workplace: Path) -> None:  # noqa: F811
    reached = ["--model.init_args.policy.init_args.target_speedup", REACHED[config]] if config in REACHED else []
    main([*distil(config), *reached])
    run = find_run(Path("runs"))
    plan = CachePlan.load(run / "plan.json")
    report = report_of(run, "--policies", *POLICIES[config])
    own = [row for row in report["rows"] if row["plan_digest"] == plan.digest]
    assert [row["method"] for row in own] == ["this run's plan"]
    assert own[0]["export_rel_l2"] < 1e-4
    assert report["failed"] == []
    assert not [one for one in report["missing"] if "content predictor" in one["reason"]]
    assert report["comparisons"]
    if config == "digits_v2.yaml":
        assert plan.selector
        reasons = {one["reason"] for one in report["missing"] if one["method"] == "tokencache_v2" and one["budget"] <= 1.15}
        assert reasons == set()


class Further(FORAPolicy):
    """A policy that nobody knew when the report was written, and that runs the model itself."""

    name = "further"

    def plan(self, context: PlanningContext) -> PlanChoice:
        assert context.model is not None
        return super().plan(context)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run twice: once `fit` has measured its calibration, since the policy asked for it, and once it has not."""
    folder = tmp_path_factory.mktemp("calibrated")
    fit(make_teacher(folder, seed=2), folder / "measured", 2, policy=DPPlacementPolicy(1.8))
    measured, not_yet = folder / "measured" / "run", folder / "not_yet"
    shutil.copytree(measured, not_yet)
    (not_yet / NAME).unlink()
    return {"measured": measured, "not yet": not_yet}


def test_it_does_not_matter_whether_fit_has_calibrated(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other images, or another number of them, would give other plans of the policies that look at a calibration."""
    monkeypatch.setattr(registry, "_METHODS", (*registry._METHODS, Further))
    methods = ["smoothcache", "dp_placement"]
    found = {name: report_of(run, "--policies", *methods, "further") for name, run in runs.items()}
    digests = {
        name: sorted(row["plan_digest"] for row in report["rows"] if row["method"] in (*methods, "this run's plan"))
        for name, report in found.items()
    }
    assert len(digests["measured"]) >= 3
    assert digests["measured"] == digests["not yet"]
    assert Calibration.load(runs["measured"] / NAME).digest == Calibration.load(runs["not yet"] / NAME).digest
    for report in found.values():
        assert "further" in {row["method"] for row in report["rows"]}
