"""Two-Phase Round-Robin (TokenCache, Lou, Luo, Liu, Li et al., arXiv 2409.18523), and a search for what the paper leaves open.

The denoising process is split at step `boundary`. In each phase an I-step, which computes everything, is followed by K - 1
P-steps, which do not; the first, noisy phase has the longer interval. The paper gives no values for boundary, K1 and K2, so
`TPRRPolicy` tries them on held-out trajectories, together with what a P-step does (`tc_lightning.policies.pruned_steps`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tc_lightning.errors import PlanError
from tc_lightning.measure.psnr import psnr_db
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.forecasts import MAX_ORDER
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext, Policy
from tc_lightning.policies.choice import PlanChoice
from tc_lightning.policies.pruned_steps import KINDS, PrunedStep

BUDGET_SLACK = 0.12  # a candidate that leaves more than this share of the affordable MACs unused is not tried


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Where the I-steps stand.

    Args:
        boundary: first step of the second phase.
        k1: interval of the first phase: one I-step, then k1 - 1 P-steps.
        k2: interval of the second phase.
        warmup: steps computed in full at the start; the last of them is the first I-step of the rounds. CacheCases of order 1
            and 2 are what they say from the second and third full step on.

    Raises:
        PlanError: if an interval or the warm-up is below 1, or the boundary is negative.
    """

    boundary: int
    k1: int
    k2: int
    warmup: int = 1

    def __post_init__(self) -> None:
        if min(self.k1, self.k2, self.warmup) < 1 or self.boundary < 0:
            raise PlanError(f"{self}: intervals and warm-up must be at least 1, the boundary at least 0.")

    def full_steps(self, num_steps: int) -> list[int]:
        """The I-steps of a process of `num_steps` steps; step 0 and the first step of each phase are always among them."""
        first = range(self.warmup - 1, min(self.boundary, num_steps), self.k1)
        second = range(max(self.boundary, self.warmup - 1), num_steps, self.k2)
        return sorted({*range(min(self.warmup, num_steps)), *first, *second})

    def phase(self, step: int, num_steps: int) -> list[int]:
        """The P-steps of the phase that `step` belongs to."""
        bounds = range(self.boundary) if step < self.boundary else range(self.boundary, num_steps)
        full = set(self.full_steps(num_steps))
        return [i for i in bounds if i < num_steps and i not in full]


def tprr_plan(
    signature: ModelSignature,
    sampler: SamplerTable,
    guidance: Guidance,
    reference: SamplerTable,
    *,
    boundary: int,
    k1: int,
    k2: int,
    pruned_step: Callable[[int], tuple[Segment, ...]],
    warmup: int = 1,
    provenance: Mapping[str, Any] | None = None,
) -> CachePlan:
    """Two-Phase Round-Robin plan.

    Args:
        signature: the model.
        sampler: the sampler; its length is the number of steps.
        guidance: guidance scale and channels.
        reference: sampler of the run that the plan replaces.
        boundary: first step of the second phase; at 0, or from the number of steps on, there is one phase.
        k1: interval of the first phase.
        k2: interval of the second phase.
        pruned_step: segments of the P-step at a given step.
        warmup: full steps at the start.
        provenance: arguments and digests to add to the plan's.

    Raises:
        PlanError: if an argument is out of range, or a P-step's segments are not valid.
    """
    full = set(Rounds(boundary, k1, k2, warmup).full_steps(len(sampler)))
    steps = tuple((compute(0, signature.depth),) if i in full else pruned_step(i) for i in range(len(sampler)))
    return CachePlan(signature, sampler, guidance, steps, reference, {"policy": "tprr", **(provenance or {})})


class _Candidate(NamedTuple):
    rounds: Rounds
    pruned: PrunedStep
    plan: CachePlan


