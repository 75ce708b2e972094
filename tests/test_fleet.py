"""The fleet command: images a GPU-hour on paper, seconds of a batch from measurements, and what it says of impossible arguments."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from conftest import FULL, make_plan, make_teacher
from test_commands import call, is_one_paragraph

from export.bench.benchmark_report import BenchmarkRow
from export.bench.fleet.measured import measured_line
from export.bench.fleet.paper import RELEASED, Gpu, Shape, images_an_hour, paper_table, rounded
from export.benchmark import FULL as FULL_COMPUTE
from export.command import run
from export.fleet import main
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.dit import preset
from tc_lightning.models.families import build
from tc_lightning.models.pixart import PixArtConfig
from tc_lightning.models.sd3 import SD3Config
from tc_lightning.plan.costs import full_step_macs, macs_speedup
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import skip

NETWORKS = {
    "DiT-XL/2 256": ("dit", preset("DiT-XL/2"), 32),
    "DiT-XL/2 512": ("dit", preset("DiT-XL/2"), 64),
    "PixArt-XL/2 512": ("pixart", PixArtConfig(), 64),
    "SD3-medium 1024": ("sd3", SD3Config(), 128),
}


@pytest.mark.parametrize("shape", RELEASED, ids=lambda shape: shape.name)
def test_macs_of_released_shapes_are_those_of_the_networks(shape):
    family, config, size = NETWORKS[shape.name]
    with torch.device("meta"):
        network = build(family, dataclasses.asdict(config) | {"input_size": size})
    assert shape.step_macs == full_step_macs(network.signature("0" * 64))


def test_images_an_hour_by_hand():
    """1 GMAC is 2 GFLOP; 10 steps of two samples are 40 GFLOP; 100 TFLOP/s by 0.5 make 1,250 images a second."""
    shape, gpu = Shape("a", 1e9, 10), Gpu(100, 0.5)
    assert images_an_hour(shape, gpu) == pytest.approx(1250 * 3600)
    assert images_an_hour(shape, gpu, 3) == pytest.approx(3 * 1250 * 3600)
    assert images_an_hour(dataclasses.replace(shape, doubled=False), gpu) == pytest.approx(2 * 1250 * 3600)


def test_a_table_of_shapes():
    *_, line = paper_table([Shape("a", 1e9, 10)], Gpu(100, 0.5), [2.0]).splitlines()
    assert line == "| a | 0.001 | 10 | 2 | 4,500,000 | 9,000,000 |"
    assert [rounded(images) for images in (60029.8, 2861.4, 99.96, 7.123)] == ["60,000", "2,860", "100", "7.12"]


def reports(*points: tuple[int, float], model: str = "tiny", name: str = FULL_COMPUTE) -> list[dict]:
    """As export/benchmark.py writes them: of each size of batch the seconds of a batch."""
    about = {"model": model, "precision": "fp32", "provider": "cpu"}
    return [{**about, "batch": b, "rows": [dataclasses.asdict(BenchmarkRow(name, 1e3 * s / b, 1.0))]} for b, s in points]


def written(path, content) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("points", "line"),
    [
        (((1, 0.5), (4, 1.1), (16, 3.5)), (0.3, 0.2)),
        (((1, 1.0), (2, 2.0)), (0.0, 1.0)),
        (((1, 1.0), (2, 3.0)), (0.0, 7 / 5)),  # a line through both would start below 0: least squares through 0 instead
    ],
)
def test_a_line_through_what_was_measured(tmp_path, points, line):
    written(path := tmp_path / "measured.json", reports(*points))
    assert measured_line(path, FULL_COMPUTE) == pytest.approx(line)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (reports((1, 0.5)), "batches of one size only"),
        (reports((1, 0.5), (4, 0.4)), "took no longer than smaller ones"),
        (reports((1, 0.5), (4, 1.1), name="skip"), "choose one of skip with --row"),
        ([], "choose one of none"),
        (reports((1, 0.5)) + reports((4, 0.5), model="other"), "is of 2 models"),
        (reports((1, -0.5), (4, 1.1)), "is not what"),
        (reports((1, math.nan), (4, 1.1)), "is not what"),
        ({"batch": 1}, "is not what"),
        (None, "is not what"),
        ([{"batch": 1, "rows": []}], "KeyError"),
    ],
)
def test_files_that_tell_no_line(tmp_path, content, words):
    written(path := tmp_path / "measured.json", content)
    with pytest.raises(TokenCacheError, match=words):
        measured_line(path, FULL_COMPUTE)


def test_paper_needs_no_torch_and_tells_of_a_plan(tmp_path):
    plan = make_plan(make_teacher(), (FULL, FULL, (skip(0, 4, 1),), FULL, (skip(0, 4, 1),)), Guidance(1.5, 3), policy="test")
    plan.save(tmp_path / "plan.json")
    done = call(
        tmp_path, "fleet.py", "paper", "--plan", tmp_path, "plan.json", "--gmacs", 100, "--share", 0.25, "--speedup", 2, deployed=True
    )
    assert done.returncode == 0, done.stderr
    assert "989 TFLOP/s, of which 25% is assumed to be reached" in done.stdout
    assert f"| yours | 0.100 | 50 | 2 | {rounded(3600 * 989e12 * 0.25 / 2e13)} |" in done.stdout
    shape = Shape("own", full_step_macs(plan.model), 5)
    own = f"as planned, {macs_speedup(plan):.2f}x: {rounded(images_an_hour(shape, Gpu(share=0.25), macs_speedup(plan)))}\n"
    assert done.stdout.count(own) == 2


def test_queue_is_the_same_each_time(tmp_path):
    written(tmp_path / "measured.json", reports((1, 0.5), (4, 1.1)))
    asked = ("fleet.py", "queue", "--mix", "a:0.9", "b:0.1:3", "--rows", 2000)
    first = call(tmp_path, *asked, "--measured", "measured.json", deployed=True)
    assert first.returncode == 0, first.stderr
    assert "Without batching it does 1.67 rows a second" in first.stdout  # 0.5 s of nine rows in ten, 1.5 s of the tenth
    assert first.stdout.count("\n| ") == 2 + 2 * 4
    assert call(tmp_path, *asked, "--fixed-ms", 300, "--each-ms", 200, deployed=True).stdout == first.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("paper", "--share", 1.5), "a share of 1.5 of the peak cannot be reached"),
        (("paper", "--peak-tflops", 0), "a peak of 0.0 TFLOP/s"),
        (("paper", "--speedup", 0.5), "a speed-up of 0.5 cannot be"),
        (("paper", "--gmacs", "nan"), "yours: nan MACs"),
        (("paper", "--plan", "nowhere.json"), "cannot read the plan nowhere.json"),
        (("queue",), "how long does a batch take"),
        (("queue", "--fixed-ms", 1), "how long does a batch take"),
        (("queue", "--fixed-ms", 1, "--each-ms", 1, "--measured", "a.json"), "and not both"),
        (("queue", "--fixed-ms", 1, "--each-ms", 1, "--queue", 4), "a queue of 4 rows never holds a batch of 16"),
        (("queue", "--fixed-ms", 1, "--each-ms", 1, "--mix", "a", "a"), "each but once"),
        (("queue", "--fixed-ms", 1, "--each-ms", 1, "--rates", -1), "a rate of -1.0 rows a second"),
    ],
)
def test_impossible_arguments_are_one_paragraph(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fleet.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert words in told


def test_an_error_is_told_on_the_command_line(tmp_path):
    is_one_paragraph(call(tmp_path, "fleet.py", "paper", "--share", 2, deployed=True), "a share of 2.0")
