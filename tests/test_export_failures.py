"""What must not happen: interrupted exports, planted bugs, and folders that are no artefacts."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FULL, make_plan, make_teacher, vp_sampler
from exporting import export, snapshot

from export.command import run
from export.compiler.parity import Check, ParityError, relative_l2, require_parity
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.plan.segments import skip


def test_interrupted_export_leaves_the_old_artefact(tmp_path, monkeypatch, teacher, plan):
    out = tmp_path / "artefact"
    export(teacher, make_plan(teacher, (FULL, (skip(0, 4),))), out)
    before = snapshot(out)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for stage in ("_write_graphs", "prove", "measure", "write_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(export_module(), stage, interrupted)
            with pytest.raises(KeyboardInterrupt):
                export(teacher, plan, out)
        assert snapshot(out) == before
        assert [p.name for p in tmp_path.iterdir()] == ["artefact"]
    assert CachedSampler(out).sample([1]).latents.shape == (1, 4, 8, 8)


def export_module() -> Any:
    return sys.modules["export.compiler.compile"]


def test_interrupted_exchange_leaves_the_old_artefact(tmp_path, monkeypatch, teacher):
    """The old folder is moved away before the new one takes its place; a failure in between must bring it back."""
    out, plan = tmp_path / "artefact", make_plan(teacher, (FULL, (skip(0, 4),)))
    export(teacher, plan, out)
    before, rename = snapshot(out), Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial") and ".old." not in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(KeyboardInterrupt):
        export(teacher, plan, out)
    assert snapshot(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


def test_what_a_killed_export_left_is_cleared(tmp_path, teacher):
    """Of a process that is gone; the folders of one that runs, and of exports to other places, stay."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    stale = tmp_path / f".artefact.{gone.pid}-abc123.partial"
    stale.mkdir()
    running = tmp_path / f".artefact.{os.getppid()}-abc123.partial"
    running.mkdir()
    (stale / "weights.data").write_bytes(b"x")
    other = tmp_path / f".another.{gone.pid}-abc123.partial"
    other.mkdir()
    export(teacher, make_plan(teacher, (FULL,)), tmp_path / "artefact")
    assert not stale.exists()
    assert running.exists()
    assert other.exists()


def test_a_folder_that_is_no_artefact_is_never_replaced(tmp_path, teacher):
    plan = make_plan(teacher, (FULL,))
    precious = tmp_path / "runs"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(TokenCacheError, match=r"runs.*not an artefact"):
        export(teacher, plan, precious)
    assert (precious / "thesis.txt").read_text(encoding="utf-8") == "years of work"
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    with pytest.raises(TokenCacheError, match=r"file.*not an artefact"):
        export(teacher, plan, tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"
    empty = tmp_path / "empty"
    empty.mkdir()
    export(teacher, plan, empty)
    assert (empty / "manifest.json").is_file()


def planted_scale_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of shift and scale exchanged in the final layer."""
    from export.compiler.traced import Hoisted

    original = Hoisted.unpack

    def unpack(*args: Any) -> Any:
        terms = original(*args)
        return terms._replace(final=terms.final._replace(shift=terms.final.scale, scale=terms.final.shift))

    monkeypatch.setattr(Hoisted, "unpack", unpack)


def test_planted_bug_is_found(tmp_path, monkeypatch, teacher, plan):
    planted_scale_bug(monkeypatch)
    with pytest.raises(ParityError, match=r"disagrees with the torch reference.*\n *step_00, step 0 +x_next ") as caught:
        export(teacher, plan, tmp_path / "artefact")
    assert "trajectory" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_planted_bug_in_one_program_is_found(tmp_path, monkeypatch, teacher):
    """Forecast weights of the wrong step: full compute is right, and so is each graph's arithmetic."""
    from export.compiler import emit

    original = emit.forecast_table
    monkeypatch.setattr(emit, "forecast_table", lambda *args: np.roll(original(*args), 1, axis=0))
    plan = make_plan(teacher, (FULL, FULL, (skip(0, 4, 1),), (skip(0, 4, 1),)))
    with pytest.raises(ParityError) as caught:
        export(teacher, plan, tmp_path / "artefact")
    assert "step_01, step 2" in str(caught.value)
    assert "step_full" not in str(caught.value)


def test_command_exits_with_3(tmp_path, monkeypatch, capsys, teacher, plan):
    from export import to_onnx
    from tc_lightning.models.checkpoints import TeacherSpec, save_teacher
    from tc_lightning.runs.folder import write_run

    planted_scale_bug(monkeypatch)
    save_teacher(teacher, tmp_path / "teacher.safetensors")
    plan.save(tmp_path / "plan.json")
    write_run(tmp_path, "tiny", TeacherSpec(str(tmp_path / "teacher.safetensors")), plan.model.teacher)
    monkeypatch.setattr(sys, "argv", ["to_onnx", "--run", str(tmp_path), "--out", str(tmp_path / "out" / "tiny"), "--images", "1"])
    with pytest.raises(SystemExit) as caught:
        run(to_onnx.main)
    assert caught.value.code == 3
    assert "error: the artefact disagrees" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_parity_of_nan_is_refused():
    assert relative_l2(np.array([np.nan]), np.array([1.0])) == float("inf")
    for value in (float("nan"), float("inf"), 2e-4):
        with pytest.raises(ParityError):
            require_parity([Check("step_00", "x_next", value)], "fp32", "try again")
    require_parity([Check("step_00", "x_next", 9e-5)], "fp32", "try again")


def test_plan_of_another_model_is_refused(tmp_path, teacher, plan):
    for other, field in ((make_teacher(7), "teacher"), (make_teacher(depth=5), "depth"), (make_teacher(input_size=12), "tokens")):
        with pytest.raises(PlanError, match=f"differ in .*{field}"):
            export(other, plan, tmp_path / "artefact")
    assert list(tmp_path.iterdir()) == []


def test_stochastic_sampler_is_refused(tmp_path, teacher, plan):
    for change in ("sampler", "reference"):
        noisy = dataclasses.replace(plan, **{change: vp_sampler("ddpm", 8)})
        with pytest.raises(TokenCacheError, match=r"ddpm adds noise .* cannot be exported: plan with ddim"):
            export(teacher, noisy, tmp_path / "artefact")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "precision"), [(float("nan"), "fp32"), (1e6, "fp16")])
def test_weights_that_do_not_fit_are_named(tmp_path, value, precision):
    model = make_teacher()
    model.blocks[2].mlp.fc1.bias[3] = value
    with pytest.raises(TokenCacheError, match=rf"weight blocks\.2\.mlp\.fc1\.bias is not finite in {precision}"):
        export(model, make_plan(model, (FULL,)), tmp_path / "artefact", precision)
    assert list(tmp_path.iterdir()) == []


def test_replacing_an_artefact(tmp_path, teacher, plan):
    out = tmp_path / "artefact"
    export(teacher, plan, out)
    assert len(list(out.glob("step_*.onnx"))) > 2
    export(teacher, make_plan(teacher, (FULL,)), out)
    assert sorted(p.name for p in out.glob("*.onnx")) == ["condition.onnx", "step_full.onnx"]
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["steps"] == 1
