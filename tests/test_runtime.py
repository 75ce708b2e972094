from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from conftest import FULL, make_plan, make_teacher, vp_sampler

from export.compiler.compile import export_artefact
from export.runtime.manifest import ArtefactError, _self_digest, read_manifest, sha256_of
from export.runtime.request import outside_the_fit
from export.runtime.sampler import CachedSampler
from export.runtime.sessions import RuntimeUnavailableError, packed_graphs
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.costs import cache_bytes_per_image
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import skip

LABELS = [0, 3, 1]


@pytest.fixture(scope="session")
def sampler(artefact: Path) -> CachedSampler:
    """A loaded artefact; tests must not change its manifest."""
    return CachedSampler(artefact)


@pytest.fixture(scope="session")
def unguided(tmp_path_factory) -> Path:
    """Without guidance, three channels, two of three steps skipped."""
    out = tmp_path_factory.mktemp("artefacts") / "unguided"
    teacher = make_teacher(in_channels=3, output="pixels")
    plan = make_plan(teacher, (FULL, (skip(0, 4),), (skip(0, 4),)), Guidance())
    export_artefact(teacher, plan, out, "fp32", "cpu", images=1, report=lambda _: None)
    return out


@pytest.fixture
def copied(artefact: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(artefact, tmp_path / "copy"))


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b))


# Integrity


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["weights.data", "condition.onnx", "step_00.onnx", "step_full.onnx", "plan.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip_a_bit, "is damaged: its sha256"), (truncate, "it is truncated or replaced"), (Path.unlink, "is missing")],
)
def test_damaged_files_are_named(copied, name, damage: Callable[[Path], None], message):
    damage(copied / name)
    with pytest.raises(ArtefactError, match=f"{name} .*{message}|{name} {message}") as caught:
        CachedSampler(copied)
    assert "Export it again" in str(caught.value)


def test_no_manifest(copied, tmp_path):
    (copied / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match=r"holds no manifest\.json"):
        CachedSampler(copied)
    with pytest.raises(ArtefactError, match="nowhere does not exist"):
        CachedSampler(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[]", "is not of format version 6"),
        ('{"format_version": 5}', "is not of format version 6"),
        ('{"format_version": 6}', "was edited or damaged"),
        ('{"format_version": true}', "is not of format version 6"),
        ('{"format_version": 7}', "is of format version 7, which is newer than this package's 6: update tc-lightning"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_damaged_manifest(copied, text, message):
    (copied / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtefactError, match=rf"manifest\.json {message}"):
        CachedSampler(copied)


@pytest.mark.parametrize("files", [[], None, {}, {"weights.data": 3}, {"weights.data": {"bytes": 1}}])
def test_damaged_file_list(copied, files):
    """A list that leaves out a file would leave it unchecked."""
    rewrite_manifest(copied, files=files)
    with pytest.raises(ArtefactError, match=r"manifest\.json"):
        CachedSampler(copied)


@pytest.mark.parametrize("name", ["weights.data", "condition.onnx", "step_00.onnx", "plan.json"])
def test_a_file_that_is_not_listed_is_not_trusted(copied, name):
    files = read_manifest(copied)["files"]
    del files[name]
    rewrite_manifest(copied, files=files)
    with pytest.raises(ArtefactError, match=rf"manifest\.json.*{name}"):
        CachedSampler(copied)


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """With a digest of its own that fits, as a careless tool would."""
    manifest = read_manifest(folder, check_files=False) | changes
    manifest["sha256"] = _self_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_edited_manifest_is_refused(copied):
    text = (copied / "manifest.json").read_text(encoding="utf-8")
    (copied / "manifest.json").write_text(text.replace('"steps": 8', '"steps": 7'), encoding="utf-8")
    with pytest.raises(ArtefactError, match="was edited or damaged"):
        CachedSampler(copied)


# Requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [0, 5]}, "label 5 is not a class: this artefact has classes 0 to 4"),
        ({"labels": [-1]}, "label -1 is not a class"),
        ({"labels": [1.5]}, "label 1.5 is not a class"),
        ({"labels": ["3"]}, "label '3' is not a class"),
        ({"labels": [True]}, "label True is not a class"),
        ({"labels": [0], "seed": 1.5}, "seed 1.5 is out of range"),
        ({"labels": [0, 1], "first_index": 2**63 - 2}, "first_index .* is out of range"),
        ({"labels": []}, "no labels were given"),
        ({"labels": [0], "guidance": float("nan")}, "guidance nan"),
        ({"labels": [0], "guidance": float("inf")}, "guidance inf"),
        ({"labels": [0], "seed": -1}, "seed -1 is out of range"),
        ({"labels": [0], "seed": 2**63}, "is out of range"),
        ({"labels": [0], "first_index": -1}, "first_index -1 is out of range"),
    ],
)
def test_requests_that_are_refused(sampler, arguments, message):
    with pytest.raises(TokenCacheError, match=message):
        sampler.sample(**arguments)


