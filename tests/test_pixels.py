"""Pixels: decoder.onnx and its proof, what the runtime makes of it, and a pipeline's own images."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import rewrite_manifest
from conftest import EVERY_MODE, make_plan, make_teacher
from pipelines import SD3_FACTORS, change_json, dit_pipeline, own_images, vae
from safetensors.torch import load_file, save_file
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from export.compiler import decoder as decoders
from export.compiler.compile import export_artefact
from export.compiler.fidelity import pixel_fidelity
from export.compiler.parity import ParityError
from export.grid import to_pixels
from export.runtime.manifest import ArtefactError
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TeacherError, TokenCacheError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.models.checkpoints.pipeline import find_vae, read_vae
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.rollout.sampling import noise_for

LABELS = [3, 999, 0]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "dit"
    dit_pipeline().save_pretrained(folder)
    return folder


def planned(pipeline: Path) -> tuple[Network, CachePlan]:
    """The pipeline's network, and a plan of every mode at the times of its scheduler, guided as it is."""
    model = load_teacher(TeacherSpec(str(pipeline)), lambda _: None)
    return model, make_plan(model, EVERY_MODE, Guidance(1.5, 4), spacing="leading")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def decoded(pipeline, tmp_path_factory) -> Path:
    """The artefact of a pipeline, not to be changed."""
    out = tmp_path_factory.mktemp("artefacts") / "decoded"
    model, plan = planned(pipeline)
    export_artefact(model, plan, out, "fp32", "cpu", images=2, report=lambda _: None, vae=find_vae(TeacherSpec(str(pipeline))))
    return out


@pytest.fixture
def copied(decoded, tmp_path) -> Path:
    return Path(shutil.copytree(decoded, tmp_path / "copy"))


# The runtime


def test_images_are_pixels_and_latents_stay(decoded, pipeline):
    sampler = CachedSampler(decoded)
    result, bare = sampler.sample(LABELS, seed=1), sampler.sample(LABELS, seed=1, pixels=False)
    assert bare.images is None
    assert "decoder" not in bare.receipt
    assert np.array_equal(result.latents, bare.latents)
    whole = vae()
    with torch.no_grad():
        expected = whole.decode(torch.from_numpy(result.latents) / whole.config.scaling_factor).sample.clamp(-1, 1).numpy()
    np.testing.assert_allclose(result.images, expected, atol=2e-5)
    assert np.abs(expected).mean() > 0.3
    assert (np.abs(expected) < 1).mean() > 0.5
    manifest = json.loads((decoded / "manifest.json").read_text(encoding="utf-8"))
    assert {"decoder.onnx", "decoder.data"} < set(manifest["files"])
    assert manifest["decoder"]["scaling_factor"] == whole.config.scaling_factor
    assert result.receipt["decoder"]["pixels"] == [3, 3, 16, 16]
    json.dumps(result.receipt)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_of_its_own_within_a_stated_memory(decoded, batch):
    manifest = json.loads((decoded / "manifest.json").read_text(encoding="utf-8"))
    sampler, seen = CachedSampler(decoded, decoder_batch=batch), []
    decode = sampler.decoder._decode
    sampler.decoder._decode = lambda latents: (seen.append(len(latents)), decode(latents))[1]
    result = sampler.sample([1, 2, 3, 4, 5], seed=2)
    assert seen == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[batch]
    np.testing.assert_allclose(result.images, CachedSampler(decoded).sample([1, 2, 3, 4, 5], seed=2).images, atol=1e-5)
    stated = 2 * manifest["files"]["decoder.data"]["bytes"] + batch * manifest["decoder"]["memory_bytes_per_image"]
    assert result.receipt["decoder"] == {
        "images_at_a_time": batch,
        "memory_bytes": stated,
        "ms": result.receipt["decoder"]["ms"],
        "pixels": [5, 3, 16, 16],
    }
    # At the end two tensors of 8 channels and the pixels' size stand side by side at the least: a shortcut and what is added to it.
    assert 2 * 8 * 16 * 16 * 4 <= manifest["decoder"]["memory_bytes_per_image"] <= 8 * 8 * 16 * 16 * 4


@pytest.mark.parametrize("batch", [0, 1.5, True, "2"])
def test_batches_that_are_none(decoded, batch):
    with pytest.raises(TokenCacheError, match="decoder_batch"):
        CachedSampler(decoded, decoder_batch=batch)


def test_a_pipelines_own_images(decoded, pipeline):
    """Full compute at the scheduler's times, with its guidance of all channels: within 2 of 255 grey levels, in every pixel."""
    model, _ = planned(pipeline)
    ours = to_pixels(CachedSampler(decoded).sample(LABELS, seed=5, full=True).images)
    theirs = own_images(pipeline, noise_for(5, range(3), model), LABELS, len(EVERY_MODE), 1.5)
    assert theirs.std() > 20
    assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_figures_in_pixels_are_torchmetrics_own(decoded):
    sampler = CachedSampler(decoded)
    cached, full = sampler.sample(LABELS, seed=1).images, sampler.sample(LABELS, seed=1, full=True).images
    found = pixel_fidelity(cached, full)
    a, b = torch.from_numpy(cached).double(), torch.from_numpy(full).double()
    each = peak_signal_noise_ratio(a, b, data_range=2.0, reduction="elementwise_mean", dim=(1, 2, 3))
    assert found.psnr_db == pytest.approx(float(each), abs=1e-3)
    assert found.ssim == pytest.approx(float(structural_similarity_index_measure(a, b, data_range=2.0)), abs=1e-6)
    said = sampler.manifest["fidelity"]["pixels"]
    assert said["images"] == 2
    assert 0 < said["ssim"] < 1


