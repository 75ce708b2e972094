"""Timing of programs for the planner: each once, and the same plan the same price."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from conftest import FULL, make_plan, make_teacher
from content_plans import content_plan, make_selector

from export.bench import clock as clock_module
from export.bench.clock import ProgramClock, _key
from export.compiler import weight_files
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from export.runtime.sessions import RuntimeUnavailableError
from tc_lightning.models.companions import Companions
from tc_lightning.plan.segments import Segment, compute, content, partial, skip
from tc_lightning.planner.price import ClockPrice


def test_each_program_is_timed_once_whatever_plan_it_is_in() -> None:
    model = make_teacher()
    clock = ProgramClock(model, batch=1)
    skipping, longer = (make_plan(model, (FULL, FULL, *(((skip(0, 4, 1),),) * n), FULL)) for n in (1, 3))
    first, full = clock(skipping)
    known = dict(clock._known)
    second, again = clock(longer)
    assert clock._known == known
    assert again == full > 0
    assert second > first > 0  # two more steps
    price = ClockPrice(clock)
    assert price(longer) * full == pytest.approx(second)
    assert price.reference_ms(longer) == pytest.approx(6 * full)


@pytest.mark.parametrize(("provider", "shared"), [("cpu", True), ("cuda", False)])
def test_programs_share_graphs_where_the_provider_lets_them(provider: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA runtime refuses artefacts in which they do."""
    model = make_teacher()
    two, three = (partial(0, 2, (1, 5)), compute(2, 4)), (partial(0, 2, (0, 9, 11)), compute(2, 4))
    seen: list[dict[str, Any]] = []

    def load(path: Path, asked: str, max_batch: int, manifest: dict[str, Any]) -> None:
        assert asked == provider
        seen.append(manifest["programs"])
        raise RuntimeUnavailableError("far enough")

    monkeypatch.setattr(clock_module, "CachedSampler", load)
    with pytest.raises(RuntimeUnavailableError):
        ProgramClock(model, provider, batch=1)(make_plan(model, (FULL, two, three, FULL, two)))
    assert any(program["graph"] != name for name, program in seen[0].items()) == shared


def test_weights_are_written_once_for_all_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    model, written = make_teacher(), []
    write = weight_files.write_weights
    monkeypatch.setattr(weight_files, "write_weights", lambda *given: (written.append(given[1]), write(*given))[1])
    clock = ProgramClock(model, batch=1)
    for order in range(3):
        clock(make_plan(model, (FULL, FULL, FULL, (skip(0, 4, order),))))
    assert len(written) == 1
    folder = written[0].parent
    assert [path.name for path in folder.iterdir()] == ["0.data"]
    del clock
    assert not folder.exists()


def test_a_plan_that_looks_at_the_image_is_timed() -> None:
    model = make_teacher()
    selector = make_selector(model)
    steps, full = ProgramClock(model, batch=1, companions=Companions(selector))(content_plan(model, selector))
    assert steps > full > 0


def test_programs_that_compute_another_number_of_tokens_are_not_one() -> None:
    """Content tokens are not listed, only counted; to choose them takes time that listed ones do not."""
    model = make_teacher()

    def key(segment: Segment, selector: str = "") -> tuple[object, ...]:
        chosen = dataclasses.replace(make_plan(model, (FULL, FULL)), steps=(FULL, (segment,)), selector=selector)
        return _key(next(program for program in lower(chosen, "cpu").programs if program.reads), False)

    keys = [key(content(0, 4, keep), "a" * 64) for keep in (2, 3)] + [key(partial(0, 4, tokens)) for tokens in ((0, 1), (0, 1, 2))]
    assert len(set(keys)) == 4
    assert key(partial(0, 4, (0, 1))) == key(partial(0, 4, (5, 9)))


def test_times_of_programs_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a receipt has none unless they are."""
    sample, asked = CachedSampler.sample, []
    monkeypatch.setattr(
        CachedSampler, "sample", lambda self, *a, **more: (asked.append(more.get("timing")), sample(self, *a, **more))[1]
    )
    model = make_teacher()
    ProgramClock(model, batch=1)(make_plan(model, (FULL, (skip(0, 4, 0),))))
    assert set(asked) == {True}
