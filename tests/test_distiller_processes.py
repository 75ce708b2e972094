"""A distillation in two processes equals that in one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilling import fit, make_teacher, roll_out

from tc_lightning.learn.objectives.superposition import RouterSuperposition
from tc_lightning.measure.scores import Scores
from tc_lightning.models.checkpoints import TeacherSpec


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return make_teacher(tmp_path_factory.mktemp("teacher"), seed=0)


def run_two(script: Path) -> None:
    """Run both ranks, as a cluster would: started from outside, so that both import at the same time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    environments = [os.environ | shared | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(2)]
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, script], env=env, **options) for env in environments]
    try:
        errors = [rank.communicate(timeout=480)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(error[-2000:] for error in errors)


DDP_SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from distilling import fit, roll_out
from tc_lightning.learn.objectives.superposition import RouterSuperposition
from tc_lightning.models.checkpoints import TeacherSpec

if __name__ == "__main__":
    both = dict(devices=2, strategy="ddp")
    module, _ = fit(TeacherSpec({weights!r}), Path({folder!r}), 4, trainer=both, router=RouterSuperposition(every=2))
    if module.global_rank == 0:
        torch.save(module.state_dict(), Path({folder!r}) / "state.pt")
    roll_out(TeacherSpec({weights!r}), Path({folder!r}) / "rollouts", trainer=both)
    torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(teacher: TeacherSpec, tmp_path: Path) -> None:
    alone, _ = fit(teacher, tmp_path / "one", 4, router=RouterSuperposition(every=2))
    roll_out(teacher, tmp_path / "one" / "rollouts")
    folder, tests = tmp_path / "two", Path(__file__).parent
    folder.mkdir()
    script = tmp_path / "run.py"
    names = {"tests": str(tests), "root": str(tests.parent), "weights": teacher.weights, "folder": str(folder)}
    script.write_text(DDP_SCRIPT.format(**names), encoding="utf-8")
    run_two(script)
    for name, value in torch.load(folder / "state.pt").items():
        assert torch.allclose(value, alone.state_dict()[name], atol=1e-4), name
    one, two = (Scores.load(path / "run" / "scores.safetensors") for path in (tmp_path / "one", folder))
    assert torch.allclose(torch.tensor(one.importance_TLN), torch.tensor(two.importance_TLN), atol=1e-4)
    assert torch.allclose(torch.tensor(one.sensitivity_TL2), torch.tensor(two.sensitivity_TL2), rtol=1e-4)
    for path in ("run", "rollouts/run"):
        routers = [Scores.load(root / path / "scores.safetensors").router_TL2 for root in (tmp_path / "one", folder)]
        assert np.allclose(*routers, atol=1e-4), path
