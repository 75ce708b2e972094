"""What the tests of plans share: a plan of every mode, and its JSON with a value replaced."""

from __future__ import annotations

import json
from typing import Any

from conftest import SIGNATURE, make_plan

PLAN = make_plan(SIGNATURE, policy="test", arguments={"share": 0.1, "names": ["a"]})


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """JSON of `PLAN` with the value at a path replaced."""
    raw = json.loads(json.dumps(PLAN.to_json()))
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return raw
