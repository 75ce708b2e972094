"""Which device a sampler is put on, and which are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime as ort
import pytest

from export import sample, verify
from export.runtime import cuda_provider, sessions
from export.runtime.cuda_provider import RuntimeUnavailableError
from export.runtime.manifest import read_manifest
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError

LABELS = [0, 3, 1]


@pytest.mark.parametrize(
    ("provider", "device", "message"),
    [
        ("cpu", -1, "device is -1: give the number of a GPU, 0 or more"),
        ("cuda", -1, "device is -1"),
        ("cuda", 1.0, "device is 1.0"),
        ("cuda", True, "device is True"),
        ("cuda", "0", "device is '0'"),
        ("cpu", 1, "device 1 was asked for, but provider cpu has no other than 0: ask for provider cuda"),
    ],
)
def test_devices_that_are_refused(artefact, provider, device, message):
    with pytest.raises(RuntimeUnavailableError, match=message):
        CachedSampler(artefact, provider=provider, device=device)


def test_a_device_that_is_not_there(artefact, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr("importlib.metadata.distributions", list)
    answers = {"cuDriverGetVersion": 99000, "cuDeviceGetCount": 2}
    monkeypatch.setattr(cuda_provider, "_ask_driver", answers.get)
    with pytest.raises(RuntimeUnavailableError, match="device 2 was asked for, but CUDA sees 2 here, numbered from 0: give 1 or less"):
        CachedSampler(artefact, provider="cuda", device=2)


def test_everything_is_put_on_the_device_that_was_asked_for(artefact, monkeypatch):
    """No GPU is needed to see what ONNX Runtime is asked for."""
    monkeypatch.setattr(cuda_provider, "_stream", {0: 10, 3: 13}.__getitem__)
    assert cuda_provider.provider_options(True, 3) | {"use_tf32": ""} == {
        "device_id": "3",
        "user_compute_stream": "13",
        "enable_cuda_graph": "1",
        "use_tf32": "",
        "arena_extend_strategy": "kSameAsRequested",
    }
    asked: list[tuple[str, int]] = []
    make = ort.OrtValue.ortvalue_from_shape_and_type

    def on_the_cpu_after_all(shape: list[int], kind: int, provider: str, device: int) -> ort.OrtValue:
        asked.append((provider, device))
        return make(shape, kind, "cpu", 0)

    def open_on_the_cpu(path: Path, provider: str, options: ort.SessionOptions, graphs: bool, device: int) -> ort.InferenceSession:
        asked.append((provider, device))
        plain = sessions.session_options("cpu", None, False, None)
        return ort.InferenceSession(str(path), plain, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", on_the_cpu_after_all)
    monkeypatch.setattr("export.runtime.loaded_graphs.open_session", open_on_the_cpu)
    monkeypatch.setattr("export.runtime.sampler.prepare", lambda *given: asked.append((given[0], given[2])))
    manifest = read_manifest(artefact)
    assert all(program["graph"] == name for name, program in manifest["programs"].items())  # as if exported for CUDA
    sampler = CachedSampler(artefact, provider="cuda", device=3, manifest=manifest)
    result = sampler.sample(LABELS, seed=7)
    assert result.receipt["device"] == 3
    assert len(asked) > len(manifest["weights"]) / 2
    assert set(asked) == {("cuda", 3)}


@pytest.mark.parametrize("command", [sample, verify])
def test_commands_hand_the_device_on(artefact, monkeypatch, command):
    arguments = ["--labels", "0"] if command is sample else []
    monkeypatch.setattr(sys, "argv", ["command", str(artefact), *arguments, "--device", "1"])
    with pytest.raises(TokenCacheError, match="device 1 was asked for, but provider cpu"):
        command.main()
