"""Stage 1: what this machine has, and whether the provider and PyTorch can be used here, by using them."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from export.bench.acceptance.reporter import NotHere, Reporter
from export.bench.acceptance.stages import PROVIDER
from export.bench.timing import TORCH_TYPES
from export.runtime.buffers import place, run_once
from export.runtime.cuda_provider import why_no_graphs
from export.runtime.sessions import PROVIDERS, nodes_per_provider, open_session, prepare, session_options

WHEELS = ("onnxruntime", "onnxruntime-gpu", "torch", "triton", "lightning", "onnx", "numpy")  # and all of NVIDIA's
SMI = "nvidia-smi"
SIDE = 64


def run(report: Reporter, provider: str, scratch: Path) -> None:
    """See the module."""
    with report.part("versions") as found:
        found.figures |= {"wheels": wheels(), "torch": _torch(), "onnxruntime": _onnxruntime(), "gpus": gpus()}
    with report.part(PROVIDER) as found:
        prepare(provider, None)
        nodes, difference = product_on(provider, scratch)
        found.figures |= {"nodes": nodes, "device": device_name(provider)}
        found.require(set(nodes) == {PROVIDERS[provider]}, f"a product was to run on {PROVIDERS[provider]}, and ran on {nodes}")
        found.at_most("error", difference, 1e-5)
    with report.part("PyTorch") as found:
        device = torch.device(provider)
        for name, dtype in TORCH_TYPES.items():
            a = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
            found.require(bool(((a @ a) == SIDE).all()), f"a product of ones in {name} is wrong")
    with report.part("CUDA graphs") as found:
        reason = why_no_graphs()
        if provider == "cpu":
            raise NotHere("the provider is the CPU")
        found.require(reason is None, f"they are off: {reason}")


def device_name(provider: str) -> str:
    """Name of the device that the provider computes on."""
    if provider == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "; ".join(gpus())


def wheels() -> dict[str, str]:
    """Versions of what is installed and matters here."""
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name}
    return {name: found[name] for name in sorted(found) if name in WHEELS or name.startswith("nvidia-")}


def gpus() -> list[str]:
    """The CUDA version of the driver and each GPU, as nvidia-smi has them; empty without it."""
    query = ("--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader")
    version = re.findall(r"CUDA Version: ([\d.]+)", _smi())
    return [*(f"driver for CUDA {number}" for number in version), *_smi(*query).strip().splitlines()]


def _smi(*arguments: str) -> str:
    if shutil.which(SMI) is None:
        return ""
    return subprocess.run((SMI, *arguments), capture_output=True, text=True, check=False, timeout=30).stdout


def product_on(provider: str, folder: Path) -> tuple[dict[str, int], float]:
    """Multiply two matrices with ONNX Runtime: nodes by provider, and the largest difference to numpy."""
    names = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [SIDE, SIDE]) for name in "abc"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["a", "b"], ["c"])], "product", names[:2], names[2:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    path = folder / "product.onnx"
    onnx.save(model, str(path))
    a, b = np.random.default_rng(0).random((2, SIDE, SIDE), np.float32)
    session = open_session(path, provider, session_options(provider, None, False, None))
    c = run_once(session, {"a": place(a, "fp32", provider), "b": place(b, "fp32", provider)}, provider)["c"].numpy()
    return nodes_per_provider(session), float(np.abs(c - a @ b).max() / SIDE)


def _torch() -> dict[str, Any]:
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "gpu usable": torch.cuda.is_available(),
    }


def _onnxruntime() -> dict[str, Any]:
    return {"version": ort.__version__, "cuda": getattr(ort, "cuda_version", ""), "providers": ort.get_available_providers()}
