"""The acceptance command: its rehearsal as a user runs it, stages that fail in every way, and what is made of the record."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import export
from export.bench.acceptance.benchmark_table import BEGIN, END
from export.bench.acceptance.journal import NAME, Journal, Line, Record
from export.bench.acceptance.outcome import exit_code, summary
from export.bench.acceptance.replays import between_steps
from export.bench.acceptance.reporter import Findings, NotHere, Reporter, TooLate
from export.bench.acceptance.sizes import REHEARSAL
from export.bench.acceptance.stages import STAGES
from export.bench.acceptance.steadiness import rise
from export.bench.acceptance.subjects import random_teacher
from tc_lightning.errors import TokenCacheError

SCRIPT = Path(export.__file__).with_name("acceptance.py")
BENCHMARKS = SCRIPT.with_name("BENCHMARKS.md")


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def acceptance(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=1000)


def verdicts(record: Record) -> dict[int, str]:
    """The verdict of each stage that was asked for."""
    outcomes = {number: record.outcome(number) for number in record.asked["stages"]}
    return {number: "missing" if line is None else line.verdict for number, line in outcomes.items()}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The command on the CPU, all of it; on a machine that has much else to do it may take its time."""
    folder = tmp_path_factory.mktemp("rehearsal")
    return folder, acceptance("--provider", "cpu", "--minutes", 15, "--out", folder)


# The command


def test_the_rehearsal_covers_every_stage(rehearsal):
    folder, done = rehearsal
    record = Journal(folder).read()
    assert verdicts(record) == dict.fromkeys(range(1, len(STAGES) + 1), "held"), done.stdout
    assert done.returncode == 0
    assert {line.stage for line in record.lines if line.part and line.held} == set(verdicts(record))
    for stage in STAGES:
        assert f"stage {stage.number} of {len(STAGES)}, {stage.name}" in done.stdout
    assert "0 fell short, 0 were cut off" in done.stdout


def test_what_the_rehearsal_cannot_see_is_said(rehearsal):
    unseen = {line.part: line.reason for line in Journal(rehearsal[0]).read().lines if line.verdict == "not looked at"}
    assert unseen.pop("CUDA graphs") == "the provider is the CPU"
    assert "no kernels for bf16" in unseen.pop("bf16, parity")
    assert "no CUDA graph" in unseen.pop("calls of CUDA between steps")
    assert "scratch memory" in unseen.pop("memory between steps")
    assert set(unseen) <= {"fp32, batch 2, torch.compile"}  # a machine may have no C++ compiler


def test_only_the_record_and_the_logs_are_left(rehearsal):
    logs = {f"{stage.number}_{stage.name}.log" for stage in STAGES}
    assert {path.name for path in rehearsal[0].iterdir()} == logs | {NAME}


def test_stages_that_raise_hang_or_are_killed_leave_the_others_alone(tmp_path):
    plants = ("2=hang", "5=raise", "6=kill")
    done = acceptance("--out", tmp_path, "--minutes", 1.5, "--stages", 2, 5, 6, 7, "--plant", *plants)
    record = Journal(tmp_path).read()
    assert verdicts(record) == {2: "cut off", 5: "FELL SHORT", 6: "FELL SHORT", 7: "held"}, done.stdout
    assert done.returncode == 3
    reasons = [record.outcome(number).reason for number in (2, 5, 6)]
    for reason, words in zip(reasons, ("its time was over", "RuntimeError: planted", "SIGKILL"), strict=True):
        assert words in reason
        assert words in done.stdout
    assert "_hang" in (tmp_path / "2_precisions.log").read_text(encoding="utf-8")  # where it stood


