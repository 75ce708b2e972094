from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import vp_sampler
from safetensors.numpy import save_file

from tc_lightning.errors import RunError
from tc_lightning.measure.cache_cases import REPEATED, CacheCases
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


def test_the_cache_that_scores_are_of_is_kept_and_named(tmp_path: Path) -> None:
    path, cases = tmp_path / "scores.safetensors", CacheCases((1, 2), (2, 4), 2)
    repeated, scores = Scores(*arrays(), "t", "s"), Scores(*arrays(), "t", "s", cases=cases)
    scores.save(path)
    assert Scores.load(path).cases == cases
    assert Scores.load(path).digest == scores.digest != repeated.digest
    repeated.save(path)
    assert Scores.load(path).cases == REPEATED == CacheCases((0,), (1,))


def test_a_plan_says_of_scores_that_they_are_of_another_cache() -> None:
    scores = Scores(*arrays(), "t", "s", cases=CacheCases((1, 2), (3,)))
    assert scores.provenance([2, 1]) == scores.provenance([]) == {"scores": scores.digest}
    said = (
        "they were learned for a cache that forecasts at order 1 or 2 (keys and values at order 0) from full steps 3 apart, and this "
        "plan forecasts at order 0"
    )
    assert scores.provenance([0, 1]) == {"scores": scores.digest, "scores_of_another_cache": said}


def test_files_of_the_version_before_are_of_the_step_before(tmp_path: Path) -> None:
    importance, sensitivity = arrays()
    content = {"importance_TLN": importance, "sensitivity_TL2": sensitivity}
    path, metadata = tmp_path / "scores.safetensors", {"teacher": "t", "sampler": "s", "selector": ""}
    save_file(content, path, metadata)
    assert Scores.load(path).cases == REPEATED
    assert Scores.load(path).digest == Scores(importance, sensitivity, "t", "s").digest
    wrong = [
        ({"format_version": "3"}, "format version 3 is not 2"),
        ({"format_version": "2", "orders": "1"}, "cannot be read"),
        ({"format_version": "2", "orders": "1", "gaps": "2"}, "cannot be read"),
        ({"format_version": "2", "orders": "1", "gaps": "x", "kv_order": "0"}, "cannot be read"),
        ({"format_version": "2", "orders": "7", "gaps": "2", "kv_order": "0"}, r"orders are \[7\]"),
    ]
    for more, message in wrong:
        save_file(content, path, metadata | more)
        with pytest.raises(RunError, match=message):
            Scores.load(path)


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
    assert sampler_digest(vp_sampler("ddim", 5)) == sampler_digest(vp_sampler("ddim", 5))
    assert sampler_digest(vp_sampler("ddim", 5)) != sampler_digest(vp_sampler("ddim", 6))


@pytest.mark.parametrize("tokens", [16, 6])
def test_figures_can_be_drawn(tmp_path: Path, tokens: int) -> None:
    scores = Scores(*arrays(N=tokens), "", "")
    importance_figure(scores).savefig(tmp_path / "a.png")
    sensitivity_figure(scores).savefig(tmp_path / "b.png")
    nothing = Scores(scores.importance_TLN, np.zeros_like(scores.sensitivity_TL2), "", "")
    sensitivity_figure(nothing).savefig(tmp_path / "c.png")
    router_figure(nothing.importance_TLN[..., :2]).savefig(tmp_path / "d.png")
    assert all((tmp_path / name).stat().st_size for name in ("a.png", "b.png", "c.png", "d.png"))
