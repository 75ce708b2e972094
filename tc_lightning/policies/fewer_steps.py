"""The baseline that every cache must beat: full compute with as many steps as the budget pays for."""

from __future__ import annotations

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.diffusion.schedule import SPACINGS
from tc_lightning.errors import PlanError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import full_step_macs
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import compute
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.targeted import Offer, TargetedPolicy


def fewer_steps_plan(
    signature: ModelSignature,
    sampler_name: str,
    spacing: str,
    guidance: Guidance,
    macs_budget: float,
    reference: SamplerTable,
) -> CachePlan:
    """Full compute with the largest number of steps that costs at most the budget.

    Args:
        signature: the model.
        sampler_name: for example `ddim`.
        spacing: for example `uniform`.
        guidance: guidance scale and channels.
        macs_budget: multiply-accumulates for one sample (one half of guidance), as `costs.plan_macs` counts them.
        reference: sampler of the run that the plan replaces.

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
    return CachePlan(signature, sampler, guidance, steps, reference, provenance)


class FewerStepsPolicy(TargetedPolicy):
    """Full compute with fewer steps of one sampler, at the spacing of least error on held-out trajectories.

    Args:
        sampler: a deterministic sampler, for example ddim or dpmpp_2m; it need not be the one whose run is replaced.
        target_speedup: in MACs, at least; None takes the number of steps as it is given.
        num_steps: sampling steps.
        spacings: spacings to choose from.
        images: held-out images on which spacings are compared.

    Raises:
        PlanError: if an argument is out of range, or the sampler adds noise.
        TokenCacheError: if the sampler or a spacing is unknown.
    """

    def __init__(
        self,
        sampler: str = "ddim",
        target_speedup: float | None = None,
        num_steps: int = 20,
        spacings: tuple[str, ...] = (*SPACINGS, "mix:0.5"),
        images: int = 4,
    ) -> None:
        super().__init__(target_speedup, images)
        if not spacings:
            raise PlanError(f"spacings is empty: choose from {', '.join(SPACINGS)}.")
        for spacing in spacings:
            if make_sampler(sampler, num_steps, spacing).stochastic:
                raise PlanError(f"{sampler} adds noise, and its trajectories cannot be compared: choose another sampler.")
        self.name = f"fewer_steps_{sampler}"
        self.sampler, self.num_steps, self.spacings = sampler, num_steps, tuple(spacings)

    def least_macs(self, signature: ModelSignature, sampler: SamplerTable) -> float:
        """One step."""
        return full_step_macs(signature)

    def published(self, context: PlanningContext) -> list[Offer]:
        """See `TargetedPolicy`."""
        return self._offers(context.signature, self.num_steps)

    def within(self, context: PlanningContext, budget: float) -> list[Offer]:
        """See `TargetedPolicy`."""
        return self._offers(context.signature, int(budget / full_step_macs(context.signature) + 1e-9))

    def _offers(self, signature: ModelSignature, num_steps: int) -> list[Offer]:
        tables = [make_sampler(self.sampler, num_steps, spacing) for spacing in self.spacings]
        steps = ((compute(0, signature.depth),),) * num_steps
        return [Offer(steps, {"sampler": self.sampler, "spacing": t.spacing, "num_steps": num_steps}, t) for t in tables]
