"""A Triton server for the tests: it needs numpy < 2, so it lives in an environment of its own, made from the registries' packages."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections import defaultdict
from pathlib import Path

import onnxruntime as ort
import pytest

from export.serving.triton_process import Running


def python_with_server(folder: Path) -> str:
    """The Python of a new environment in a folder; TRITON_PYTHON names that of one which is there already. Without the network the test
    is skipped, but not where CI would not see it."""
    if known := os.environ.get("TRITON_PYTHON"):
        return known
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # onnxruntime as it is here, where rows are made alone.
    install = [folder / "bin" / "pip", "install", "--quiet", "nvidia-pytriton", f"onnxruntime=={ort.__version__}"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode != 0 and not os.environ.get("CI"):
        pytest.skip(f"nvidia-pytriton cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return str(folder / "bin" / "python")


def counters(server: Running, model: str) -> dict[str, float]:
    """Our metrics of a model, 0 where it has none yet; milliseconds are summed over its programs."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=60) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("tc_") and f'model="{model}"' in line]
    found: dict[str, float] = defaultdict(float)
    for line in lines:
        found[line.partition("{")[0]] += float(line.rpartition(" ")[2])
    return found
