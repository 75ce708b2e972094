"""The front: the best plan at every budget that was searched, as files of the run's folder.

front/front.json      a list of {"plan", "summary", "macs_speedup", "mse_reference", "mse_ode", "mse_stderr", "target", "chosen",
                                  "role", "budgets"}
front/<digest>.json   each plan
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tc_lightning.plan.atomic import write_atomically
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.policies.choice import FOLDER, FrontPoint, plan_file

NAME, TRIALS = "front.json", "trials.jsonl"


def write_front(points: tuple[FrontPoint, ...], folder: Path, own: CachePlan | None = None) -> None:
    """Write the plans, then the list of them, into a run's folder; what was found for another target stays.

    Args:
        points: what was found.
        folder: the run's folder.
        own: the run's own plan; None: the point that is chosen.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for point in points:
        point.plan.save(folder / plan_file(point.plan))
    targets = {point.target for point in points}
    others = [row for row in _known(folder / FOLDER / NAME) if row["target"] not in targets]
    chosen = {plan_file(own)} if own else {plan_file(point.plan) for point in points if point.chosen}
    rows = [{**row, "chosen": row["plan"] in chosen} for row in (*others, *(point.to_json() for point in points))]
    rows.sort(key=lambda row: (row["target"], row["macs_speedup"]))
    write_atomically(folder / FOLDER / NAME, (json.dumps(rows, indent=1) + "\n").encode())
    for path in (folder / FOLDER).glob("????????.json"):  # plans of an earlier list
        if f"{FOLDER}/{path.name}" not in {row["plan"] for row in rows}:
            path.unlink()


def _known(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier list; none if there is no list, or it is damaged: the plans can be searched for again."""
    try:
        kinds = {"target": str, "macs_speedup": float, "plan": str, "role": str, "budgets": list}
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [row | {name: kind(row[name]) for name, kind in kinds.items()} for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return []
