"""What a report compares: the run's plan, the planner's front, published methods at several budgets, and fewer steps."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tc_lightning.diffusion.samplers import SOLVERS
from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.errors import RunError, TokenCacheError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs, plan_macs
from tc_lightning.planner.fitted_fewer_steps import NAME as FITTED
from tc_lightning.planner.fitted_fewer_steps import fitted_fewer_steps
from tc_lightning.planner.front import NAME
from tc_lightning.policies.base import PlanningContext, Policy
from tc_lightning.policies.choice import FOLDER
from tc_lightning.policies.fewer_steps import fewer_steps_plan

REFERENCE, PLANNED, PUBLISHED, FEWER = "reference", "planned", "published", "fewer steps"
TARGET_NAMES = {"reference": "reference", "ode": "ODE"}
ROUNDING = 1.005  # a plan counts for a budget that it misses by half a percent
ROUNDED_UP = 1.01  # the least speed-up that is still one when rounded down
SLOWER = 1.12  # fewer steps are also measured with this much more work: a cache's saving on the clock is less than in MACs

Evaluate = Callable[[CachePlan], float]
Policies = Callable[[float], dict[str, Policy]]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One plan to be measured.

    Args:
        name: for people; distinct within a report.
        group: reference, planned, published or fewer steps.
        method: what the name begins with: plans of one method at several budgets share it.
        plan: the plan.
        speedup: MACs of the reference run over those of the plan.
    """

    name: str
    group: str
    method: str
    plan: CachePlan
    speedup: float


@dataclasses.dataclass(frozen=True)
class Missing:
    """A method that has no plan at a budget, and why."""

    method: str
    budget: float
    reason: str


def planned(reference: CachePlan, own: CachePlan, folder: Path, budgets: Sequence[float], most: int) -> Iterator[Contender]:
    """The run's plan and, where the planner left a front, at most `most` plans of it: those for the budgets first.

    Raises:
        RunError: if the front is damaged.
        PlanError: if one of its plans is.
    """
    yield _subject(reference, own, PLANNED, "this run's plan")
    rows = [row for row in front_rows(folder) if row["role"] == "planned"]
    for row in _representatives(rows, budgets, most):
        yield _subject(reference, _plan_of(folder, row), PLANNED, f"planner for the {TARGET_NAMES[row['target']]}")


def fitted(
    context: PlanningContext, reference: CachePlan, folder: Path, budgets: Sequence[float], on_plan: Callable[[str], object]
) -> Iterator[Contender | Missing]:
    """Fewer steps, fitted and refined: those of the planner's front, and for budgets of which it has none for the reference run, ones
    fitted now.

    Args:
        context: holds the model.
        reference: the reference run at full compute.
        folder: the run's folder.
        budgets: speed-ups in MACs.
        on_plan: called with a name before something is fitted.

    Raises:
        RunError: if the front is damaged.
        PlanError: if one of its plans is.
    """
    step, known = full_step_macs(reference.model), list[int]()
    for row in front_rows(folder):
        plan = _plan_of(folder, row)
        if not plan.caches:
            known += [plan.num_steps] * (row["target"] == "reference")
            yield _subject(reference, plan, FEWER, f"{FITTED} for the {TARGET_NAMES[row['target']]}")
    for budget in budgets:
        count = int(plan_macs(reference) / budget / step + 1e-9)
        if context.model is not None and 2 <= count < reference.num_steps and not {count, count + 1} & set(known):
            on_plan(f"{FITTED}, {budget:g}x")
            known.append(count)
            try:
                yield _subject(reference, fitted_fewer_steps(context.model, reference, count), FEWER, f"{FITTED} for the reference")
            except TokenCacheError as error:
                yield Missing(FITTED, budget, str(error))


def fewer_steps(schedule: Schedule, reference: CachePlan, budgets: Sequence[float], judge: Evaluate) -> Iterator[Contender]:
    """Full compute with fewer steps, by every solver at its best spacing for the budget.

    Rounding is in their favour: a budget that does not pay for a whole number of steps pays for one more. The best sampler of a
    budget also comes with some steps more, for the comparison at equal time.

    Args:
        schedule: the network's.
        reference: the reference run at full compute.
        budgets: speed-ups in MACs.
        judge: the error by which spacings and samplers are chosen.
    """
    for budget in budgets:
        count = math.ceil(reference.num_steps / budget)
        if count >= reference.num_steps:
            continue
        best = []
        for name in SOLVERS:
            tried = [_with_steps(schedule, reference, name, spacing, count) for spacing in schedule.spacings]
            best.append(min((judge(plan), j, plan) for j, plan in enumerate(tried)))
        more = min(math.ceil(count * SLOWER), reference.num_steps - 1)
        sampler = min(best, key=lambda entry: entry[0])[2].sampler
        plans = [*(plan for _, _, plan in best), _with_steps(schedule, reference, sampler.name, sampler.spacing, more)]
        yield from (_subject(reference, plan, FEWER, f"{plan.sampler.name} {plan.sampler.spacing}") for plan in plans)


