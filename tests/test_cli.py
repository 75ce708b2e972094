"""The command line: every shipped config runs (on a tiny teacher, for a few steps), and what is wrong is said clearly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mdt_models import make_mdt, released
from PIL import Image

from data.captions import CAPTIONS, WIDTH, encode
from data.captions import TOKENS as TOKENS_OF_TEXT
from export import to_onnx
from export.runtime.manifest import read_manifest
from export.verify import verify
from tc_lightning.cli import main
from tc_lightning.learn.checkpointing import newest_valid_checkpoint
from tc_lightning.measure.scores import Scores
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, save_teacher
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.models.pixart import PixArt, PixArtConfig
from tc_lightning.models.sit import SiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.runs.folder import find_run, read_run

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "lightning_configs"
TINY = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=4, learn_sigma=False)
OVERLAY = """
model:
  init_args:
    teacher: {weights: tiny.safetensors, preset: null, input_size: null}
    num_steps: 6
    sensitivity_samples: 2
    policy: {init_args: {target_speedup: 1.5}}
data:
  init_args: {num_train: 16, num_val: 16}
trainer: {max_steps: 4, val_check_interval: 2}
"""
SEARCH = """
model:
  init_args:
    policy: {init_args: {evaluations: 3, front: [], fit_images: 2, judge_images: 2, final_images: 2, pool_images: 0}}
