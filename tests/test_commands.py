from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FULL, Steps, make_plan, make_teacher
from PIL import Image

import export
from tc_lightning.models.checkpoints import TeacherSpec, save_teacher
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import skip
from tc_lightning.runs.folder import write_run

SCRIPTS = Path(export.__file__).parent
DEPLOYED = "import sys, runpy; sys.modules |= dict.fromkeys(('torch', 'lightning', 'onnx', 'safetensors')); sys.argv = sys.argv[1:]; "

CACHED = (FULL, FULL, (skip(0, 4, 1),), FULL, (skip(0, 4, 1),))


def call(cwd: Path, script: str, *arguments: object, deployed: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `python export/SCRIPT` as a user would; `deployed`: on a machine without torch."""
    start = ["-c", DEPLOYED + "runpy.run_path(sys.argv[0], run_name='__main__')"] if deployed else []
    command = [sys.executable, *start, SCRIPTS / script, *arguments]
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def make_run(folder: Path, steps: Steps = CACHED) -> Path:
    """A run folder as `lightning fit` leaves it, and its teacher beside it."""
    model = make_teacher(in_channels=3)
    run = folder / "runs" / "tiny" / "version_0"
    run.mkdir(parents=True)
    save_teacher(model, folder / "teacher.safetensors")
    plan = make_plan(model, steps, Guidance(1.5, 3), policy="test")
    plan.save(run / "plan.json")
    write_run(run, "tiny", TeacherSpec("teacher.safetensors"), plan.model.teacher)
    return run


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with a finished run, exported with the command."""
    folder = tmp_path_factory.mktemp("workplace")
    make_run(folder)
    done = call(folder, "to_onnx.py", "--images", 2)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def is_one_paragraph(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """An error that is meant to be read."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert "\n\n" not in done.stderr.strip()
    for word in words:
        assert word in done.stderr


def test_to_onnx(workplace):
    out = (workplace / "stdout.txt").read_text(encoding="utf-8")
    for word in ("plan test-ddim5-full3", "export error", "method error", "speed", "next: python export/sample.py artefacts/tiny"):
        assert word in out
    manifest = json.loads((workplace / "artefacts" / "tiny" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["parity"]["images"] == 2
    assert manifest["parity"]["trajectory_rel_l2"] < 1e-5


def test_explain_writes_nothing(tmp_path):
    make_run(tmp_path)
    done = call(tmp_path, "to_onnx.py", "--explain")
    assert done.returncode == 0, done.stderr
    assert "noisiest first (F = step_full): 0 0 1 0 1" in done.stdout
    assert not (tmp_path / "artefacts").exists()


def test_sample(workplace, tmp_path):
    arguments = ("--labels", 0, 1, 2, "--out", tmp_path / "grid.png", "--receipt", tmp_path / "receipt.json", "--compare")
    done = call(workplace, "sample.py", "artefacts/tiny", *arguments, "--seed", 3, "--guidance", 2, deployed=True)
    assert done.returncode == 0, done.stderr
    assert "PSNR" in done.stdout
    with Image.open(tmp_path / "grid.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.size == (84 + 3 * 68, 3 * 68)  # three images by cached, full and difference
        assert len(image.getcolors(1 << 20)) > 50
    receipt = json.loads((tmp_path / "receipt.json").read_text(encoding="utf-8"))
    assert receipt["labels"] == [0, 1, 2]
    assert receipt["guidance"] == {"scale": 2.0, "planned": 1.5, "as_planned": False, "steps": {"both": 5}}
    assert receipt["cache_engaged"] is True
    assert receipt["compare"]["psnr_db"] > 0


def test_verify(workplace):
    done = call(workplace, "verify.py", "artefacts/tiny", "--images", 3, "--batch", 2, "--seed", 1, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["rel_l2_export"] < 1e-5
    assert (report["images"], report["seed"], report["provider"]) == (3, 1, "cpu")
    assert report["macs_speedup"] > 1
    assert len(report["baselines_psnr_db"]) == 3
    assert report["beats_baselines"] == all(report["psnr_db"] > value for value in report["baselines_psnr_db"].values())


def test_verify_prints_a_table(workplace):
    done = call(workplace, "verify.py", "artefacts/tiny", "--images", 1)
    assert done.returncode == 0, done.stderr
    for word in ("macs_speedup", "psnr_db", "rel_l2_export", "dB at the same MACs", "baselines"):
        assert word in done.stdout


def test_verify_of_a_full_plan(tmp_path):
    """A plan that caches nothing has no baseline to beat, and is still an artefact."""
    make_run(tmp_path, (FULL, FULL))
    done = call(tmp_path, "to_onnx.py", "--images", 1)
    assert done.returncode == 0, done.stderr
    done = call(tmp_path, "verify.py", "artefacts/tiny", "--images", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["psnr_db"] == 200.0


# Errors


def test_nothing_to_export(tmp_path):
    is_one_paragraph(call(tmp_path, "to_onnx.py"), "no finished run under", "lightning fit", "--run")
    is_one_paragraph(call(tmp_path, "to_onnx.py", "--run", "gone"), "gone is not a finished run")


def test_damaged_run(tmp_path):
    run = make_run(tmp_path)
    shutil.copy(run / "run.json", tmp_path / "intact.json")
    (run / "plan.json").write_text("{", encoding="utf-8")
    is_one_paragraph(call(tmp_path, "to_onnx.py"), "plan.json", "Make it again")
    (run / "run.json").write_text('{"format_version": 2, "purpose": "fit"}', encoding="utf-8")
    is_one_paragraph(call(tmp_path, "to_onnx.py"), "run.json is damaged")
    (run / "run.json").write_text(
        (tmp_path / "intact.json").read_text(encoding="utf-8").replace('"tiny"', '"../tiny"'), encoding="utf-8"
    )
    is_one_paragraph(call(tmp_path, "to_onnx.py"), "a plain name")


def test_another_teacher(tmp_path):
    make_run(tmp_path)
    save_teacher(make_teacher(9, in_channels=3), tmp_path / "teacher.safetensors")
    is_one_paragraph(call(tmp_path, "to_onnx.py", "--images", 1), "made for another model", "teacher (plan")
    assert not (tmp_path / "artefacts" / "tiny").exists()


def test_numbers_of_images_that_make_no_sense(tmp_path):
    make_run(tmp_path)
    for number in ("0", "-1", "many"):
        done = call(tmp_path, "to_onnx.py", "--images", number)
        assert done.returncode == 2
        assert "argument --images" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "artefacts").exists()


@pytest.mark.parametrize("deployed", [True, False])
def test_sample_with_bad_arguments(workplace, tmp_path, deployed):
    def sample(artefact: object, *arguments: object) -> subprocess.CompletedProcess[str]:
        return call(workplace, "sample.py", artefact, "--out", tmp_path / "grid.png", *arguments, deployed=deployed)

    is_one_paragraph(sample("artefacts/gone", "--labels", 0), "artefacts/gone does not exist", "export/to_onnx.py")
    done = sample("artefacts/tiny", "--labels", 0, 5)
    assert done.returncode == 2
    assert "error: label 5 is not a class: this artefact has classes 0 to 4." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "grid.png").exists()


def test_sample_to_places_that_cannot_be_written(workplace, tmp_path):
    for name in ("none/grid.png", "."):
        done = call(workplace, "sample.py", "artefacts/tiny", "--labels", 0, "--out", tmp_path / name, deployed=True)
        is_one_paragraph(done, "cannot write")
    is_one_paragraph(
        call(workplace, "sample.py", "artefacts/tiny", "--labels", 0, "--out", tmp_path / "a.png", "--receipt", tmp_path),
        "cannot write",
    )
    assert list(tmp_path.iterdir()) == []
    for out in (("--out", "artefacts/tiny/grid.png"), ("--receipt", "artefacts/tiny/manifest.json")):
        is_one_paragraph(call(workplace, "sample.py", "artefacts/tiny", "--labels", 0, *out, deployed=True), "outside it")
    same = ("--out", tmp_path / "a", "--receipt", tmp_path / "a")
    is_one_paragraph(call(workplace, "sample.py", "artefacts/tiny", "--labels", 0, *same, deployed=True), "name two files")
    assert not (workplace / "artefacts" / "tiny" / "grid.png").exists()


def test_damaged_artefact(workplace, tmp_path):
    copy = shutil.copytree(workplace / "artefacts" / "tiny", tmp_path / "copy")
    content = bytearray((copy / "weights.data").read_bytes())
    content[1000] ^= 4
    (copy / "weights.data").write_bytes(content)
    for script, arguments in (("sample.py", ("--labels", 0)), ("verify.py", ("--images", 1))):
        is_one_paragraph(call(tmp_path, script, copy, *arguments), "weights.data is damaged")


def test_without_a_gpu(workplace, tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = call(workplace, "sample.py", "artefacts/tiny", "--labels", 0, "--out", tmp_path / "grid.png", "--provider", "cuda")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]  # ONNX Runtime's own log, which names the missing library, comes before it
    assert last.startswith("error: ")
    assert "cuda" in last.lower()
    assert last.endswith("Or ask for provider cpu.")
    assert not (tmp_path / "grid.png").exists()
