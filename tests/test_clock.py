"""Timing of programs for the planner: each once, and the same plan the same price."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import FULL, make_plan, make_teacher

from export.clock import ProgramClock, _key
from export.programs import lower
from tc_lightning.planner.price import ClockPrice
from tc_lightning.segments import Segment, content, partial, skip


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


def test_programs_that_compute_another_number_of_tokens_are_not_one() -> None:
    """Content tokens are not listed, only counted; to choose them takes time that listed ones do not."""
    model = make_teacher()

    def key(segment: Segment, selector: str = "") -> tuple[object, ...]:
        chosen = dataclasses.replace(make_plan(model, (FULL, FULL)), steps=(FULL, (segment,)), selector=selector)
        return _key(next(program for program in lower(chosen).programs if program.reads), False)

    keys = [key(content(0, 4, keep), "a" * 64) for keep in (2, 3)] + [key(partial(0, 4, tokens)) for tokens in ((0, 1), (0, 1, 2))]
    assert len(set(keys)) == 4
    assert key(partial(0, 4, (0, 1))) == key(partial(0, 4, (5, 9)))
