"""A whole pipeline of diffusers through the commands of the README: fit, export, sample, verify, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipelines import SD3_FACTORS, dit_pipeline, own_images, vae
from test_cli import CONFIGS, SEARCH, SHORT
from test_commands import call, is_one_paragraph

from tc_lightning.cli import main
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.rollout.sampling import noise_for
from tc_lightning.runs.folder import find_run, read_run

OVERLAY = """
model:
  init_args:
    teacher: {weights: pipeline, preset: null, input_size: null}
    num_steps: 6
    spacing: leading
    guidance_scale: 1.5
    guidance_channels: 4
    sensitivity_samples: 2
    policy: {init_args: {target_speedup: 1.5}}
data:
  init_args: {num_train: 16, num_val: 16}
trainer: {max_steps: 2, val_check_interval: 2}
"""
LABELS = [3, 999]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a pipeline, fitted and exported."""
    folder = tmp_path_factory.mktemp("workplace")
    dit_pipeline().save_pretrained(folder / "pipeline")
    (folder / "tiny.yaml").write_text(OVERLAY, encoding="utf-8")
    (folder / "search.yaml").write_text(SEARCH, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning"])
        main(["fit", "-c", str(CONFIGS / "dit_xl2_256.yaml"), "-c", "tiny.yaml", "-c", "search.yaml", *SHORT])
    done = call(folder, "to_onnx.py", "--images", 2, "--out", "a")
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def test_to_onnx_tells_of_pixels(workplace):
    out = (workplace / "stdout.txt").read_text(encoding="utf-8")
    assert "its scheduler says: 1000 linear betas" in out
    assert f"writing decoder.onnx in fp32 from {workplace / 'pipeline' / 'vae'}" in out
    line = next(line for line in out.splitlines() if line.startswith("pixels  "))
    assert "dB PSNR, SSIM 0." in line
    assert "MB for one image at a time" in line


def test_pngs_are_the_pipelines_own(workplace):
    """Where there is no torch: numpy, onnxruntime and pillow make them."""
    arguments = ("--labels", *LABELS, "--seed", 5, "--out", "grid.png", "--images", "made", "--receipt", "r.json", "--compare")
    done = call(workplace, "sample.py", "a", *arguments, deployed=True)
    assert done.returncode == 0, done.stderr
    assert "dB in latents, " in done.stdout
    names = [f"{number:04d}-{row}.png" for number in range(2) for row in ("cached", "full")]
    assert sorted(path.name for path in (workplace / "made").iterdir()) == names
    made = np.stack([np.asarray(Image.open(workplace / "made" / f"{number:04d}-full.png")) for number in range(2)])
    model = load_teacher(TeacherSpec(str(workplace / "pipeline")))
    theirs = own_images(workplace / "pipeline", noise_for(5, range(2), model), LABELS, 6, 1.5)
    assert theirs.std() > 20
    assert np.abs(made.astype(int) - theirs).max() <= 2
    receipt = json.loads((workplace / "r.json").read_text(encoding="utf-8"))
    assert receipt["decoder"]["images_at_a_time"] == 1
    assert receipt["compare"]["psnr_pixels_db"] != receipt["compare"]["psnr_db"]
    assert Image.open(workplace / "grid.png").width > 2 * 64


@pytest.mark.parametrize(
    ("where", "word"),
    [
        ("a", "nothing may be added to an artefact"),
        ("a/images", "nothing may be added"),
        ("x/y", "does not exist"),
        ("tiny.yaml", "no folder"),
    ],
)
def test_folders_that_cannot_be_written(workplace, where, word):
    is_one_paragraph(call(workplace, "sample.py", "a", "--labels", 1, "--out", "g.png", "--images", where), word)
    assert not (workplace / "g.png").exists()


def test_verify_tells_of_pixels(workplace):
    done = call(workplace, "verify.py", "a", "--images", 4, "--batch", 2, "--seed", 1)
    assert done.returncode == 0, done.stderr
    for word in (
        "psnr_db ",
        "ssim ",
        "psnr_pixels_db ",
        "ssim_pixels ",
        "decoded pixels, cached against full, 4 images",
        "rel_l2_decoder ",
    ):
        assert word in done.stdout
    report = json.loads(call(workplace, "verify.py", "a", "--images", 2, "--seed", 1, "--json").stdout)
    assert report["pixels"]["images"] == 2
    assert report["pixels"]["decoder_rel_l2"] < 1e-4


def test_report_measures_pixels(workplace):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        for extra, told in (((), True), (("--no-pixels",), False)):
            main(["report", "--images", "2", "--batch", "2", "--budgets", "2", "--policies", "fora", *extra])
            report = json.loads((read_run(find_run(Path("runs"))).folder / "report" / "report.json").read_text(encoding="utf-8"))
            page = (read_run(find_run(Path("runs"))).folder / "report" / "index.html").read_text(encoding="utf-8")
            assert ("PSNR dB, decoded pixels" in page) == told
            assert all((row["psnr_pixels_db"] is not None) == told for row in report["rows"])
            assert all((row["ssim_pixels"] is not None) == told for row in report["rows"])
    strip = next((read_run(find_run(workplace / "runs")).folder / "report" / "figures").glob("reference-run*.png"))
    assert Image.open(strip).height == 64


def test_latents_alone_and_vaes_of_others(workplace, tmp_path):
    done = call(workplace, "to_onnx.py", "--images", 1, "--out", tmp_path / "bare", "--no-pixels")
    assert done.returncode == 0, done.stderr
    assert "pixels  " not in done.stdout
    assert not list((tmp_path / "bare").glob("decoder*"))
    vae(16, **SD3_FACTORS).save_pretrained(tmp_path / "sixteen")
    done = call(workplace, "to_onnx.py", "--images", 1, "--out", tmp_path / "b", "--vae", tmp_path / "sixteen")
    is_one_paragraph(done, "latents of 16 channels, and the network makes 4")
    is_one_paragraph(call(workplace, "to_onnx.py", "--out", tmp_path / "b", "--vae", tmp_path), "no VAE in")
    assert not (tmp_path / "b").exists()
