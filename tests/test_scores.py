from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import RunError
from tc_lightning.measure.figures import importance_figure, router_figure, sensitivity_figure
from tc_lightning.measure.scores import Scores, sampler_digest


def arrays(T: int = 5, L: int = 3, N: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    sensitivity = rng.random((T, L, 2), dtype=np.float32)
    sensitivity[0] = 0
    return rng.random((T, L, N), dtype=np.float32), sensitivity


def test_round_trip_is_exact_and_digest_names_everything(tmp_path: Path) -> None:
    importance, sensitivity = arrays()
    scores = Scores(importance, sensitivity, "teacher", "sampler")
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert np.array_equal(loaded.importance_TLN, importance)
    assert np.array_equal(loaded.sensitivity_TL2, sensitivity)
    assert (loaded.teacher, loaded.sampler, loaded.digest) == ("teacher", "sampler", scores.digest)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]
    changed = [Scores(importance, 2 * sensitivity, "teacher", "sampler"), Scores(importance, sensitivity, "other", "sampler")]
    assert len({scores.digest, *(s.digest for s in changed)}) == 3


def test_a_router_is_optional_and_part_of_the_digest(tmp_path: Path) -> None:
    importance, sensitivity = arrays()
    router = np.random.default_rng(1).random((5, 3, 2), dtype=np.float32)
    router[0] = 1
    without, scores = Scores(importance, sensitivity, "t", "s"), Scores(importance, sensitivity, "t", "s", router)
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert loaded.router_TL2 is not None
    assert np.array_equal(loaded.router_TL2, router)
    assert loaded.digest == scores.digest != without.digest
    without.save(tmp_path / "scores.safetensors")
    assert Scores.load(tmp_path / "scores.safetensors").router_TL2 is None
    with pytest.raises(RunError, match="router must be 1 at step 0"):
        Scores(importance, sensitivity, "t", "s", 0.5 * router)
    with pytest.raises(RunError, match=r"router has the shape \(5, 2, 2\)"):
        Scores(importance, sensitivity, "t", "s", router[:, :2])
    router[2, 1, 0] = np.nan
    with pytest.raises(RunError, match="router is not finite at step 2, block 1"):
        Scores(importance, sensitivity, "t", "s", router)


def test_scores_are_frozen_copies() -> None:
    importance, sensitivity = arrays()
    scores = Scores(importance, sensitivity, "", "")
    importance[:] = 0
    assert scores.importance_TLN.any()
    with pytest.raises(ValueError, match="read-only"):
        scores.importance_TLN[0] = 0


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("importance", np.nan, "not finite at step 2, block 1"),
        ("importance", 1.5, r"lie in \[0, 1\]"),
        ("importance", -0.5, r"lie in \[0, 1\]"),
        ("sensitivity", np.inf, "sensitivity is not finite at step 2, block 1"),
        ("sensitivity", -1.0, "not be negative"),
    ],
)
def test_bad_values_are_refused(where: str, value: float, message: str) -> None:
    importance, sensitivity = arrays()
    {"importance": importance, "sensitivity": sensitivity}[where][2, 1, 0] = value
    with pytest.raises(RunError, match=message):
        Scores(importance, sensitivity, "", "")


def test_bad_shapes_are_refused() -> None:
    importance, sensitivity = arrays()
    with pytest.raises(RunError, match=r"sensitivity has the shape \(5, 2, 2\); \(5, 3, 2\) was expected"):
        Scores(importance, sensitivity[:, :2], "", "")
    with pytest.raises(RunError, match="importance has the shape"):
        Scores(importance[0], sensitivity, "", "")
    with pytest.raises(RunError, match="0 at step 0"):
        Scores(importance, sensitivity + 1, "", "")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    with pytest.raises(RunError, match="cannot read the scores"):
        Scores.load(path)
    Scores(*arrays(), "", "").save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RunError, match="cannot read the scores"):
        Scores.load(path)


def test_sampler_digest_depends_on_the_coefficients() -> None:
    assert sampler_digest(make_sampler("ddim", 5)) == sampler_digest(make_sampler("ddim", 5))
    assert sampler_digest(make_sampler("ddim", 5)) != sampler_digest(make_sampler("ddim", 6))


@pytest.mark.parametrize("tokens", [16, 6])
def test_figures_can_be_drawn(tmp_path: Path, tokens: int) -> None:
    scores = Scores(*arrays(N=tokens), "", "")
    importance_figure(scores).savefig(tmp_path / "a.png")
    sensitivity_figure(scores).savefig(tmp_path / "b.png")
    nothing = Scores(scores.importance_TLN, np.zeros_like(scores.sensitivity_TL2), "", "")
    sensitivity_figure(nothing).savefig(tmp_path / "c.png")
    router_figure(nothing.importance_TLN[..., :2]).savefig(tmp_path / "d.png")
    assert all((tmp_path / name).stat().st_size for name in ("a.png", "b.png", "c.png", "d.png"))
