from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from conftest import SIGNATURE

from export.compiler.parity import to_numpy
from export.runtime.buffers import MOST_SIZES, Pool, ProgramError, Workspace, place
from export.runtime.cuda_provider import Lane
from export.runtime.distinct import DistinctRows, distinct_rows
from export.runtime.layout import graphed, lay_out, read_first
from export.runtime.request import Part, Row, fill, run_part
from export.runtime.sampler import CachedSampler
from export.runtime.sessions import on_device
from tc_lightning.errors import TokenCacheError

PART = Part({"label": np.array([0, 3])}, (Row(7, 0, 1.5), Row(7, 1, 1.5)), full=False)


@pytest.fixture(scope="module")
def sampler(artefact: Path) -> CachedSampler:
    return CachedSampler(artefact)


@pytest.fixture(scope="module")
def expected(sampler: CachedSampler) -> np.ndarray:
    return sampler.sample([0, 3], seed=7).latents


@pytest.fixture
def keeping(artefact: Path) -> CachedSampler:
    """A sampler that keeps its buffers between requests, as one on CUDA does for its graphs."""
    kept = CachedSampler(artefact)
    kept._pool = Pool(kept.session, "cpu", keep=True)
    return kept


def distinct(part: Part) -> DistinctRows:
    """Of labels that differ, guided: theirs and the null one."""
    return distinct_rows(SIGNATURE.conditions, True, part.given, part.nulls)


def workspace_of(sampler: CachedSampler, part: Part = PART) -> Workspace:
    layout = lay_out(sampler.manifest, part.images, 3, part.full)
    workspace = Workspace(layout, sampler.session, "cpu")
    fill(workspace, sampler.manifest, part, distinct(part))
    return workspace


# Values


