from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from reports import finished_run

from export.compiler import compile as compiler
from export.compiler import weight_files
from export.report import command
from export.report.contenders import (
    FEWER,
    PLANNED,
    PUBLISHED,
    REFERENCE,
)
from export.report.measure import Failed
from export.runtime import manifest
from export.torch_device import torch_device
from tc_lightning.cli import main
from tc_lightning.errors import TokenCacheError


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
