"""The command that plans: its arguments, its processes and its defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.plan import _parse, fabric_of, policy_of
from export.plan import main as plan_command
from tc_lightning.cli import _user_error
from tc_lightning.errors import RunError, TokenCacheError
from tc_lightning.planner.policy import PlannerPolicy
from tc_lightning.rollout.ranks import ALONE, Ranks


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--target-ms", "nan", "--clock", "cpu"], "above 0"),
        (["--target-ms", "3"], "needs --clock"),
        (["--batch", "0"], "--batch is 0"),
        (["--run", "nowhere"], "no run.json"),
    ],
)
def test_bad_arguments_of_the_command(arguments: list[str], what: str) -> None:
    with pytest.raises(RunError, match=what):
        plan_command(["--run", "nowhere", *arguments])


@pytest.mark.parametrize("devices", ["0", "-2", "several"])
def test_devices_that_are_none(devices: str) -> None:
    with pytest.raises(RunError, match=f"--devices {devices} cannot"):
        fabric_of(devices)


def test_a_file_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "front").touch()
    with pytest.raises(FileExistsError) as caught:
        (tmp_path / "front").mkdir(exist_ok=True)
    assert "move away what is there" in str(_user_error(caught.value))


def test_one_process_that_fails_stops_all() -> None:
    cpu = torch.device("cpu")

    def fails() -> int:
        raise TokenCacheError("NaN in our share")

    with pytest.raises(TokenCacheError, match="NaN in our share"):
        ALONE.together(fails, cpu)
    with pytest.raises(TokenCacheError, match="another process failed"):
        Ranks(0, 2, lambda values: values + 1).together(lambda: 3, cpu)
    assert Ranks(0, 2, lambda values: values).together(lambda: 3, cpu) == 3


def test_the_commands_defaults_are_the_planners() -> None:
    args = _parse([])
    assert policy_of(args, args.target_speedup).settings == PlannerPolicy().settings