"""
TEACHERS = dict.fromkeys(("digits_flow.yaml", "sit_xl2_256.yaml"), "tiny_sit.safetensors") | {"mdtv2_xl2_256.yaml": "tiny_mdt.pt"}
TEACHERS |= {"digits_captions.yaml": "tiny_pixart.safetensors"}
READER = {"input_size": 8, "in_channels": 3, "out_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2}
SHORT = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a tiny teacher in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning"])
    (tmp_path / "tiny.yaml").write_text(OVERLAY, encoding="utf-8")
    (tmp_path / "search.yaml").write_text(SEARCH, encoding="utf-8")
    save_teacher(randomise_(DiT(TINY), seed=0), tmp_path / "tiny.safetensors")
    save_teacher(randomise_(SiT(TINY), seed=0), tmp_path / "tiny_sit.safetensors")
    reader = randomise_(PixArt(PixArtConfig(**READER, text_tokens=TOKENS_OF_TEXT, text_width=WIDTH)), seed=0)
    reader.nulls = encode([""])
    save_teacher(reader, tmp_path / "tiny_pixart.safetensors")
    torch.save(released(make_mdt()), tmp_path / "tiny_mdt.pt")
    return tmp_path


def distil(config: str, *extra: str) -> list[str]:
    """Arguments that shrink a distillation config to seconds."""
    search = ["-c", "search.yaml"] if "PlannerPolicy" in (CONFIGS / config).read_text(encoding="utf-8") else []
    teacher = ["--model.init_args.teacher.weights", TEACHERS[config]] if config in TEACHERS else []
    return ["fit", "-c", str(CONFIGS / config), "-c", "tiny.yaml", *search, *SHORT, *teacher, *extra]


TOKENS, ROUTER = {"importance_TLN": "importance.png"}, {"router_TL2": "router.png"}
LEARNED = {"digits.yaml": TOKENS | ROUTER, "digits_router.yaml": ROUTER, "digits_l2c.yaml": ROUTER, "dit_xl2_256.yaml": TOKENS}
LEARNED |= {"photos.yaml": TOKENS | ROUTER, "digits_flow.yaml": TOKENS, "sit_xl2_256.yaml": TOKENS, "mdtv2_xl2_256.yaml": TOKENS}
LEARNED |= {"digits_captions.yaml": TOKENS}


@pytest.mark.parametrize("config", LEARNED)
def test_distillation_configs_run_to_a_plan(config: str, workplace: Path) -> None:
    main(distil(config))
    run = read_run(find_run(Path("runs")))
    assert run.plan.exists()
    assert run.scores.exists()
    assert run.name == Path(config).stem
    assert {p.name for p in (run.folder / "figures").iterdir()} == {"sensitivity.png", *LEARNED[config].values()}
    scores = Scores.load(run.scores)
    assert (scores.router_TL2 is not None) == ("router_TL2" in LEARNED[config])
    assert (scores.importance_TLN.min() < 1) == ("importance_TLN" in LEARNED[config])


def test_a_run_with_a_content_predictor_is_found_and_exported(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(distil("digits_v2.yaml", "--model.init_args.policy.init_args.target_speedup", "1.15"))
    run = read_run(find_run(Path("runs")))
    plan = CachePlan.load(run.plan)
    assert run.name == "digits_v2"
    assert run.content == run.folder / "content.safetensors"
    assert plan.selector == Scores.load(run.scores).selector != ""
    monkeypatch.setattr(sys, "argv", ["to_onnx", "--images", "2"])
    to_onnx.main()
    assert read_manifest(Path("artefacts/digits_v2"))["selector"] == plan.selector
    report = verify(Path("artefacts/digits_v2"), "cpu", 2, 2, seed=1, quiet=True)
    assert report["rel_l2_export"] < 1e-4


def test_a_run_with_a_corrector_is_found_and_exported(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("target_speedup", "1.1"), ("fit_images", "2"), ("judge_images", "2"), ("progress", "false")
    main(distil("digits_corrector.yaml", *(part for name, n in few for part in (f"--model.init_args.policy.init_args.{name}", n))))
    run = read_run(find_run(Path("runs")))
    plan = CachePlan.load(run.plan)
    assert run.name == "digits_corrector"
    assert run.corrector == run.folder / "corrector.safetensors"
    assert plan.corrector
    monkeypatch.setattr(sys, "argv", ["to_onnx", "--images", "2"])
    to_onnx.main()
    assert read_manifest(Path("artefacts/digits_corrector"))["corrector"] == plan.corrector
    report = verify(Path("artefacts/digits_corrector"), "cpu", 2, 2, seed=1, quiet=True)
    assert report["rel_l2_export"] < 1e-4


def test_overlays_apply(workplace: Path) -> None:
    arguments = distil("digits.yaml", "--trainer.devices", "1")
    overlays = [part for name in ("ddp.yaml", "bf16.yaml") for part in ("-c", str(CONFIGS / name))]
    main([*arguments[:5], *overlays, *arguments[5:]])
    assert not torch.distributed.is_initialized()  # left to the end of the process, gloo's threads can abort it
    written = (find_run(Path("runs")) / "config.yaml").read_text(encoding="utf-8")
    assert "strategy: ddp" in written
    assert "precision: bf16-mixed" in written


def test_validate_and_test_run(workplace: Path) -> None:
    for command in ("validate", "test"):
        main([command, *distil("digits.yaml", "--trainer.limit_test_batches", "1")[1:]])
    assert not list(Path("runs").rglob("run.json"))  # planning belongs to fit


def teacher_arguments(config: str) -> list[str]:
    sizes, key = {"hidden_size": 32, "depth": 2, "num_heads": 2}, "shape" if "captions" in config else "dit"
    shape = [part for name, value in sizes.items() for part in (f"--model.init_args.{key}.{name}", str(value))]
    return ["fit", "-c", str(CONFIGS / config), *shape, *SHORT, "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]


@pytest.mark.parametrize(
    ("config", "kind"), [("digits_teacher.yaml", DiT), ("digits_flow_teacher.yaml", SiT), ("digits_captions_teacher.yaml", PixArt)]
)
def test_digits_teachers_train_and_show_samples(config: str, kind: type, workplace: Path) -> None:
    main(teacher_arguments(config))
    folder = Path("runs") / Path(config).stem / "version_0"
    rows = folder / "conditions.npz"
    teacher = load_teacher(TeacherSpec(str(folder / "teacher.safetensors"), conditions=str(rows) if rows.exists() else None))
    assert (type(teacher), teacher.config.hidden_size, rows.exists()) == (kind, 32, kind is PixArt)
    if kind is PixArt:
        assert teacher.examples is not None
        assert [len(value) for value in teacher.examples.values()] == [len(CAPTIONS)] * 2
        assert {name: value.tolist() for name, value in (teacher.nulls or {}).items()} == {
            n: v.tolist() for n, v in encode([""]).items()
        }
    assert Image.open(folder / "samples" / "step-000002.png").size[0] > 16 * 8


def test_data_whose_texts_are_not_the_models_are_refused_before_training(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*teacher_arguments("digits_captions_teacher.yaml"), "--model.init_args.shape.text_tokens", "6"])
    assert "text has the shape [95, 8, 32]: give [images, ...], fp32 of shape [6, 32]" in capsys.readouterr().err


def test_imagefolder_teacher_trains_and_feeds_distillation(workplace: Path) -> None:
    for i in range(12):
        folder = workplace / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 48), (20 * i, 80, 120)).save(folder / f"{i}.png")
    size = ["--model.init_args.dit.input_size", "8", "--data.init_args.size", "8", "--data.init_args.batch_size", "4"]
    main([*teacher_arguments("imagefolder_teacher.yaml"), *size, "--model.init_args.dit.num_classes", "2"])
    trained = next(Path("runs").rglob("teacher.safetensors"))
    own = ["--model.init_args.teacher.weights", str(trained), "--model.init_args.guidance_channels", "2"]
    main([*distil("digits.yaml"), *own, "--model.init_args.router", "null"])  # so little trained, its blocks still do nothing
    assert read_run(find_run(Path("runs"))).teacher.weights == str(trained.absolute())


def test_unknown_key_is_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*distil("digits.yaml"), "--model.init_args.no_such_key", "1"])
    assert stop.value.code == 2
    assert "no_such_key" in capsys.readouterr().err


def test_missing_teacher_is_one_paragraph(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*distil("digits.yaml"), "--model.init_args.teacher.weights", "absent.pt"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "absent.pt" in message
    assert "Traceback" not in message


def test_resume_passes_over_a_damaged_checkpoint(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(distil("digits.yaml"))
    folder = Path("runs/digits/version_0/checkpoints")
    newest = newest_valid_checkpoint(folder)
    assert newest is not None
    damaged = folder / "zz.ckpt"
    damaged.write_bytes(newest.read_bytes()[:1000])
    capsys.readouterr()
    main([*distil("digits.yaml", "--ckpt_path", "last"), "--trainer.max_steps", "6"])
    told = capsys.readouterr().out
    assert "zz.ckpt" in told
    assert "resuming from" in told
    state = torch.load(Path("runs/digits/version_1/checkpoints/last.ckpt"), weights_only=True)
    assert state["global_step"] == 6


def test_resume_with_nothing_to_resume_starts_afresh(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*distil("digits.yaml"), "--ckpt_path", "last"])
    assert "starting afresh" in capsys.readouterr().out
    assert find_run(Path("runs")).name == "version_0"


@pytest.mark.parametrize("logger", ["false", "true"])
def test_resume_without_a_logger_of_ones_own(workplace: Path, capsys: pytest.CaptureFixture[str], logger: str) -> None:
    """A newer checkpoint of another configuration in the same working directory is not taken."""
    arguments = [*teacher_arguments("digits_teacher.yaml"), "--trainer.logger", logger]
    main(arguments)
    foreign = Path("runs/another/version_0/checkpoints/last.ckpt")
    foreign.parent.mkdir(parents=True)
    torch.save({"state_dict": {}}, foreign)
    capsys.readouterr()
    main([*arguments, "--ckpt_path", "last", "--trainer.max_steps", "4"])
    told = capsys.readouterr().out
    assert f"resuming from {'checkpoints' if logger == 'false' else 'lightning_logs'}" in told


def test_resume_looks_where_checkpoints_are_told_to_go(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("kept.yaml").write_text(
        "trainer: {logger: false, callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint, "
        "init_args: {dirpath: kept, save_last: true, every_n_train_steps: 2}}]}\n",
        encoding="utf-8",
    )
    arguments = teacher_arguments("digits_teacher.yaml")
    arguments[3:3] = ["-c", "kept.yaml"]
    main([*arguments, "--ckpt_path", "last"])
    assert "no checkpoint under kept to resume from: starting afresh" in capsys.readouterr().out
    main([*arguments, "--ckpt_path", "last", "--trainer.max_steps", "4"])
    assert "resuming from kept/" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["lightning"], ["tc-lightning"], [sys.executable, "-m", "tc_lightning"]])
def test_three_names_are_one_command(command: list[str]) -> None:
    if len(command) == 1:
        command = [str(Path(sys.executable).parent / command[0])]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "fit" in told
    assert "validate" in told
