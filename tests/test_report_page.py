"""Figures and pages of a report, without a run."""

from __future__ import annotations

import dataclasses
import json

from conftest import FULL, make_plan

from export.report.page import page
from export.report.pictures import Pictures
from tc_lightning.plan.segments import compute, partial, skip


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
