"""Long use, in short: requests of changing sizes from two threads, whose memory and images are looked at."""

from __future__ import annotations

import dataclasses
import json

import pytest
from test_commands import call, is_one_paragraph

from export.bench.soak import Soaked, SoakError, require_flat, soak
from export.runtime.result import Result
from export.runtime.sampler import CachedSampler


class Forgetful(CachedSampler):
    """Its images are others from the twentieth request on."""

    asked = 0

    def sample(self, *given, **named) -> Result:
        made = super().sample(*given, **named)
        self.asked += 1
        return dataclasses.replace(made, latents=made.latents + 1e-6) if self.asked > 20 else made


def test_images_stay_the_same_and_memory_is_looked_at(artefact):
    seen: list[int] = []
    found = soak(CachedSampler(artefact, threads=1, max_batch=2), (10, 30), 2, 4, 3, seen.append)
    assert (found.requests, found.changed, len(seen)) == (30, 0, 30)
    assert 30 < found.images < 4 * 30
    assert set(found.resident_mb) == {10, 30}
    assert all(megabytes > 10 for megabytes in found.resident_mb.values())


def test_an_image_that_changes_is_noticed(artefact):
    found = soak(Forgetful(artefact, threads=1), (30,), 1, 2, 3, lambda _: None)
    assert found.changed == 30 - (20 - 2)  # two requests made what the others are compared with
    with pytest.raises(SoakError, match="in 12 of 30 requests an image was not what it was at first"):
        require_flat(found)


def test_memory_that_grows_is_noticed():
    require_flat(Soaked(100, 100, {10: 100.0, 50: 150.0, 100: 101.9}, 0))
    with pytest.raises(SoakError, match=r"grew from 100\.0 MB after 10 requests to 102\.1 MB after 100: more than 2%"):
        require_flat(Soaked(100, 100, {10: 100.0, 100: 102.1}, 0))


def test_command(artefact, tmp_path):
    """The memory of so few requests tells nothing: what is printed is looked at."""
    done = call(tmp_path, "soak.py", artefact, "--requests", 20, "--json", deployed=True)
    assert set(json.loads(done.stdout)["resident_mb"]) == {"2", "10", "20"}
    is_one_paragraph(call(tmp_path, "soak.py", artefact, "--requests", 5, deployed=True), "too few to tell")
