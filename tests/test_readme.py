"""The README: its commands run, in its order, as a newcomer would type them (on a tiny teacher, so that it takes seconds)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tc_lightning.models.checkpoints import save_teacher
from tc_lightning.models.dit import DiT, DiTConfig, randomise_

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEACHER = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10, learn_sigma=False)
OVERLAY = """
model:
  init_args:
    teacher: {weights: tiny.safetensors}
    num_steps: 8
    sensitivity_samples: 2
    policy:
      init_args: {target_speedup: 1.5, front: [], evaluations: 3, fit_images: 2, judge_images: 2, final_images: 2, pool_images: 0}
data:
  init_args: {num_train: 16, num_val: 16}
trainer: {max_steps: 2, val_check_interval: 2}
"""


def blocks(language: str) -> list[str]:
    """Fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_two_commands_do_all_the_set_up() -> None:
    first, second = (block.strip() for block in blocks("bash")[:2])
    assert first == "pip install -e . && lightning fit -c lightning_configs/digits.yaml && python export/to_onnx.py"
    assert second == "pip install -e '.[test]' && pytest"


def test_every_path_exists() -> None:
    named = re.findall(r"(?<![\w/.])((?:lightning_configs|export|data|tests|tc_lightning)/[\w./]*\w)", README)
    assert len(set(named)) > 8
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("path", ["README.md", "export/BENCHMARKS.md", "data/digits_dit.md", "data/digits_sit.md"])
def test_nothing_is_left_to_be_filled_in(path: str) -> None:
    assert not re.search(r"@[A-Z]+@|TODO|TBD", (ROOT / path).read_text(encoding="utf-8"))


def test_every_config_is_mentioned() -> None:
    assert [path.name for path in (ROOT / "lightning_configs").iterdir() if path.name not in README + "digits_teacher.yaml"] == []


def test_commands_and_example_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("export", "lightning_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    save_teacher(randomise_(DiT(TEACHER), seed=0), tmp_path / "tiny.safetensors")
    (tmp_path / "tiny.yaml").write_text(OVERLAY, encoding="utf-8")
    lines = [part for block in blocks("bash") for line in block.strip().splitlines() for part in line.split(" && ")]
    runnable = [
        line for line in lines if not re.match(r"pip |pytest|.*(/path/to/|cuda|conditions\.npz)", line)
    ]  # text: tests/test_text_commands.py
    assert len(runnable) >= 4
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in runnable:
        line = line.replace("digits.yaml", "digits.yaml -c tiny.yaml").replace("verify.py", "verify.py --images 2")
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PATH": path})
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "grid.png").exists()
    assert (tmp_path / "receipt.json").exists()
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[0], {})
