"""What the tests of the two halves of guidance share: a skipped step, and the entries of a cache it reads."""

from __future__ import annotations

from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.segments import skip

SKIP = (skip(0, 4, 1),)
DIFFERENCE = Entry("guidance", 0, 4)
COND, UNCOND = (Entry("span", 0, 4, half) for half in ("cond", "uncond"))