class TPRRPolicy(Policy):
    """Search over two-phase schedules and P-steps by successive halving; deterministic.

    Every candidate reaches the target and uses its budget. All are measured on a few held-out trajectories, the best on all of
    them; the plan is the one of lowest error.

    Args:
        target_speedup: in MACs, at least.
        max_interval: largest interval between full steps.
        orders: forecast orders to try: 0 repeats, 1 and 2 extrapolate.
        kinds: kinds of P-step to try: skip, edges, branch, partial.
        block_shares: shares of the blocks not skipped in edges, branch and partial P-steps.
        token_shares: shares of the tokens recomputed in partial P-steps.
        warmups: numbers of full steps at the start.
        screen_images: held-out images of the first round.
        max_candidates: plans measured in the first round, shared evenly between the kinds of P-step.
        finalists: plans measured on all images.
        progress: show a progress bar.

    Raises:
        PlanError: if an argument is out of range.
    """

    def __init__(
        self,
        target_speedup: float = 2.5,
        max_interval: int = 6,
        orders: tuple[int, ...] = (0, 1, 2),
        kinds: tuple[str, ...] = KINDS,
        block_shares: tuple[float, ...] = (0.1, 0.25),
        token_shares: tuple[float, ...] = (0.25, 0.5),
        warmups: tuple[int, ...] = (1, 3),
        screen_images: int = 8,
        max_candidates: int = 48,
        finalists: int = 6,
        progress: bool = True,
    ) -> None:
        if target_speedup <= 1.0:
            raise PlanError(f"target_speedup {target_speedup:g} asks for nothing: choose a value above 1, for example 2.5.")
        if min(max_interval - 1, screen_images, max_candidates, finalists, *warmups) < 1 or not (orders and kinds and warmups):
            raise PlanError("max_interval must be at least 2; images, candidates, finalists and warmups at least 1; no list empty.")
        if not all(0 <= order <= MAX_ORDER for order in orders):
            raise PlanError(f"orders {list(orders)}: choose from 0 to {MAX_ORDER}.")
        self.target_speedup = target_speedup
        self.screen_images, self.max_candidates, self.finalists = screen_images, max_candidates, finalists
        self.max_interval, self.warmups, self.progress = max_interval, tuple(warmups), progress
        self.pruned = _pruned_steps(kinds, orders, block_shares, token_shares)

    def check(self, signature: ModelSignature, sampler: SamplerTable) -> None:
        """Whether the target can be reached. All that scores change of a P-step's cost is which branch it reuses: try both.

        Raises:
            PlanError: if it cannot, with the largest target that can.
        """
        T, L, N, branches = len(sampler), signature.depth, signature.image_tokens, len(signature.block.names)
        either = np.zeros((branches, T, L, branches))
        either[range(branches), 1:, :, range(branches)] = 1.0
        blanks = [Scores(np.ones((T, L, N)), each, signature.teacher, sampler_digest(sampler)) for each in either]
        costs = {p: min(p.cost(signature, blank) for blank in blanks) for p in self.pruned}
        if not any(next(self._rounds(T, self.target_speedup, cost), None) for cost in costs.values()):
            raise PlanError(self._unreachable(costs, T))

    def plan(self, context: PlanningContext) -> PlanChoice:
        """Choose a plan; the table lists the finalists first, then the others, each by error.

        Raises:
            PlanError: if no candidate reaches the target, or all of them diverge.
        """
        found = self._candidates(context)
        screened = self._measure(context, found, self.screen_images, "screening plans")
        best = sorted(range(len(found)), key=screened.__getitem__)[: self.finalists]
        finals = dict(zip(best, self._measure(context, [found[j] for j in best], None, "measuring finalists"), strict=True))
        chosen = min(best, key=finals.__getitem__)
        if finals[chosen] == float("inf"):
            raise PlanError("every plan that was tried makes the latents NaN or infinite: lower target_speedup, or use orders 0, 1.")
        rows = [_row(c, screened[j], finals.get(j), j == chosen) for j, c in enumerate(found)]
        order = [*sorted(best, key=finals.__getitem__), *sorted(set(range(len(found))) - set(best), key=screened.__getitem__)]
        return PlanChoice(found[chosen].plan, [rows[j] for j in order])

    def _measure(self, context: PlanningContext, found: list[_Candidate], images: int | None, what: str) -> list[float]:
        bar = tqdm(found, desc=what, unit="plan", disable=not self.progress)
        return [context.evaluate(candidate.plan, images) for candidate in bar]

    def _candidates(self, context: PlanningContext) -> list[_Candidate]:
        """At most `max_candidates` plans within the budget: by turns one of each kind of P-step, as long as there are any."""
        T = len(context.sampler)
        costs = {p: p.cost(context.signature, context.scores) for p in self.pruned}
        offers = {p: list(self._rounds(T, self.target_speedup, costs[p])) for p in self.pruned}
        macs = {(p, r): _relative_macs(r, costs[p], T) for p, rounds in offers.items() for r in rounds}
        if not macs:
            raise PlanError(self._unreachable(costs, T))
        least = max(macs.values()) * (1.0 - BUDGET_SLACK)
        queues: dict[str, list[tuple[PrunedStep, Rounds]]] = defaultdict(list)
        for p, r in _by_turns([[(p, r) for r in rounds if macs[p, r] >= least] for p, rounds in offers.items()]):
            queues[p.kind].append((p, r))
        picked = itertools.islice(_by_turns(list(queues.values())), self.max_candidates)
        return [_Candidate(r, p, _build(context, r, p)) for p, r in picked]

    def _rounds(self, num_steps: int, target: float, cost: float) -> Iterator[Rounds]:
        """Schedules that reach the target with P-steps of this cost: for every pair of intervals the one with the most I-steps.

        The shortest intervals come first, and of equal k1 those whose full steps are densest at the end, where errors are not
        made good any more (digits teacher, half trained: k2 = 1 had about half the error of k2 = 2).
        """
        intervals = itertools.combinations_with_replacement(range(1, self.max_interval + 1), 2)
        seen = set()
        for k2, k1 in sorted((pair for pair in intervals if pair[1] > 1), key=lambda pair: (pair[1], pair[0])):
            for warmup in self.warmups:
                boundaries = range(num_steps + 1) if k1 > k2 else (0,)
                fitting = (Rounds(b, k1, k2, warmup) for b in boundaries)
                rounds = next((r for r in fitting if _relative_macs(r, cost, num_steps) <= num_steps / target), None)
                if rounds and (steps := tuple(rounds.full_steps(num_steps))) not in seen:
                    seen.add(steps)
                    yield rounds

    def _unreachable(self, costs: Mapping[PrunedStep, float], num_steps: int) -> str:
        sparsest = Rounds(0, self.max_interval, self.max_interval, min(self.warmups))
        most = max(num_steps / _relative_macs(sparsest, cost, num_steps) for cost in costs.values())
        return (
            f"target_speedup {self.target_speedup:g} is not reachable with {num_steps} steps, max_interval {self.max_interval} "
            f"and the P-steps allowed: choose above 1, up to {most:.2f}, or raise max_interval."
        )


