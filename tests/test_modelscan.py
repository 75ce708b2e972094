"""`modelscan` finds nothing that could run code in an artefact, nor in the teachers that ship.

Its dependencies clash with those of this package: MODELSCAN names the command, in an environment of its own (`.ci/run` makes one).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import data
from export.signature import SIGNATURE

SCANNER = os.environ.get("MODELSCAN") or shutil.which("modelscan")
TEACHERS = sorted(Path(data.__file__).parent.glob("*.safetensors"))
pytestmark = pytest.mark.skipif(SCANNER is None, reason="MODELSCAN does not name the command, and it is not on the path")


def scanned(path: Path, report: Path) -> dict[str, Any]:
    """What it says of a file or folder."""
    subprocess.run(
        [str(SCANNER), "-p", str(path), "-r", "json", "-o", str(report)], check=False, capture_output=True, cwd=report.parent
    )
    return json.loads(report.read_text(encoding="utf-8"))


class Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("true",)


def test_it_finds_what_could_run_code(copied, tmp_path):
    (copied / "harmful.pkl").write_bytes(pickle.dumps(Harmful()))
    assert [issue["source"] for issue in scanned(copied, tmp_path / "report.json")["issues"]] == ["harmful.pkl"]


def test_an_artefact_passes(copied, tmp_path):
    """It takes every file called `.data` for a pickle, and says that the weights are none."""
    (copied / SIGNATURE).write_text("{}", encoding="utf-8")
    found = scanned(copied, tmp_path / "report.json")
    assert found["issues"] == []
    assert {(error["category"], error["source"]) for error in found["errors"]} <= {("PICKLE_GENOPS", "weights.data")}


def test_the_teachers_pass(tmp_path):
    assert len(TEACHERS) == 4
    for teacher in TEACHERS:
        found = scanned(teacher, tmp_path / "report.json")
        assert (found["issues"], found["errors"]) == ([], [])
