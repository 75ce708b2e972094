"""The second teacher that ships, and the crops that it was trained on."""

from __future__ import annotations

import pytest
import torch

from data.photos import CropDataset, PhotoCropsDataModule, load_photos
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.checkpoints import ROOT, TeacherSpec, load_teacher
from tc_lightning.models.dit import DiT
from tc_lightning.plan.guidance import Guidance
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample

PATH = "data/photos_dit.safetensors"


@pytest.fixture(scope="module")
def teacher() -> DiT:
    return load_teacher(TeacherSpec(PATH))


def test_it_is_small_deep_and_described(teacher: DiT) -> None:
    assert (ROOT / PATH).stat().st_size <= 12e6
    assert (teacher.config.in_channels, teacher.config.num_tokens, teacher.config.depth) == (3, 256, 12)
    assert model_signature(teacher).teacher in (ROOT / "data" / "photos_dit.md").read_text(encoding="utf-8")


def test_it_tells_its_noise_from_its_images(teacher: DiT) -> None:
    """On held-out crops at a middling time eps is predicted far better than by zero, and the classes differ."""
    data = PhotoCropsDataModule(num_val=16)
    data.setup("validate")
    x0, y = next(iter(data.val_dataloader()))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    alpha, sigma = 0.8, 0.6  # about t = 230
    eps = teacher.eps(alpha * x0 + sigma * noise, torch.full((len(y),), 230.0), y)
    assert (eps - noise).square().mean() < 0.1


def test_a_guided_image_is_finite_and_follows_its_label(teacher: DiT) -> None:
    plan = full_plan(model_signature(teacher), make_sampler("dpmpp_2m", 8, "mix:0.5"), Guidance(1.5, 3))
    x = noise_for(0, range(1), teacher).repeat(2, 1, 1, 1)
    images = sample(teacher, plan, x, torch.tensor([0, 1]))
    assert torch.isfinite(images).all()
    assert (images[0] - images[1]).square().mean() > 1e-3


def test_crops_are_functions_of_their_number() -> None:
    photos = load_photos()
    one, two = (CropDataset(photos, 32, 8, seed=3) for _ in range(2))
    for i in range(8):
        assert torch.equal(one[i][0], two[i][0])
        assert one[i][1] == i % 2
        assert one[i][0].shape == (3, 32, 32)
        assert one[i][0].abs().max() <= 1.0
    assert not torch.equal(one[0][0], CropDataset(photos, 32, 8, seed=4)[0][0])


def test_validation_crops_come_from_a_part_that_training_never_sees() -> None:
    data = PhotoCropsDataModule()
    data.setup("fit")
    for whole, train, val in zip(load_photos(), data._train.photos, data._val.photos, strict=True):
        assert torch.equal(torch.cat([train, val], 2), whole)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"size": 49}, {"batch_size": 0}, {"crops_per_epoch": 1}])
def test_bad_arguments(arguments: dict[str, int]) -> None:
    with pytest.raises(TokenCacheError, match="photo crops"):
        PhotoCropsDataModule(**arguments)
