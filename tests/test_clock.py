"""Timing of programs for the planner: each once, and the same plan the same price."""

from __future__ import annotations

import pytest
from conftest import FULL, make_plan, make_teacher

from export.clock import ProgramClock
from tc_lightning.planner.price import ClockPrice
from tc_lightning.segments import skip


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
