"""What a request takes is known before it runs, bounded, and given back when it is given up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from artefacts import LABELS, close
from conftest import EVERY_MODE, make_plan
from pipelines import dit_pipeline

from export.compiler.compile import export_artefact
from export.runtime.admission import batch_within, predicted_bytes
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.models.checkpoints.pipeline import find_vae
from tc_lightning.plan.guidance import Guidance
from tc_lightning.rollout.sampling import model_signature


class TestPredictedBytes:
    def test_by_hand(self, sampler: CachedSampler) -> None:
        """Two latents and the solver's outputs, counters, rows and numbers of both halves, a chunk's modulations, and the cache."""
        receipt = sampler.sample(LABELS, seed=7).receipt
        beside = sampler.predicted_bytes(len(LABELS)) - receipt["cache_bytes"] - receipt["modulation_bytes"]
        latent = 4 * len(LABELS) * 4 * 8 * 8
        assert 2 * latent < beside < 5 * latent + 1024
        assert sampler.predicted_bytes(len(LABELS), full=True) < sampler.predicted_bytes(len(LABELS))

    def test_more_images_take_more(self, sampler: CachedSampler) -> None:
        taken = [sampler.predicted_bytes(images) for images in range(1, 9)]
        assert taken == sorted(set(taken))

    def test_is_what_is_held(self, artefact: Path) -> None:
        """Of the workspace of a request that has as many distinct rows as there can be."""
        sampler = CachedSampler(artefact)
        held: list[int] = []
        real = sampler._pool.take

        def take(key: object, layout: object) -> object:
            workspace = real(key, layout)  # type: ignore[arg-type]
            held.append(sum(value.numpy().nbytes for value in workspace._values.values()))
            return workspace

        sampler._pool.take = take  # type: ignore[method-assign, assignment]
        sampler.sample([0, 1, 2, 3, 4], seed=7)
        assert held == [sampler.predicted_bytes(5)]


class TestLimit:
    def test_a_request_is_split_until_it_fits(self, artefact: Path, sampler: CachedSampler) -> None:
        limit = sampler.predicted_bytes(2)
        bounded = CachedSampler(artefact, max_bytes=limit)
        result = bounded.sample([0, 3, 1, 4, 2], seed=7)
        assert result.receipt["parts"] == 3
        assert close(result.latents, sampler.sample([0, 3, 1, 4, 2], seed=7).latents)

    @pytest.mark.parametrize("most", [1, 2, 7, 32])
    def test_as_many_as_fit(self, sampler: CachedSampler, most: int) -> None:
        for images in range(1, most + 1):
            limit = predicted_bytes(sampler.manifest, images)
            assert batch_within(sampler.manifest, most, limit) == images
            assert batch_within(sampler.manifest, most, limit + 1) == images
        assert batch_within(sampler.manifest, most, None) == most

    def test_an_image_that_does_not_fit_is_refused_in_words(self, artefact: Path) -> None:
        with pytest.raises(TokenCacheError, match=r"an image takes [\d,]+ bytes of buffers, and max_bytes is 1,000"):
            CachedSampler(artefact, max_bytes=1000)


def test_a_request_is_bounded_with_what_decoding_takes(tmp_path: Path):
    spec, decoded = TeacherSpec(str(tmp_path / "pipeline")), tmp_path / "decoded"
    dit_pipeline().save_pretrained(spec.weights)
    model = load_teacher(spec, lambda _: None)
    plan = make_plan(model_signature(model), EVERY_MODE, Guidance(1.5, 4), spacing="leading")
    export_artefact(model, plan, decoded, "fp32", "cpu", 1, lambda _: None, vae=find_vae(spec))
    sampler = CachedSampler(decoded, decoder_batch=2)
    of_decoder = 2 * sampler.manifest["decoder"]["memory_bytes_per_image"]
    assert sampler.predicted_bytes(2) == of_decoder + predicted_bytes(sampler.manifest, 2)
    bounded = CachedSampler(decoded, decoder_batch=2, max_bytes=sampler.predicted_bytes(2))
    assert bounded.sample([1, 2, 3], seed=2).receipt["parts"] == 2
    assert bounded.sample([1, 2, 3], seed=2, pixels=False).receipt["parts"] == 1
    with pytest.raises(TokenCacheError, match=rf"{of_decoder:,} of them to decode its pixels \(pixels=False makes none\)"):
        CachedSampler(decoded, decoder_batch=2, max_bytes=of_decoder).sample([1], seed=2)


def test_a_request_that_is_given_up_stops_at_the_next_step_and_leaves_the_sampler_usable(artefact: Path) -> None:
    sampler = CachedSampler(artefact)
    before, seen = sampler.sample(LABELS, seed=7).latents, list[int]()

    class GivenUpError(Exception):
        pass

    def on_step(done: int, steps: int) -> None:
        seen.append(done)
        if done == 3:
            raise GivenUpError

    with pytest.raises(GivenUpError):
        sampler.sample(LABELS, seed=8, on_step=on_step)
    assert seen == [1, 2, 3]
    assert np.array_equal(sampler.sample(LABELS, seed=7).latents, before)