# What is refused


def test_nan_from_the_decoder(decoded):
    sampler = CachedSampler(decoded)
    sampler.manifest["decoder"]["shift_factor"] = float("nan")
    with pytest.raises(TokenCacheError, match=r"NaN or infinite of image 0.*pixels=False"):
        sampler.sample(LABELS)
    assert np.isfinite(sampler.sample(LABELS, pixels=False).latents).all()


def test_images_that_fail_leave_the_others_alone(decoded):
    """Each is what it would be alone, whether its latents or its pixels are NaN."""
    sampler = CachedSampler(decoded, decoder_batch=2)
    latents, whole = sampler.sample(LABELS, pixels=False).latents, sampler.sample(LABELS).images
    pixels, told = sampler.decoder.each(latents, {1: "before"})
    assert told == {}
    assert np.isnan(pixels[1]).all()
    np.testing.assert_allclose(pixels[[0, 2]], whole[[0, 2]], atol=1e-5)
    latents[0] = np.inf
    pixels, told = sampler.decoder.each(latents, {})
    assert set(told) == {0}
    np.testing.assert_allclose(pixels[1:], whole[1:], atol=1e-5)
    sampler.manifest["decoder"]["shift_factor"] = float("nan")
    result = sampler.sample(LABELS, strict=False)
    assert set(result.failed) == {0, 1, 2}
    assert np.isnan(result.images).all()
    assert np.isfinite(result.latents).all()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.data"])
@pytest.mark.parametrize(("damage", "message"), [(flip_a_bit, "is damaged: its sha256"), (Path.unlink, "is missing")])
def test_damaged_decoders(copied, name, damage: Callable[[Path], None], message):
    damage(copied / name)
    with pytest.raises(ArtefactError, match=f"{name} .*{message}|{name} {message}"):
        CachedSampler(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0"),
        ({"scaling_factor": 1}, "scaling_factor is 1"),
        ({"shift_factor": float("inf")}, "shift_factor is inf"),
        ({"pixels": [3, 32, 32]}, "makes other pixels"),
        ({"pixels": 3}, "makes other pixels"),
        ({"memory_bytes_per_image": 0}, "memory_bytes_per_image is 0"),
        ({"more": 1}, "decoder must be an object"),
        ({"parity": None}, "decoder must be an object"),
    ],
)
def test_manifests_that_cannot_be(copied, changes, message):
    said = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))["decoder"]
    rewrite_manifest(copied, decoder=said | changes)
    with pytest.raises(ArtefactError, match=message):
        CachedSampler(copied)


def test_decoders_that_are_not_described_or_not_there(copied, artefact, tmp_path):
    manifest = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))
    bare = Path(shutil.copytree(artefact, tmp_path / "bare"))
    rewrite_manifest(bare, decoder=manifest["decoder"])
    with pytest.raises(ArtefactError, match=r"does not list decoder\.onnx"):
        CachedSampler(bare)
    rewrite_manifest(copied, decoder=None)
    with pytest.raises(ArtefactError, match="lists a decoder and does not describe it"):
        CachedSampler(copied)


def refused(out: Path, model: Network, plan: CachePlan, folder: Path, error: type[TokenCacheError], match: str) -> None:
    """An export with a decoder that fails, and leaves nothing behind."""
    with pytest.raises(error, match=match):
        export_artefact(model, plan, out, "fp32", "cpu", images=1, report=lambda _: None, vae=read_vae(folder))
    assert not [path for path in out.parent.iterdir() if out.name in path.name]


def broken(folder: Path, **changes: Any) -> Path:
    """A VAE whose weights are not those of its configuration any more."""
    vae().save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file) | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)
    return folder


def test_vaes_that_do_not_fit(pipeline, tmp_path, monkeypatch):
    (model, plan), out = planned(pipeline), tmp_path / "out" / "a"
    out.parent.mkdir()
    vae(16, **SD3_FACTORS).save_pretrained(tmp_path / "sixteen")
    refused(out, model, plan, tmp_path / "sixteen", TeacherError, "latents of 16 channels, and the network makes 4")
    with pytest.raises(TeacherError, match="no VAE in"):
        read_vae(tmp_path / "nowhere")
    bias = "decoder.conv_out.bias"
    refused(out, model, plan, broken(tmp_path / "less", **{bias: None}), TeacherError, "does not fit its config.json.*conv_out.bias")
    refused(out, model, plan, broken(tmp_path / "nan", **{bias: torch.full((3,), torch.nan)}), TeacherError, "NaN")
    refused(out, model, plan, broken(tmp_path / "other", **{bias: torch.zeros(4)}), TeacherError, "conv_out.bias")
    change_json(tmp_path / "less" / "config.json", block_out_channels=[8])
    refused(out, model, plan, tmp_path / "less", TeacherError, "describes no AutoencoderKL|does not fit")
    pixels = make_teacher(output="pixels")
    refused(out, pixels, make_plan(pixels), pipeline / "vae", TeacherError, "makes pixels, and needs no VAE")
    monkeypatch.setattr(decoders, "TOLERANCE", 0.0)
    refused(out, model, plan, pipeline / "vae", ParityError, "the decoder disagrees with the VAE in torch")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(out, model, plan, pipeline / "vae", TokenCacheError, r"pip install -e '\.\[pixels\]'")


def test_latents_without_a_decoder_stay_as_they_were(artefact):
    result = CachedSampler(artefact).sample([0])
    assert result.images is None
    assert "decoder" not in result.receipt
