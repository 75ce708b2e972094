"""Running an artefact: what a request leaves behind, what else runs in the process, and providers."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from artefacts import LABELS, close, rewrite_manifest

from export.runtime.manifest import sha256_of
from export.runtime.sampler import CachedSampler
from export.runtime.sessions import RuntimeUnavailableError
from tc_lightning.errors import TokenCacheError

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
