from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import EVERY_MODE, make_plan, vp_sampler
from test_commands import call, is_one_paragraph, make_run

from export.bench.random_values import random_values
from export.bench.shapes import RELEASED, random_network
from export.bench.timing import asked_in_torch, in_turns, operator_ms, torch_latents
from export.runtime.sampler import CachedSampler
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.plan.given import checked, drawn
from tc_lightning.plan.guidance import Guidance
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample


@pytest.mark.parametrize(("sampler", "guidance"), [("ddim", Guidance(1.5, 3)), ("dpmpp_2m", Guidance()), ("dpmpp_3m", Guidance())])
def test_the_torch_baseline_is_full_compute(teacher, sampler, guidance):
    reference = vp_sampler(sampler, 6)
    labels = torch.tensor([0, 3])
    x = noise_for(0, range(2), teacher)
    for plan in (make_plan(teacher, EVERY_MODE, guidance, sampler), make_plan(teacher, EVERY_MODE, guidance, reference=reference)):
        expected = sample(teacher, full_plan(plan.model, plan.reference, guidance), x, labels)
        assert torch.equal(torch_latents(teacher.eps, plan, x, labels, torch.float32), expected)


def test_requests_run_in_turns_after_a_warm_up():
    seen: list[str] = []
    seconds = in_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, repeats=2, quiet=True)
    assert seen == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}


def test_time_by_operator(artefact, tmp_path):
    sampler = CachedSampler(artefact, profile=tmp_path / "profile")
    sampler.sample([0, 1])
    table = operator_ms(sampler)
    assert set(table) == {"condition", *(bound["program"] for bound in sampler.manifest["schedule"])}
    for program, spent in table.items():
        assert spent["FusedMatMul"] > 0, program
        assert list(spent.values()) == sorted(spent.values(), reverse=True)
    assert list(tmp_path.iterdir()) == []


def test_command_on_a_run(tmp_path: Path):
    make_run(tmp_path)
    arguments = ("--run", "runs/tiny/version_0", "--batch", 1, 2, "--repeats", 1, "--no-torch", "--operators", "--json", "out.json")
    done = call(tmp_path, "benchmark.py", *arguments)
    assert done.returncode == 0, done.stderr
    reports = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [(r["model"], r["batch"], r["steps"]) for r in reports] == [("tiny", 1, 5), ("tiny", 2, 5)]
    full, plan = reports[1]["rows"]
    assert (full["name"], full["wall_speedup"], full["macs_speedup"]) == ("ONNX Runtime, full", 1.0, 1.0)
    assert plan["wall_speedup"] == pytest.approx(full["ms_per_image"] / plan["ms_per_image"])
    assert plan["efficiency"] == pytest.approx(plan["wall_speedup"] / plan["macs_speedup"])
    assert 0 < plan["loaded_mb"] < plan["peak_mb"]
    assert "FusedMatMul" in reports[0]["operators_ms"]["plan"]["step_00"]
    assert "efficiency" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "runs", "teacher.safetensors"]


@pytest.mark.parametrize("name", ["DiT-S/8", *RELEASED])
def test_shapes_with_random_weights_have_all_that_a_request_needs(name: str) -> None:
    """Of each family: full compute in torch as the benchmark runs it, against the sampler, with the null values that it stores."""
    model = random_network(name, input_size=8, depth=6)
    plan = full_plan(model_signature(model), make_sampler(model.schedule, "ddim", 2), Guidance(1.5, 3))
    given = drawn(model.conditions, 0, range(2), model.examples)
    asked = asked_in_torch(model, plan, given, "cpu", torch.float32)
    x = noise_for(0, range(2), model)
    torch.testing.assert_close(torch_latents(model.eps, plan, x, asked, torch.float32), sample(model, plan, x, asked))
    assert model.config.depth == 6
    assert sample(model, plan, x, asked).std() > 0.1


def test_random_values_are_what_conditions_can_be() -> None:
    conditions = random_network("PixArt-XL/2", 8, 1).conditions
    values = random_values(conditions, 3)
    assert checked(conditions, values).keys() == values.keys()
    assert values["text_mask"][0].tolist() == [1] * 60 + [0] * 60


def test_bad_arguments(tmp_path: Path):
    is_one_paragraph(call(tmp_path, "benchmark.py", "--run", "gone"), "gone is not a finished run")
    is_one_paragraph(call(tmp_path, "benchmark.py", "--presets", "DiT-Q/2"), "unknown preset 'DiT-Q/2'")
    is_one_paragraph(call(tmp_path, "benchmark.py", "--presets", "PixArt"), "unknown preset 'PixArt'")
    is_one_paragraph(call(tmp_path, "benchmark.py", "--presets", "DiT-S/8", "--full-steps", 99), "cannot be spread")
