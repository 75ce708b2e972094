"""Measures of quality: distances by hand, judges, and what they need."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from export.report import quality
from export.report.judge import Judge, find_judge
from tc_lightning.errors import TokenCacheError
from tc_lightning.measure.ssim import ssim
from tc_lightning.rollout.sampling import model_signature


@pytest.fixture
def rng() -> np.random.Generator:
    """Of each test its own, so that no test depends on which ran before it."""
    return np.random.default_rng(0)


def test_identical_images_are_perfect(rng):
    x = rng.uniform(-1, 1, (4, 3, 16, 16)).astype(np.float32)
    similarity = ssim(x, x, 2.0)
    assert similarity is not None
    assert similarity == pytest.approx(np.ones(4), abs=1e-12)
    features = rng.normal(size=(5, 7))
    assert quality.frechet_distance(features, features) == pytest.approx(0.0, abs=1e-12)


def test_frechet_distance_by_hand():
    a = np.array([[0.0, 0.0], [2.0, 0.0]])  # mean (1, 0), covariance diag(2, 0)
    assert quality.frechet_distance(a, a + np.array([3.0, 4.0])) == pytest.approx(25.0)  # equal covariances: means alone
    wide = np.array([[-2.0, 0.0], [4.0, 0.0]])  # the same mean, standard deviation 3 sqrt 2 in place of sqrt 2
    assert quality.frechet_distance(a, wide) == pytest.approx((3 * np.sqrt(2) - np.sqrt(2)) ** 2)


def test_frechet_distance_agrees_with_a_matrix_root(rng):
    from scipy.linalg import sqrtm

    a, b = rng.normal(size=(40, 5)), rng.normal(size=(30, 5)) * 1.5 + 0.3
    s, r = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + r - 2 * sqrtm(s @ r).real)
    assert quality.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_a_single_image_has_no_distribution():
    with pytest.raises(TokenCacheError, match="at least two images"):
        quality.frechet_distance(np.zeros((1, 3)), np.zeros((2, 3)))


def test_features_are_of_the_middle_block(teacher, rng):
    x, y = rng.normal(size=(3, 4, 8, 8)).astype(np.float32), torch.tensor([0, 1, 2])
    features = quality.teacher_features(teacher, x, y, batch=2)
    z = teacher.embed(torch.from_numpy(x))
    mods, _ = teacher.modulations(teacher.condition(torch.full((3,), quality.FEATURE_TIME), label=y))
    for block in (0, 1):
        z = teacher.blocks[block](z, mods[block])
    assert features.dtype == np.float64
    expected = z.mean(1)
    assert torch.from_numpy(features).float() == pytest.approx(expected, abs=1e-5 * float(expected.abs().max()))


def test_judge(rng):
    images = np.concatenate([np.full((10, 1, 2, 2), -1.0), np.full((10, 1, 2, 2), 1.0)]) + rng.normal(size=(20, 1, 2, 2)) * 0.1
    labels = np.repeat([0, 1], 10)
    mixed = rng.permutation(20)
    judge = Judge(images[mixed], labels[mixed])
    assert judge.held_out == 1.0
    assert judge.accuracy(np.full((4, 1, 2, 2), 7.0), np.array([1, 1, 1, 0])) == 0.75


def test_judges_are_found(teacher):
    signature = model_signature(teacher)
    assert find_judge(signature, None) is None
    digits = dataclasses.replace(signature, in_channels=1, input_size=16)
    judge = find_judge(digits, "data.digits:load_digits")
    assert judge is not None
    assert judge.held_out > 0.93
    with pytest.raises(TokenCacheError, match=r"\(1797, 1, 8, 8\).*expected"):
        find_judge(signature, "data.digits:load_digits")
    with pytest.raises(TokenCacheError, match="no images and classes came from it"):
        find_judge(signature, "data.digits:nothing")


def test_the_shipped_digits_teacher_has_a_judge():
    from tc_lightning.models.checkpoints import TeacherSpec, load_teacher

    assert find_judge(model_signature(load_teacher(TeacherSpec("data/digits_dit.safetensors"))), None) is not None


def test_fid_needs_local_weights_and_torch_fidelity(tmp_path):
    x = np.zeros((2, 1, 8, 8), np.float32)
    with pytest.raises(TokenCacheError, match="no Inception weights at"):
        quality.InceptionFID(tmp_path / "gone.pth", x)
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    with pytest.raises(TokenCacheError, match="makes latents of 4 channels"):
        quality.InceptionFID(tmp_path / "weights.pth", np.zeros((2, 4, 8, 8)))
    with pytest.raises(TokenCacheError, match="torch-fidelity"):
        quality.InceptionFID(tmp_path / "weights.pth", x)
