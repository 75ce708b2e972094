"""The baseline that every cache must beat: full compute with as many steps as the budget pays for."""

from __future__ import annotations

from tc_lightning.costs import full_step_macs
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.diffusion.table import SamplerTable
from tc_lightning.errors import PlanError
from tc_lightning.plan import CachePlan, Guidance, ModelSignature, compute


def fewer_steps_plan(
    signature: ModelSignature,
    sampler_name: str,
    spacing: str,
    guidance: Guidance,
    macs_budget: float,
    reference: SamplerTable | None = None,
) -> CachePlan:
    """Full compute with the largest number of steps that costs at most the budget.

    Args:
        signature: the model.
        sampler_name: for example `ddim`.
        spacing: for example `uniform`.
        guidance: guidance scale and channels.
        macs_budget: multiply-accumulates for one sample (one half of guidance), as `costs.plan_macs` counts them.
        reference: sampler of the run that the plan replaces; None leaves it without one.

    Raises:
        PlanError: if the budget does not pay for a single step.
        TokenCacheError: if the sampler or the spacing is unknown.
    """
    step = full_step_macs(signature)
    num_steps = int(macs_budget // step)
    if num_steps < 1:
        raise PlanError(f"a budget of {macs_budget:.4g} MACs does not pay for one full step of {step:.4g}: raise it.")
    sampler = make_sampler(sampler_name, num_steps, spacing)
    provenance = {"policy": "fewer_steps", "arguments": {"macs_budget": macs_budget}}
    steps = ((compute(0, signature.depth),),) * num_steps
    return CachePlan(signature, sampler, guidance, steps, provenance, reference=reference)
