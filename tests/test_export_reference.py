"""Exports whose reference run is not the plan's own: its steps, its coefficients, and what verify compares."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import FULL, make_plan, vp_sampler
from exporting import export, graphs_of, torch_latents, worst_error

from export.compiler.parity import ParityError, relative_l2
from export.runtime.programs import condition_times
from export.runtime.sampler import CachedSampler
from export.verify import _fitted_baseline, _table, verify
from tc_lightning.measure.psnr import psnr
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.given import drawn_labels
from tc_lightning.plan.segments import partial, skip
from tc_lightning.rollout.sampling import full_plan, reference_plan


@pytest.mark.parametrize("solvers", [("dpmpp_2m", "ddim"), ("ddim", "dpmpp_3m"), ("dpmpp_3m", "dpmpp_2m")])
def test_the_reference_has_steps_and_coefficients_of_its_own(tmp_path, teacher, solvers):
    """Other times, another number of them, and another memory of past outputs than the plan's."""
    reference = vp_sampler(solvers[1], 8, "logsnr")
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
    reference, cheap = vp_sampler("ddim", 18, "trailing"), (skip(0, 4, 1),)
    plan = make_plan(teacher, (FULL, FULL, cheap, FULL, cheap, cheap), sampler="dpmpp_2m", spacing="logsnr", reference=reference)
    export(teacher, plan, tmp_path / "artefact")
    report = verify(tmp_path / "artefact", "cpu", images=2, batch=2, seed=3, quiet=True)
    assert report["macs_speedup"] == macs_speedup(plan) > 5.0
    assert report["rel_l2_export"] < 1e-5
    assert list(report["baselines_psnr_db"]) == ["ddim, 4 steps", "reuse, 3 of 18 full", "fitted, 4 steps"]
    labels = drawn_labels(3, range(2), 5).tolist()
    x, x_full = (torch_latents(teacher, p, labels, 3) for p in (plan, reference_plan(plan)))
    assert report["psnr_db"] == pytest.approx(psnr(x, x_full, plan.model.output), abs=1e-2)
    own = dataclasses.replace(plan, reference=dataclasses.replace(reference, name="calibrated"))
    export(teacher, own, tmp_path / "artefact")
    report = verify(tmp_path / "artefact", "cpu", 1, 1, seed=3, quiet=True)
    assert list(report["baselines_psnr_db"]) == ["reuse, 3 of 18 full", "fitted, 4 steps"]


def test_verify_prints_the_fitted_run_that_the_plan_names(tmp_path, teacher):
    """It is run as it stands, with the coefficients that the plan holds: an exact one is an exact rival."""
    table = vp_sampler("ddim", 6)
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
    named = vp_sampler("ddim", 4 if wrong == "another target" else 6)
    found = _fitted_baseline(teacher, dataclasses.replace(plan, fewer_steps=named), quiet=True)
    assert list(found) == ["fitted, 4 steps"]
    assert next(iter(found.values())).sampler.name == "dpmpp_2m-fitted"


def test_a_reference_at_the_plans_times_is_conditioned_once(tmp_path, teacher):
    table = vp_sampler("ddim", 4)
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
    plan = make_plan(teacher, (FULL, (skip(0, 4),), FULL), reference=vp_sampler("ddim", 5, "leading"))
    with pytest.raises(ParityError, match=r"step_full, step 0 +x_next") as caught:
        export(teacher, plan, tmp_path / "artefact")
    assert "step_00" not in str(caught.value)
