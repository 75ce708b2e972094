"""Stage 7: the tests that need a GPU, those marked `gpu`. The rehearsal sees that they are found, and skip with a reason."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from export.bench.acceptance.reporter import NotHere, Reporter

TESTS = Path(__file__).resolve().parents[3] / "tests"
MARK = "gpu"


def run(report: Reporter, provider: str, scratch: Path) -> None:
    """See the module."""
    with report.part(f"pytest -m {MARK}") as found:
        files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if f"mark.{MARK}" in path.read_text(encoding="utf-8")]
        if not files:
            raise NotHere(f"there are no tests in {TESTS}: run it from a checkout")
        results = scratch / "results.xml"
        command = [sys.executable, "-m", "pytest", "-m", MARK, "-q", "-rs", f"--junit-xml={results}", "-p", "no:cacheprovider", *files]
        done = subprocess.run(command, cwd=TESTS.parent, check=False, timeout=max(report.left, 1))
        results_of = outcomes(results)
        count = Counter(outcome for outcome, _ in results_of.values())
        found.figures |= {"status": done.returncode, "collected": len(results_of), **count}
        found.require(done.returncode == 0, f"pytest ended with {done.returncode}")
        found.require(bool(results_of), "no test is marked")
        for name, (outcome, said) in results_of.items():
            skipped_here = provider == "cpu" and outcome == "skipped"
            found.require(outcome == "passed" or skipped_here, f"{name} {outcome}: {said}")
        found.figures["reasons"] = sorted({said for outcome, said in results_of.values() if outcome == "skipped"})


def outcomes(path: Path) -> dict[str, tuple[str, str]]:
    """Outcome of each test, `passed`, `skipped`, `failure` or `error`, and what it says, from pytest's XML."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        told = next((child for child in case if child.tag in ("skipped", "failure", "error")), None)
        found[f"{case.get('classname')}.{case.get('name')}"] = (
            ("passed", "") if told is None else (told.tag, (told.get("message") or "").strip().partition("\n")[0])
        )
    return found
