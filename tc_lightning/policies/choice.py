"""What a policy answers: the plan, what else it looked at, and the best plans at other budgets."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup

Role = Literal["planned", "fewer steps"]
FOLDER = "front"  # of a run's folder, where plans of other budgets are


@dataclasses.dataclass(frozen=True)
class FrontPoint:
    """The best plan of one budget.

    Args:
        plan: the plan.
        target: what it was fitted and judged against: `reference` or `ode`.
        mse: mean squared error of its final latents against that, on images that the search never looked at.
        stderr: standard error of `mse` over these images.
        chosen: whether it is the run's own plan.
        role: `planned`, or `fewer steps`: full compute with a sampler fitted alike, which the plan of that budget has to beat.
        budgets: speed-ups that were asked for and ended on this plan.
    """

    plan: CachePlan
    target: str
    mse: float
    stderr: float
    chosen: bool
    role: Role = "planned"
    budgets: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A row of `front.json`; an error against the target that was not asked for is null."""
        return {
            "plan": plan_file(self.plan),
            "summary": self.plan.summary,
            "macs_speedup": macs_speedup(self.plan),
            "mse_reference": self.mse if self.target == "reference" else None,
            "mse_ode": self.mse if self.target == "ode" else None,
            "mse_stderr": self.stderr,
            "target": self.target,
            "chosen": self.chosen,
            "role": self.role,
            "budgets": list(self.budgets),
        }


@dataclasses.dataclass(frozen=True)
class PlanChoice:
    """The plan chosen, one row for each candidate that was looked at, and the best plans at other budgets, if any were looked for."""

    plan: CachePlan
    candidates: list[dict[str, Any]]
    front: tuple[FrontPoint, ...] = ()


def plan_file(plan: CachePlan) -> str:
    """Where a plan is in the run's folder."""
    return f"{FOLDER}/{plan.digest[:8]}.json"
