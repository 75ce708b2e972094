"""Whole-step reuse at even distances: every n-th step is full, the others repeat its residual."""

from __future__ import annotations

from tc_lightning.costs import full_step_macs, step_macs
from tc_lightning.diffusion.table import SamplerTable
from tc_lightning.errors import PlanError
from tc_lightning.plan import CachePlan, Guidance, ModelSignature, compute, skip


def uniform_reuse_plan(signature: ModelSignature, sampler: SamplerTable, guidance: Guidance, target_speedup: float) -> CachePlan:
    """FORA (Selvaraju et al., arXiv 2407.01425) on whole steps: full steps evenly spread, order 0 in between.

    As many steps are full as the target allows. Their number need not divide that of all steps: distances then differ by one.

    Args:
        signature: the model.
        sampler: the sampler.
        guidance: guidance scale and channels.
        target_speedup: in MACs, at least.

    Raises:
        PlanError: if the target is not above 1, or a single full step is too expensive for it.
    """
    T, full, skipped = len(sampler), (compute(0, signature.depth),), (skip(0, signature.depth),)
    dear, cheap = full_step_macs(signature), step_macs(signature, skipped)
    most = T * dear / (dear + (T - 1) * cheap)
    if not 1.0 < target_speedup <= most:
        raise PlanError(f"target_speedup {target_speedup:g} is not reachable with {T} steps: choose above 1, up to {most:.2f}.")
    count = int((T * dear / target_speedup - T * cheap) / (dear - cheap) + 1e-9)
    wanted = {j * T // count for j in range(count)}
    steps = tuple(full if i in wanted else skipped for i in range(T))
    return CachePlan(signature, sampler, guidance, steps, {"policy": "uniform", "arguments": {"target_speedup": target_speedup}})