def test_guidance_that_was_not_exported(unguided):
    sampler = CachedSampler(unguided)
    with pytest.raises(TokenCacheError, match=r"guidance 2 was asked for, but this artefact was planned at scale 1"):
        sampler.sample([0], guidance=2.0)
    assert np.array_equal(sampler.sample([0], guidance=1.0).latents, sampler.sample([0]).latents)


def test_seeds(sampler):
    first, again, other = (sampler.sample(LABELS, seed=seed).latents for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not close(first, other)
    assert sampler.sample([1], seed=2**63 - 1).latents.shape == (1, 4, 8, 8)


def test_an_image_does_not_depend_on_its_batch(sampler):
    together = sampler.sample(LABELS, seed=7).latents
    for i, label in enumerate(LABELS):
        assert close(sampler.sample([label], seed=7, first_index=i).latents[0], together[i])
    others = sampler.sample([4, 3, 4], seed=7).latents
    assert close(others[1], together[1])
    assert not close(others[0], together[0])
    assert not close(sampler.sample([0], seed=7, first_index=1).latents[0], together[0])


def test_large_requests_are_split(artefact, sampler):
    labels = [0, 3, 1, 4, 2]
    seen: list[tuple[int, int]] = []
    split = CachedSampler(artefact, max_batch=2).sample(labels, seed=7, on_step=lambda done, total: seen.append((done, total)))
    whole = sampler.sample(labels, seed=7)
    assert all(close(a, b) for a, b in zip(split.latents, whole.latents, strict=True))
    assert seen == [(i, 24) for i in range(1, 25)]
    assert split.receipt["parts"] == 3
    assert split.receipt["labels"] == labels
    assert {n: 3 * count for n, count in whole.receipt["steps_per_program"].items()} == split.receipt["steps_per_program"]
    assert split.receipt["blocks_x_tokens_share"] == whole.receipt["blocks_x_tokens_share"]
    assert split.receipt["cache_bytes"] == 2 / 5 * whole.receipt["cache_bytes"]
    for wrong in (0, 1.5):
        with pytest.raises(TokenCacheError, match="max_batch"):
            CachedSampler(artefact, max_batch=wrong)


@pytest.mark.parametrize("memory", [1.0, 100.0])
def test_packed_weights_give_the_same(artefact, sampler, memory):
    assert close(CachedSampler(artefact, memory=memory).sample(LABELS, seed=7).latents, sampler.sample(LABELS, seed=7).latents)


def test_which_graphs_get_a_copy_of_their_weights():
    """Weights 6 + 3 (conditioning). Full reads 6 in 4 steps, a 2 in 6 steps, b 6 in 1 step."""
    entries = {"w0": 2, "w1": 2, "w2": 2, "c": 3}
    offsets = {"w0": 0, "w1": 2, "w2": 4, "c": 6}
    every = ["w0", "w1", "w2"]
    manifest = {
        "weights": {name: ["fp32", [size], offsets[name], size] for name, size in entries.items()},
        "condition": {"weights": ["c"]},
        "programs": {name: {"graph": name, "weights": every} for name in ("full", "b")} | {"a": {"graph": "a", "weights": ["w1"]}},
        "schedule": [{"program": name} for name in ("full",) * 4 + ("a",) * 6],
    }
    assert packed_graphs(manifest, 1.0) == {"step_full"}  # full's copy, 6, leaves no room for what a maps
    assert packed_graphs(manifest, 11 / 9) == {"full", "a", "step_full"}  # 6 + 2 copied, 3 mapped
    manifest["schedule"].append({"program": "b"})
    assert packed_graphs(manifest, 11 / 9) == {"a", "step_full"}  # 2 copied, all 9 mapped: a copy of 6 has no room
    assert packed_graphs(manifest, 16 / 9) == {"full", "step_full"}  # 6 copied, 9 mapped
    assert packed_graphs(manifest, 17 / 9) == {"full", "a", "b", "step_full"}  # 14 copied, 3 mapped
    manifest["programs"]["b"]["graph"] = "full"
    assert packed_graphs(manifest, 11 / 9) == {"full", "a", "step_full"}  # b shares full's copy


@pytest.mark.parametrize("memory", [0.5, float("nan")])
def test_memory_that_makes_no_sense(artefact, memory):
    with pytest.raises(TokenCacheError, match="give 1 or more"):
        CachedSampler(artefact, memory=memory)


def test_images(sampler, unguided):
    result = sampler.sample([0])
    assert result.images is None  # a model of latents
    assert result.latents.dtype == np.float32
    pixels = CachedSampler(unguided).sample([0])
    assert np.abs(pixels.latents).max() > 1
    assert np.array_equal(pixels.images, np.clip(pixels.latents, -1, 1))


# Receipts


def test_receipt(sampler, plan, artefact):
    receipt = sampler.sample(LABELS, seed=7, first_index=2).receipt
    json.dumps(receipt)
    schedule = [b["program"] for b in sampler.manifest["schedule"]]
    assert receipt["steps_per_program"] == {name: schedule.count(name) for name in set(schedule)}
    assert sum(receipt["steps_per_program"].values()) == plan.num_steps
    assert receipt["cache_engaged"] is True
    assert receipt["steps_reading_cache"] == 5
    assert receipt["full_compute"] is False
    assert receipt["guidance"] == {"scale": 1.5, "planned": 1.5, "as_planned": True, "steps": {"both": 8}}
    assert receipt["plan_digest"] == plan.digest
    assert receipt["teacher"] == plan.model.teacher
    assert receipt["weights_sha256"] == sha256_of(artefact / "weights.data")
    assert (receipt["seed"], receipt["first_index"], receipt["labels"], receipt["images"]) == (7, 2, LABELS, 3)
    assert (receipt["provider"], receipt["precision"]) == ("cpu", "fp32")
    assert set(receipt["nodes_per_provider"]) == {"condition", *schedule}
    for counts in receipt["nodes_per_provider"].values():
        assert set(counts) == {"CPUExecutionProvider"}
        assert counts["CPUExecutionProvider"] > 5
    assert receipt["cache_bytes"] == 3 * cache_bytes_per_image(plan)
    # 3 full steps of 4 x 16; twice 1 block of attention and 3 tokens; twice 2 x 5 tokens and a block
    assert receipt["blocks_x_tokens_computed"] == 3 * 64 + 2 * (16 + 3) + 2 * (10 + 16)
    assert receipt["blocks_x_tokens_share"] == pytest.approx(receipt["blocks_x_tokens_computed"] / (8 * 64))
    assert set(receipt["ms_per_program"]) == {"condition", *schedule}
    assert 0 < sum(receipt["ms_per_program"].values()) < receipt["ms"]


def test_receipt_of_full_compute(sampler):
    result = sampler.sample(LABELS, seed=7, full=True)
    receipt = result.receipt
    assert receipt["steps_per_program"] == {"step_full": 8}
    assert receipt["blocks_x_tokens_share"] == 1.0
    assert receipt["cache_engaged"] is False
    assert receipt["full_compute"] is True
    assert receipt["cache_bytes"] == 0
    assert not close(result.latents, sampler.sample(LABELS, seed=7).latents)


def test_full_compute_is_the_reference(tmp_path, teacher):
    """Three steps, one of them skipped, in place of six."""
    plan = make_plan(teacher, (FULL, FULL, (skip(0, 4),)), reference=vp_sampler("ddim", 6))
    export_artefact(teacher, plan, tmp_path / "artefact", "fp32", "cpu", images=1, report=lambda _: None)
    sampler, seen = CachedSampler(tmp_path / "artefact", max_batch=1), []
    full = sampler.sample([0, 1], full=True, on_step=lambda done, total: seen.append((done, total))).receipt
    assert seen == [(i, 12) for i in range(1, 13)]
    assert full["steps_per_program"] == {"step_full": 12}
    assert full["blocks_x_tokens_share"] == 1.0
    cached = sampler.sample([0, 1]).receipt
    assert cached["steps_per_program"] == {"step_00": 4, "step_01": 2}
    assert cached["blocks_x_tokens_share"] == pytest.approx(2 / 6)
    chunked = CachedSampler(tmp_path / "artefact")
    chunked.manifest["condition_values"] = 2 * 2 * 26 * 32  # two steps at a time for one label and the null one
    for whole in (True, False):
        assert close(chunked.sample([0], full=whole).latents, sampler.sample([0], full=whole).latents)


def test_receipt_shows_other_guidance(sampler):
    planned, other, none = (sampler.sample(LABELS, seed=7, guidance=g) for g in (1.5, 3.0, 1.0))
    assert other.receipt["guidance"] == {"scale": 3.0, "planned": 1.5, "as_planned": False, "steps": {"both": 8}}
    assert none.receipt["guidance"]["as_planned"] is False
    assert not close(other.latents, planned.latents)
    assert np.array_equal(planned.latents, sampler.sample(LABELS, seed=7).latents)


def test_receipt_without_guidance(unguided):
    receipt = CachedSampler(unguided).sample([1, 2]).receipt
    assert receipt["steps_per_program"] == {"step_00": 1, "step_01": 2}
    assert receipt["guidance"] == {"scale": 1.0, "planned": 1.0, "as_planned": True, "steps": {"cond": 3}}
    assert receipt["cache_bytes"] == 2 * 16 * 32 * 4
    assert receipt["blocks_x_tokens_share"] == pytest.approx(1 / 3)


# Running


def test_modulations_in_chunks(artefact, sampler):
    """4 labels (the null one included) x 26 rows x 32: room for three steps at a time, then for less than one."""
    chunked, expected = CachedSampler(artefact), sampler.sample(LABELS, seed=7).latents
    for values in (3 * 4 * 26 * 32, 1):
        chunked.manifest["condition_values"] = values
        assert close(chunked.sample(LABELS, seed=7).latents, expected)


def test_progress(sampler):
    seen: list[tuple[int, int]] = []
    sampler.sample([0], on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 8) for i in range(1, 9)]