def published(
    context: PlanningContext,
    reference: CachePlan,
    budgets: Sequence[float],
    policies: Policies,
    on_plan: Callable[[str], object] = lambda _: None,
) -> tuple[list[Contender], list[Missing]]:
    """Plans of every policy at every budget, and the policies that gave none.

    A method that reaches none of the budgets is shown with the plan of the greatest speed-up that it reaches.

    Args:
        context: what policies may look at.
        reference: the reference run at full compute.
        budgets: speed-ups in MACs.
        policies: the policies for a budget, by name.
        on_plan: called with a policy's name before it plans.
    """
    found: list[Contender | Missing] = []
    for budget in budgets:
        for method, policy in policies(budget).items():
            on_plan(f"{method} {budget:g}x")
            found.append(_published(context, reference, method, budget, policy))
    shown = {one.method for one in found if isinstance(one, Contender)}
    for method, policy in policies(min(budgets)).items():
        most = policy.most(context)
        if method in shown or not ROUNDED_UP <= most < min(budgets):
            continue
        on_plan(f"{method} {most:.2f}x")
        most = rounded_down(most)
        greatest = _published(context, reference, method, most, policies(most)[method])
        found += [greatest] if isinstance(greatest, Contender) else []  # why it has no plan is told of the budgets
    return [one for one in found if isinstance(one, Contender)], [one for one in found if isinstance(one, Missing)]


def _published(context: PlanningContext, reference: CachePlan, method: str, budget: float, policy: Policy) -> Contender | Missing:
    try:
        if (reason := policy.unavailable(context)) is not None:
            return Missing(method, budget, reason)
        return _subject(reference, policy.plan(context).plan, PUBLISHED, method)
    except TokenCacheError as error:
        return Missing(method, budget, str(error))


def rounded_down(speedup: float) -> float:
    """To two digits after the point, which a plan of that speed-up reaches; what rounding alone took from a number it keeps."""
    return math.floor(100 * speedup + 1e-9) / 100


def distinct(subjects: Iterable[Contender]) -> list[Contender]:
    """One subject for each thing that is computed, the first of its kind, with distinct names."""
    kept: dict[str, Contender] = {}
    for subject in subjects:
        kept.setdefault(_computation(subject.plan), subject)
    taken: dict[str, int] = {}
    result = []
    for subject in kept.values():
        taken[subject.name] = taken.get(subject.name, 0) + 1
        suffix = f" ({taken[subject.name]})" if taken[subject.name] > 1 else ""
        result.append(dataclasses.replace(subject, name=subject.name + suffix))
    return result


def _subject(reference: CachePlan, plan: CachePlan, group: str, method: str) -> Contender:
    speedup = plan_macs(reference) / plan_macs(plan)
    group = FEWER if group == PUBLISHED and len(plan.full_steps) == plan.num_steps else group
    return Contender(
        f"{method}, {plan.num_steps} steps" if group == FEWER else f"{method}, {speedup:.2f}x", group, method, plan, speedup
    )


def _with_steps(schedule: Schedule, reference: CachePlan, sampler: str, spacing: str, steps: int) -> CachePlan:
    budget = steps * full_step_macs(reference.model)
    return fewer_steps_plan(reference.model, schedule, sampler, spacing, reference.guidance, budget, reference.sampler)


def front_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of the planner's front, in order of speed-up; none where there is no front.

    Raises:
        RunError: if the front is damaged.
    """
    path = folder / FOLDER / NAME
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if any(row["target"] not in TARGET_NAMES or not (row["role"] and row["plan"]) for row in rows):
            raise ValueError("a row of another kind")
        return sorted(rows, key=lambda row: float(row["macs_speedup"]))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error!r}): plan again with `python -m tc_lightning plan --run {folder}`.") from error


def _plan_of(folder: Path, row: dict[str, Any]) -> CachePlan:
    """The plan of a row of the front."""
    return CachePlan.load(folder / row["plan"])


def _representatives(entries: list[dict[str, Any]], budgets: Sequence[float], most: int) -> list[dict[str, Any]]:
    """The chosen plan, the best for each budget by either target, and others evenly spread over the front, in order of speed-up."""
    picked = [i for i, entry in enumerate(entries) if entry.get("chosen")]
    for budget in budgets:
        enough = [i for i, entry in enumerate(entries) if entry["macs_speedup"] * ROUNDING >= budget]
        for target in ("mse_ode", "mse_reference"):
            judged = [i for i in enough if entries[i][target] is not None]
            picked += [min(judged, key=lambda i: entries[i][target])] if judged else []
    spread = [round(j * (len(entries) - 1) / max(most - 1, 1)) for j in range(most)] if entries else []
    return [entries[i] for i in sorted(list(dict.fromkeys([*picked, *spread]))[:most])]


def _computation(plan: CachePlan) -> str:
    """The plan's digest without its provenance and its reference: what is computed, not who asked for it or in place of what."""
    return dataclasses.replace(plan, provenance={}, reference=plan.sampler, fewer_steps=None).digest
