"""On a GPU: parity in every precision, requests of several threads and many sizes, refining. Skipped elsewhere, with the reason."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_plan, make_teacher, vp_sampler

from export.compiler.compile import export_artefact
from export.compiler.parity import TOLERANCE, relative_l2
from export.runtime.buffers import MOST_SIZES
from export.runtime.cuda_provider import CUDA, RuntimeUnavailableError
from export.runtime.sampler import CachedSampler
from export.runtime.sessions import prepare
from tc_lightning.models.dit import DiT
from tc_lightning.planner.fit import fit_sampler
from tc_lightning.planner.image_choice import images
from tc_lightning.planner.refine import refine_sampler
from tc_lightning.planner.target import run_target

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def cuda() -> None:
    """Skips everything here where CUDA cannot be used."""
    try:
        prepare("cuda", None)
    except RuntimeUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def on_cuda(cuda: None, teacher: DiT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of every mode as an fp32 artefact for CUDA."""
    out = tmp_path_factory.mktemp("artefacts") / "tiny"
    export_artefact(teacher, make_plan(teacher), out, "fp32", "cuda", images=2, report=lambda _: None)
    return out


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_mode_agrees_with_torch(teacher: DiT, tmp_path: Path, precision: str) -> None:
    manifest = export_artefact(teacher, make_plan(teacher), tmp_path / "tiny", precision, "cuda", images=2, report=lambda _: None)
    assert manifest["parity"]["trajectory_rel_l2"] <= TOLERANCE[precision]
    nodes = CachedSampler(tmp_path / "tiny", "cuda").sample([0, 3]).receipt["nodes_per_provider"]
    assert all(set(counts) == {CUDA} for counts in nodes.values()), nodes


def test_both_providers_make_the_same_images(on_cuda: Path, artefact: Path) -> None:
    on_gpu, on_cpu = CachedSampler(on_cuda, "cuda").sample([0, 3, 1], seed=7), CachedSampler(artefact).sample([0, 3, 1], seed=7)
    assert relative_l2(on_gpu.latents, on_cpu.latents) < TOLERANCE["fp32"]


def test_requests_of_many_threads_and_sizes(on_cuda: Path) -> None:
    """Each gets what it would get alone, replayed from graphs or not."""
    sampler = CachedSampler(on_cuda, "cuda")
    plain = CachedSampler(on_cuda, "cuda", cuda_graphs=False)
    sizes = range(1, MOST_SIZES + 3)
    expected = {size: plain.sample([1] * size, seed=size).latents for size in sizes}
    found: dict[tuple[int, int], np.ndarray] = {}

    def ask(turn: int) -> None:
        for size in sizes:
            found[turn, size] = sampler.sample([1] * size, seed=size).latents

    threads = [threading.Thread(target=ask, args=(turn,)) for turn in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {(turn, size) for turn in range(3) for size in sizes}
    assert max(relative_l2(latents, expected[size]) for (_, size), latents in found.items()) < TOLERANCE["fp32"]


def test_fitting_and_refining_end_where_they_do_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"PyTorch {torch.__version__} cannot use the GPU")
    found = {}
    for device in ("cpu", "cuda"):
        model = make_teacher().to(device)
        plan = make_plan(model)
        target = run_target(model, vp_sampler("ddim", 6), plan.guidance, *images(model, list(range(4))), batch=4)
        fitted = fit_sampler(model, plan, target, 4).plan
        refined = refine_sampler(model, fitted, dataclasses.replace(target, weights_B=None), 1)
        found[device] = np.array([[row.next_x, row.next_m] for row in refined.sampler.steps])
    assert np.abs(found["cuda"] - found["cpu"]).max() < 1e-2 * np.abs(found["cpu"]).max()
