"""Requests: which are refused, and what an image does not depend on."""

from __future__ import annotations

import numpy as np
import pytest
from artefacts import LABELS, close

from export.runtime.sampler import CachedSampler
from export.runtime.sessions import packed_graphs
from tc_lightning.errors import TokenCacheError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [0, 5]}, "label 5 is not a class: this artefact has classes 0 to 4"),
        ({"labels": [-1]}, "label -1 is not a class"),
        ({"labels": [1.5]}, "label 1.5 is not a class"),
        ({"labels": ["3"]}, "label '3' is not a class"),
        ({"labels": [True]}, "label True is not a class"),
        ({"labels": [0], "seed": 1.5}, "seed 1.5 is out of range"),
        ({"labels": [0, 1], "first_index": 2**63 - 1}, "index .* is out of range"),
        ({"labels": [0, 1], "seed": [1]}, "1 values of seed were given for 2 images: give one, or one for each"),
        ({"labels": [0, 1], "seed": [1, 2.5]}, "seed 2.5 is out of range"),
        ({"labels": [0, 1], "seed": [1, True]}, "seed True is out of range"),
        ({"labels": [0, 1], "seed": "17"}, "seed '17' is out of range"),
        ({"labels": [0, 1], "indices": [3]}, "1 values of index were given for 2 images"),
        ({"labels": [0, 1], "indices": [3, -1]}, "index -1 is out of range"),
        ({"labels": [0, 1], "guidance": [1.5, 2.0, 3.0]}, "3 values of guidance were given for 2 images"),
        ({"labels": [0, 1], "guidance": [1.5, "high"]}, "guidance 'high' is not a number that can be used"),
        ({"labels": [0, 1], "guidance": [1.5, float("nan")]}, "guidance nan"),
        ({"labels": []}, "no labels were given"),
        ({"labels": [0], "guidance": float("nan")}, "guidance nan"),
        ({"labels": [0], "guidance": float("inf")}, "guidance inf"),
        ({"labels": [0], "seed": -1}, "seed -1 is out of range"),
        ({"labels": [0], "seed": 2**63}, "is out of range"),
        ({"labels": [0], "first_index": -1}, "index -1 is out of range"),
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


def test_rows_of_several_requests_in_one_batch(sampler):
    """Each with its own label, seed, index and guidance: the images that each would get alone, in any order and any company."""
    rows = [(0, 7, 0, 1.5), (3, 7, 1, 1.5), (1, 2**62, 5, 4.0), (0, 7, 0, 0.0), (4, 11, 2**62, 1.5)]

    def made(some):
        labels, seeds, indices, scales = map(list, zip(*some, strict=True))
        return sampler.sample(labels, seed=seeds, indices=indices, guidance=scales)

    together = made(rows)
    for row, latent in zip(rows, together.latents, strict=True):
        alone = sampler.sample([row[0]], seed=row[1], first_index=row[2], guidance=row[3]).latents[0]
        assert close(alone, latent)
    assert np.array_equal(made(rows[::-1]).latents[::-1], together.latents)
    assert not close(together.latents[0], together.latents[3])  # their guidance alone differs
    receipt = together.receipt
    assert (receipt["seed"], receipt["indices"]) == ([7, 7, 2**62, 7, 11], [0, 1, 5, 0, 2**62])
    assert receipt["guidance"]["scale"] == [1.5, 1.5, 4.0, 0.0, 1.5]
    assert not receipt["guidance"]["as_planned"]


@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_an_image_that_became_nan_fails_alone(artefact, sampler, max_batch):
    splitting, scales = CachedSampler(artefact, max_batch=max_batch), [1.5, 1e38, 1.5]
    result = splitting.sample([0, 3, 1], seed=7, guidance=scales, strict=False)
    assert list(result.failed) == [1]
    assert "latents became NaN or infinite at step" in result.failed[1]
    good = sampler.sample([0, 3, 1], seed=7)
    assert close(result.latents[0], good.latents[0])
    assert close(result.latents[2], good.latents[2])
    assert good.failed == {}
    with pytest.raises(TokenCacheError, match="NaN or infinite"):
        splitting.sample([0, 3, 1], seed=7, guidance=scales)


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