def test_a_request_that_fails_leaves_nothing_behind(sampler):
    expected = sampler.sample(LABELS, seed=7).latents

    def fail(done: int, _: int) -> None:
        if done == 5:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sampler.sample([4, 4, 4], seed=9, on_step=fail)
    assert np.array_equal(sampler.sample(LABELS, seed=7).latents, expected)


def test_requests_may_be_interleaved(sampler):
    """A second request that runs within the first shares no buffer with it."""
    expected, inner = sampler.sample(LABELS, seed=7).latents, []

    def another(done: int, _: int) -> None:
        if done == 4:
            inner.append(sampler.sample([4, 4, 4], seed=9).latents)

    assert np.array_equal(sampler.sample(LABELS, seed=7, on_step=another).latents, expected)
    assert np.array_equal(inner[0], sampler.sample([4, 4, 4], seed=9).latents)


def test_released_sessions_load_again(artefact):
    sampler = CachedSampler(artefact, preload=False)
    first = sampler.sample([2]).latents
    sampler.release()
    assert np.array_equal(sampler.sample([2]).latents, first)


@pytest.mark.parametrize("threads", [0, -1, 1.0, True])
def test_threads_that_make_no_sense(artefact, threads):
    with pytest.raises(RuntimeUnavailableError, match="give 1 or more"):
        CachedSampler(artefact, threads=threads)


