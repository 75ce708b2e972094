"""One PSNR, by one rule for the data range, wherever it is printed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from export.compiler.fidelity import Fidelity
from tc_lightning.measure.psnr import MOST_DB, data_range, psnr, psnr_db

RNG = np.random.default_rng(5)


@pytest.mark.parametrize(("channels", "output"), [(1, "pixels"), (3, "pixels"), (3, "latents"), (4, "latents"), (4, "pixels")])
def test_it_is_that_of_torchmetrics(channels: int, output: str) -> None:
    """Whatever the number of channels: pixels with an alpha channel have four, and latents of a decoder may have three."""
    reference = 5.0 * RNG.normal(size=(6, channels, 8, 8))
    actual = reference + RNG.normal(size=reference.shape) * np.reshape(10.0 ** -np.arange(6), (6, 1, 1, 1))
    span = 2.0 if output == "pixels" else reference.max() - reference.min()
    given = torch.from_numpy(actual), torch.from_numpy(reference)
    theirs = peak_signal_noise_ratio(*given, data_range=span, dim=(1, 2, 3))
    assert psnr(actual, reference, output) == pytest.approx(float(theirs), abs=1e-4)  # its range is fp32
    assert data_range(reference, output) == span


def test_by_hand() -> None:
    x = np.zeros((2, 1, 8, 8))
    assert psnr(x + np.reshape([0.2, 0.02], (2, 1, 1, 1)), x, "pixels") == pytest.approx((20.0 + 40.0) / 2)
    assert psnr_db(torch.tensor([4e-4, 4e-2])) == pytest.approx((40 + 20) / 2)
    assert psnr_db(0.01, span=1.0) == pytest.approx(20)
    assert psnr_db(float("inf")) == -float("inf")


def test_identical_images_count_as_a_number() -> None:
    x = RNG.uniform(-1, 1, (4, 3, 16, 16)).astype(np.float32)
    assert psnr(x, x, "pixels") == psnr_db(np.zeros(4)) == MOST_DB == 200.0
    assert psnr(np.zeros((1, 4, 2, 2)), np.zeros((1, 4, 2, 2)), "latents") == MOST_DB  # latents that span nothing


def test_verify_report_and_planner_print_the_same_for_the_same_images() -> None:
    """Latents that span 20: a range of 2 would say 20 dB less than the report did."""
    full = RNG.uniform(-10, 10, (4, 4, 8, 8)).astype(np.float32)
    cached = full + 0.1
    fidelity = Fidelity(full, cached, 1.0, 1.0, "latents")
    assert fidelity.psnr_db == pytest.approx(20 * np.log10(np.ptp(full) / 0.1), abs=1e-4)
    assert psnr_db(fidelity.mse, data_range(full, "latents")) == pytest.approx(fidelity.psnr_db, abs=1e-4)