def test_a_run_that_is_cut_off_tells_what_it_got_to(tmp_path):
    done = acceptance("--out", tmp_path, "--minutes", 0.05, "--stages", 2, 5, 7, "--plant", "2=hang")
    assert done.returncode == 4
    lines = [json.loads(line) for line in (tmp_path / NAME).read_text(encoding="utf-8").splitlines()]
    assert lines[0]["run"]["stages"] == [2, 5, 7]
    assert [line["stage"] for line in lines[1:] if not line["part"]] == [2, 5, 7]
    assert set(verdicts(Journal(tmp_path).read()).values()) == {"cut off"}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_stage_and_keeps_the_record(tmp_path, how):
    """Also where SIGINT is ignored to begin with, as a shell has it for what it starts in the background."""
    with subprocess.Popen(
        command("--out", tmp_path, "--stages", 3, 5, "--plant", "3=hang"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout.readline().startswith("stage 3")
        while not (tmp_path / "3_replays.log").exists():
            assert process.poll() is None
        process.send_signal(how)
        rest = process.stdout.read()
    assert process.returncode == 4, rest
    assert [line.reason for line in Journal(tmp_path).read().lines] == ["the run was interrupted"] * 2
    assert not (tmp_path / "scratch-3").exists()


def test_cuda_where_there_is_none(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = acceptance("--provider", "cuda", "--out", tmp_path, "--minutes", 2)
    record = Journal(tmp_path).read()
    assert done.returncode == 3
    assert verdicts(record) == {1: "FELL SHORT"} | dict.fromkeys(range(2, len(STAGES) + 1), "not looked at")
    [provider] = [line for line in record.parts(1) if line.part == "provider"]
    assert "cuda was asked for" in provider.reason
    assert provider.reason in done.stdout
    assert "not run: the provider cannot be used here" in record.outcome(2).reason


@pytest.mark.parametrize(
    "arguments", [("--minutes", "0"), ("--minutes", "soon"), ("--stages", "8"), ("--provider", "tpu"), ("--plant", "1=explode")]
)
def test_arguments_that_make_no_sense(tmp_path, arguments):
    assert acceptance("--out", tmp_path, *arguments).returncode == 2
    assert list(tmp_path.iterdir()) == []


# Rendering


def test_render_prints_tables(rehearsal):
    done = acceptance("--out", rehearsal[0], "--render")
    assert done.returncode == 0, done.stderr
    for words in ("| 2 precisions, fp32, parity | held |", "| **7 marked_tests** | held |", "| skip |", "efficiency", "CPU, "):
        assert words in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| stage")]
    assert len(rows) == 1


def test_render_puts_tables_between_the_marks(rehearsal, tmp_path):
    path = tmp_path / "BENCHMARKS.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert acceptance("--out", rehearsal[0], "--render", path).returncode == 0
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert text.count("| **1 environment** | held |") == 1


def test_the_benchmarks_have_the_marks():
    text = BENCHMARKS.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index(BEGIN) < text.index(END)


def test_render_without_a_record_or_without_marks(rehearsal, tmp_path):
    done = acceptance("--out", tmp_path / "nowhere", "--render")
    assert (done.returncode, "does not exist" in done.stderr) == (2, True)
    (tmp_path / "plain.md").write_text("text\n", encoding="utf-8")
    done = acceptance("--out", rehearsal[0], "--render", tmp_path / "plain.md")
    assert (done.returncode, "has no lines" in done.stderr) == (2, True)
    assert (tmp_path / "plain.md").read_text(encoding="utf-8") == "text\n"


# What a stage tells


@pytest.fixture
def journal(tmp_path) -> Iterator[Journal]:
    journal = Journal(tmp_path)
    journal.begin({"provider": "cpu", "minutes": 1.0, "stages": [1]})
    return journal


def test_a_part_that_fails_leaves_the_others(journal):
    report = Reporter(journal, STAGES[0], seconds=60)
    with report.part("raises") as found:
        found.at_most("figure", 1.0, 2.0)
        raise ValueError("what it says\nand more")
    with report.part("holds") as found:
        found.at_most("figure", 1.0, 2.0)
    with report.part("falls short") as found:
        found.at_least("figure", 1.0, 2.0)
        found.at_most("other", math.nan, 2.0)
    with report.part("tells") as found:
        found.figures["infinite"] = math.inf
    with report.part("elsewhere"):
        raise NotHere("no such thing")
    with report.part("late"):
        report.need(61)
    with report.part("extra"):
        report.need(61, extra=True)
    found = {line.part: (line.held, line.cut, line.reason) for line in journal.read().lines}
    assert found["raises"] == (False, False, "ValueError: what it says")
    assert found["holds"] == (True, False, "")
    assert found["falls short"] == (False, False, "figure is 1, below 2; other is nan, above 2")
    assert found["tells"] == (None, False, "figures alone")
    assert found["elsewhere"] == (None, False, "no such thing")
    assert found["late"][:2] == (None, True)
    assert found["extra"][:2] == (None, False)
    assert journal.read().lines[3].figures == {"infinite": "inf"}


def test_an_interrupt_is_no_finding(journal):
    with pytest.raises(KeyboardInterrupt), Reporter(journal, STAGES[0], 1).part("interrupted"):
        raise KeyboardInterrupt
    assert journal.read().lines == ()


def test_a_line_that_was_being_written_does_not_count(journal):
    journal.add(Line(1, "environment", "versions", True))
    with journal.path.open("a", encoding="utf-8") as file:
        file.write('{"stage": 1, "name": "envi')
    assert [line.part for line in journal.read().lines] == ["versions"]
    journal.add(Line(1, "environment", "", False, "its process was killed"))
    assert [line.reason for line in journal.read().lines] == ["", "its process was killed"]


@pytest.mark.parametrize("text", ["", "{}\n", "[]\n", "nonsense\n", '{"run": {}}\n{"stage": 1}\n'])
def test_a_file_that_is_no_record(journal, text):
    journal.path.write_text(text, encoding="utf-8")
    with pytest.raises(TokenCacheError, match="no record of an acceptance run"):
        journal.read()


@pytest.mark.parametrize(
    ("held", "cut", "code"),
    [
        ((True, True), (False, False), 0),
        ((True, None), (False, False), 0),
        ((True, None), (False, True), 4),
        ((False, None), (False, True), 3),
        ((False, True), (False, False), 3),
    ],
)
def test_exit_codes(held, cut, code):
    lines = tuple(Line(j + 1, "name", "", h, "why", cut=c) for j, (h, c) in enumerate(zip(held, cut, strict=True)))
    assert exit_code(Record({"stages": [1, 2]}, lines)) == code


def test_a_stage_that_was_not_got_to_counts_as_cut_off():
    record = Record({"provider": "cpu", "stages": [1, 2]}, (Line(1, "environment", "", True),))
    assert exit_code(record) == 4
    assert "2 was not got to" in summary(record)


# Figures


def test_between_steps_by_hand():
    calm = ["cudaMemcpyAsync", "cudaGraphLaunch", "cudaEventRecord", "cudaGraphLaunch", "cudaStreamSynchronize"]
    found = Findings()
    between_steps(found, calm)
    assert (found.short, found.figures["launches"]) == ([], 2)
    for wrong in ("cudaStreamSynchronize", "cudaMalloc", "cudaFreeAsync", "cudaMemcpyAsync", "cuMemAllocHost_v2"):
        found = Findings()
        between_steps(found, [*calm[:2], wrong, *calm[2:]])
        assert len(found.short) == 1, wrong
    with pytest.raises(NotHere, match="no CUDA graph"):
        between_steps(Findings(), ["cudaLaunchKernel"])


def test_rise_by_hand():
    assert rise([0.0, 50.0, 60.0, 60.0, 60.0, 60.0]) == 0.0  # what warms up does not count
    assert rise([0.0, 50.0, 60.0, 62.0, 64.0, 66.0]) == 4.0
    assert rise([0.0, 50.0, 70.0, 60.0, 60.0, 60.0]) == -10.0


def test_random_weights_are_wholly_on_their_device():
    model = random_teacher(REHEARSAL, "meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_too_late_is_told_with_its_seconds(journal):
    with pytest.raises(TooLate, match="about 90 s"):
        Reporter(journal, STAGES[0], seconds=1).need(90)