def test_values_are_placed_as_their_type_says():
    """ONNX Runtime copies bytes without looking at types."""
    assert place(np.arange(3), "fp32", "cpu").numpy().tolist() == [0.0, 1.0, 2.0]
    assert place(np.array(5.0), "int64", "cpu").numpy().tolist() == 5
    half = place(np.array([[0.5], [2.0]]), "fp16", "cpu")
    assert (half.element_type(), half.shape(), half.numpy().tolist()) == (10, [2, 1], [[0.5], [2.0]])
    bits = place(np.array([0x3F80, 0xC040], np.uint16), "bf16", "cpu")
    assert bits.element_type() == 16
    assert to_numpy(bits).tolist() == [1.0, -3.0]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_initialisers_on_a_device_are_accepted(dtype):
    """A value that owns its memory is not, and that is what any placed on a device is at first."""
    weight = np.zeros(4, {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[dtype])
    options = ort.SessionOptions()
    with pytest.raises(RuntimeError, match="must be owned by the user"):
        options.add_initializer("weight", place(weight, dtype, "cpu"))
    options.add_initializer("weight", on_device(weight, dtype, "cpu"))


# Workspaces


def test_a_run_may_be_repeated(sampler, expected):
    """To capture a CUDA graph ONNX Runtime runs the program up to three times."""
    workspace = workspace_of(sampler)
    for run in workspace.layout.runs:
        for _ in range(3):
            workspace.run(run)
    assert np.array_equal(workspace.read("x.0"), expected)
    assert int(workspace.read("step.0")) == sampler.manifest["steps"]


def test_latents_are_looked_at_once_on_a_device(sampler, expected):
    latents, failed, tally = run_part(workspace_of(sampler), sampler.manifest, on_cpu=False, timing=False, on_step=lambda _: None)
    assert failed == {}
    assert np.array_equal(latents, expected)
    assert tally.seconds == {}
    _, _, timed = run_part(workspace_of(sampler), sampler.manifest, on_cpu=False, timing=True, on_step=lambda _: None)
    assert set(timed.seconds) == set(timed.ran)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_first_bad_step_is_named_whenever_one_looks(sampler, on_cpu):
    overflowing, seen = dataclasses.replace(PART, rows=(Row(7, 0, 1e38), Row(7, 1, 1e38))), []
    _, failed, _ = run_part(workspace_of(sampler, overflowing), sampler.manifest, on_cpu, False, seen.append)
    steps = sampler.manifest["steps"]
    assert len(seen) < steps if on_cpu else len(seen) == steps
    with pytest.raises(TokenCacheError) as again:
        sampler.sample([0, 3], seed=7, guidance=1e38)
    assert str(again.value) == failed[0]
    assert set(failed) == {0, 1}


def test_nan_of_one_image_is_noticed(sampler):
    workspace = workspace_of(sampler)
    x = workspace.read("x.0").copy()
    for value in (np.nan, np.inf, -np.inf):
        x[1, 2, 3, 4] = value
        workspace.fill("x.0", x)
        workspace.run(workspace.layout.runs[0])
        workspace.run(workspace.layout.runs[1])
        assert workspace.read("first_bad.1").tolist() == [sampler.manifest["steps"], 0]
    x[1, 2, 3, 4] = 3e38  # large, but a number
    workspace.fill("x.0", np.zeros_like(x))
    workspace.run(workspace.layout.runs[1])
    assert workspace.read("first_bad.1").tolist() == [sampler.manifest["steps"]] * 2


def test_a_program_that_fails_is_named(sampler):
    layout = lay_out(sampler.manifest, 2, 3)
    workspace = Workspace(
        dataclasses.replace(layout, buffers=layout.buffers | {"x.0": layout.buffers["rows.both"]}), sampler.session, "cpu"
    )
    with pytest.raises(ProgramError, match=r"program step_00 failed on cpu: .*x") as caught:
        workspace.run(layout.runs[1])
    assert caught.value.graph is False


# Buffers that outlive a request


def test_kept_buffers_give_the_same(keeping, expected):
    first, second = (keeping.sample([0, 3], seed=7) for _ in range(2))
    distinct = len(graphed(lay_out(keeping.manifest, 2, 3).runs, 99))
    steps = keeping.manifest["steps"]
    assert [r.receipt["cuda_graphs"]["captured"] for r in (first, second)] == [distinct, 0]
    assert [r.receipt["cuda_graphs"]["replayed"] for r in (first, second)] == [steps - distinct, steps]
    assert np.array_equal(first.latents, expected)
    assert np.array_equal(second.latents, expected)
    assert not np.array_equal(keeping.sample([0, 3], seed=8).latents, expected)


def test_a_request_reads_nothing_of_the_one_before(keeping, expected):
    keeping.sample([4, 2], seed=1, guidance=3.0)
    key = (2, 3, False)
    workspace = keeping._pool.take(key, lay_out(keeping.manifest, 2, 3))
    assert workspace.has_graphs
    for name, spec in workspace.layout.buffers.items():
        workspace.fill(name, np.full(spec.shape, 2**40 if spec.dtype == "int64" else np.nan))
    keeping._pool.put_back(key, workspace)
    result = keeping.sample([0, 3], seed=7)
    assert result.receipt["cuda_graphs"]["replayed"] == keeping.manifest["steps"]
    assert np.array_equal(result.latents, expected)


def test_a_failed_request_leaves_kept_buffers_usable(keeping, expected):
    def fail(done: int, _: int) -> None:
        if done == 5:
            raise RuntimeError("stop")

    keeping.sample([0, 3], seed=7)
    with pytest.raises(RuntimeError, match="stop"):
        keeping.sample([4, 1], seed=9, on_step=fail)
    with pytest.raises(TokenCacheError, match="NaN"):
        keeping.sample([4, 1], seed=9, guidance=1e38)
    again = keeping.sample([0, 3], seed=7)
    assert again.receipt["cuda_graphs"]["replayed"] == keeping.manifest["steps"]
    assert np.array_equal(again.latents, expected)


def test_a_request_within_another_has_its_own_buffers(keeping, expected):
    inner = []

    def another(done: int, _: int) -> None:
        if done == 4:
            inner.append(keeping.sample([4, 1], seed=9))

    outer = keeping.sample([0, 3], seed=7, on_step=another)
    assert np.array_equal(outer.latents, expected)
    assert inner[0].receipt["cuda_graphs"]["plain"] == keeping.manifest["steps"]
    assert np.array_equal(inner[0].latents, keeping.sample([4, 1], seed=9).latents)


def test_sizes_in_turns(keeping, sampler):
    plain = []
    for size in [*range(1, MOST_SIZES + 2), 2, 1]:
        labels = [0, 3, 1, 4, 2, 0][:size]
        result = keeping.sample(labels, seed=7)
        plain.append(result.receipt["cuda_graphs"]["plain"])
        assert np.array_equal(result.latents, sampler.sample(labels, seed=7).latents)
    assert plain == [0] * MOST_SIZES + [keeping.manifest["steps"], 0, 0]


def test_released_buffers_are_made_again(keeping, expected):
    keeping.sample([0, 3])
    keeping._pool.clear()
    workspace = keeping._pool.take("size", lay_out(keeping.manifest, 1, 2))
    keeping._pool.clear()
    keeping._pool.put_back("size", workspace)  # lent when all were dropped
    assert keeping._pool.take("size", lay_out(keeping.manifest, 1, 2)) is not workspace
    assert np.array_equal(keeping.sample([0, 3], seed=7).latents, expected)


def test_every_graph_has_a_number_of_its_own(keeping):
    layouts = [lay_out(keeping.manifest, images, 3) for images in (1, 2)]
    numbers = [n for layout in layouts for n in keeping._pool.take(layout.buffers["rows.both"], layout)._graphs.values()]
    assert len(numbers) == len(set(numbers)) == sum(len(graphed(layout.runs, 99)) for layout in layouts)
    assert min(numbers) == 1  # 0 is the graph of whoever gives no number


def test_requests_in_two_threads(sampler, expected):
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(sampler.sample([0, 3], seed=7).latents)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert all(np.array_equal(result, expected) for result in results)


# The thread of the GPU


def test_requests_in_a_lane(artefact, expected):
    """As on CUDA: from two threads, one within another, one that fails."""
    sampler, lane = CachedSampler(artefact), Lane()
    sampler._exclusively = lane.run
    sampler._pool = Pool(sampler.session, "cpu", keep=True)
    results: list[np.ndarray] = []
    other = threading.Thread(target=lambda: results.append(sampler.sample([4, 1], seed=9).latents))
    other.start()
    seen: set[int] = set()

    def on_step(done: int, _: int) -> None:
        seen.add(threading.get_ident())
        if done == 3:
            results.append(sampler.sample([4, 1], seed=9).latents)

    assert np.array_equal(sampler.sample([0, 3], seed=7, on_step=on_step).latents, expected)
    other.join()
    assert np.array_equal(results[0], results[1])
    assert len(seen) == 1
    with pytest.raises(TokenCacheError, match="NaN"):
        sampler.sample([0, 3], guidance=1e38)
    assert np.array_equal(sampler.sample([0, 3], seed=7).latents, expected)


# What CUDA needs


def test_what_is_filled_in_is_what_is_read_first(sampler):
    """`fill` has a value for everything that any layout here asks for."""
    for full in (False, True):
        layout = lay_out(sampler.manifest, 2, 3, full)
        assert {"x.0", "step.0", "first_bad.0"} <= read_first(layout.runs)
        fill(Workspace(layout, sampler.session, "cpu"), sampler.manifest, dataclasses.replace(PART, full=full), distinct(PART))
