"""Tables of samplers name plans: those that exist keep every bit of every coefficient."""

from __future__ import annotations

import hashlib
import json

import pytest
from conftest import vp_sampler

SPACINGS = ("uniform", "leading", "trailing", "quadratic", "logsnr", "mix:0.5", "mix:0.3")
STEPS = (1, 2, 3, 7, 14, 20, 50)
PINNED = {
    "ddim": "b2af2b9a61f26782da5b296dd1f605cb13d36bb006232e9ec01681e337db73f6",
    "dpmpp_2m": "cd69f507db640a341368960859cf83cde597e3b15f0b3906f3e00e313ec1192d",
    "dpmpp_3m": "5096519e31e5c97040a58ff34e8b4da9b4c65ee74a03cc46c65d8184f9a63d9f",
    "ddpm": "eb331b6c11d693d3d61447ae0cb83ae21d087e2344cc35c4c973c419937b7e59",
}


@pytest.mark.parametrize("name", PINNED)
def test_tables_are_what_they_were(name: str) -> None:
    tables = [vp_sampler(name, num_steps, spacing).to_json() for spacing in SPACINGS for num_steps in STEPS]
    assert hashlib.sha256(json.dumps(tables).encode()).hexdigest() == PINNED[name]