def test_other_sessions_of_the_process_are_left_alone(artefact, sampler):
    """A serving process has other models: a decoder, for one, loaded with options of its own, before or after."""
    ort.InferenceSession(str(artefact / "condition.onnx"), providers=["CPUExecutionProvider"])
    script = (
        "import sys, onnxruntime as ort; from export.runtime.sampler import CachedSampler\n"
        "load = lambda: ort.InferenceSession(sys.argv[1] + '/condition.onnx', providers=['CPUExecutionProvider'])\n"
        "load(); CachedSampler(sys.argv[1], threads=1).sample([0]); CachedSampler(sys.argv[1], threads=2).sample([0]); load()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, artefact], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_results_are_not_overwritten(sampler):
    first = sampler.sample([1], seed=1).latents
    copy = first.copy()
    sampler.sample([1], seed=2)
    assert np.array_equal(first, copy)


def test_nan_names_step_and_program(copied):
    """NaN weights under a manifest that vouches for them."""
    manifest = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))
    _, _, offset, nbytes = manifest["weights"]["final_layer.linear.bias"]
    content = bytearray((copied / "weights.data").read_bytes())
    content[offset : offset + nbytes] = np.full(nbytes // 4, np.nan, np.float32).tobytes()
    (copied / "weights.data").write_bytes(content)
    manifest["files"]["weights.data"]["sha256"] = sha256_of(copied / "weights.data")
    rewrite_manifest(copied, files=manifest["files"])
    with pytest.raises(TokenCacheError, match="NaN or infinite at step 0 in program step_00"):
        CachedSampler(copied).sample([0])


def test_overflow_names_step_and_program(sampler):
    with pytest.raises(TokenCacheError, match=r"NaN or infinite at step \d in program step_\d\d: lower the guidance"):
        sampler.sample([0], guidance=1e38)


# Providers


def test_cuda_is_never_replaced_by_the_cpu(artefact):
    """On a machine without a GPU, asking for one is an error."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeUnavailableError, match=r"cuda|CUDA"):
        CachedSampler(artefact, provider="cuda")


def test_cuda_that_onnxruntime_lacks(artefact, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError, match="install onnxruntime-gpu"):
        CachedSampler(artefact, provider="cuda")


def test_two_onnxruntimes_are_named(artefact, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    found = [SimpleNamespace(name="onnxruntime"), SimpleNamespace(name="onnxruntime-gpu")]
    monkeypatch.setattr("importlib.metadata.distributions", lambda: found)
    with pytest.raises(RuntimeUnavailableError, match=r"both installed.*pip uninstall"):
        CachedSampler(artefact, provider="cuda")


def test_unknown_provider(artefact):
    with pytest.raises(RuntimeUnavailableError, match="unknown provider 'tpu': choose one of cpu, cuda"):
        CachedSampler(artefact, provider="tpu")


def test_runtime_needs_numpy_and_onnxruntime_alone(artefact, sampler):
    blocked = ("torch", "lightning", "onnx", "safetensors", "datasets", "sklearn", "PIL")
    script = (
        f"import sys; sys.modules |= dict.fromkeys({blocked})\n"
        "from export.runtime.sampler import CachedSampler\n"
        "result = CachedSampler(sys.argv[1]).sample([0, 3, 1], seed=7)\n"
        "sys.stdout.buffer.write(result.latents.tobytes())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, artefact], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    latents = np.frombuffer(done.stdout, np.float32).reshape(3, 4, 8, 8)
    assert close(latents, sampler.sample(LABELS, seed=7).latents)


def test_a_receipt_says_when_a_request_leaves_the_range_of_the_fit():
    fit = {"guidance": 1.5, "labels": [0, 1]}
    assert outside_the_fit(None, 4.0, [3]) == outside_the_fit(fit, 1.5, [1, 0, 1]) == []
    told = outside_the_fit(fit, 4.0, [1, 3, 3, 2])
    assert told == ["guidance 4: fitted at 1.5", "2 of its classes: no image of them was fitted on"]


def test_a_receipt_says_what_ran_in_words(artefact, plan):
    receipt = CachedSampler(artefact).sample([0]).receipt
    assert (receipt["plan"], receipt["outside_the_fit"]) == (plan.in_words, [])


def test_full_compute_was_not_fitted_and_leaves_no_range(teacher, tmp_path):
    plan = make_plan(teacher, (FULL, (skip(0, 4, 0),)), fit={"guidance": 1.5, "labels": [0]})
    export_artefact(teacher, plan, tmp_path / "a", "fp32", "cpu", images=2, report=lambda _: None)
    sampler = CachedSampler(tmp_path / "a")
    assert len(sampler.sample([3], guidance=4.0).receipt["outside_the_fit"]) == 2
    assert sampler.sample([3], guidance=4.0, full=True).receipt["outside_the_fit"] == []