def _pruned_steps(
    kinds: Sequence[str], orders: Sequence[int], block_shares: Sequence[float], token_shares: Sequence[float]
) -> list[PrunedStep]:
    """All P-steps described by the arguments."""
    found = []
    for kind in kinds:
        blocks = (0.0,) if kind == "skip" else block_shares
        tokens = token_shares if kind == "partial" else (0.0,)
        found += [PrunedStep(kind, order, b, t) for b, t, order in itertools.product(blocks, tokens, orders)]
    if not found:
        raise PlanError("no P-step is described: name a kind, and shares for the kinds that use them.")
    return found


def _by_turns(queues: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """First item of each queue, then the second of each, and so on."""
    for items in itertools.zip_longest(*queues):
        yield from (item for item in items if item is not None)


def _relative_macs(rounds: Rounds, cost: float, num_steps: int) -> float:
    """MACs of a schedule in full steps."""
    full = len(rounds.full_steps(num_steps))
    return full + (num_steps - full) * cost


def _build(context: PlanningContext, rounds: Rounds, pruned: PrunedStep) -> CachePlan:
    T = len(context.sampler)

    def pruned_step(step: int) -> tuple[Segment, ...]:
        return pruned.segments(context.signature, context.scores, rounds.phase(step, T), step)

    where = dataclasses.asdict(rounds)
    provenance = {"arguments": {**where, **dataclasses.asdict(pruned)}, **context.scores.provenance(pruned.orders)}
    return tprr_plan(
        context.signature, context.sampler, context.guidance, context.reference, **where, pruned_step=pruned_step, provenance=provenance
    )


def _row(candidate: _Candidate, screened: float, mse: float | None, chosen: bool) -> dict[str, Any]:
    """A line of the table; `psnr` is that of the mean error, which is at most the mean over images."""
    return {
        **dataclasses.asdict(candidate.pruned),
        **dataclasses.asdict(candidate.rounds),
        "full_steps": len(candidate.plan.full_steps),
        "macs_speedup": macs_speedup(candidate.plan),
        "mse_screen": screened,
        "mse": mse,
        "psnr": None if mse is None else psnr_db(mse),
        "chosen": chosen,
    }
