"""All policies by name, at one target: what a comparison or a planner goes through."""

from __future__ import annotations

from tc_lightning.diffusion.samplers import SOLVERS
from tc_lightning.policies.base import Policy
from tc_lightning.policies.budcache import BudCachePolicy
from tc_lightning.policies.delta_dit import DeltaDiTPolicy
from tc_lightning.policies.dp_placement import DPPlacementPolicy
from tc_lightning.policies.dpcache import DPCachePolicy
from tc_lightning.policies.ecad import ECADPolicy
from tc_lightning.policies.ertacache import ERTACachePolicy
from tc_lightning.policies.feb_cache import EBCachePolicy, FEBCachePolicy
from tc_lightning.policies.fewer_steps import FewerStepsPolicy
from tc_lightning.policies.foca import FoCaPolicy
from tc_lightning.policies.fora import FORAPolicy
from tc_lightning.policies.harmonica import HarmoniCaPolicy
from tc_lightning.policies.hicache import HiCachePolicy
from tc_lightning.policies.l2p import L2PPolicy
from tc_lightning.policies.learning_to_cache import LearningToCachePolicy
from tc_lightning.policies.magcache import MagCachePolicy
from tc_lightning.policies.smoothcache import SmoothCachePolicy
from tc_lightning.policies.spectrum import SpectrumPolicy
from tc_lightning.policies.targeted import TargetedPolicy
from tc_lightning.policies.taylorseer import TaylorSeerPolicy
from tc_lightning.policies.toca import ToCaPolicy
from tc_lightning.policies.tokencache_v1 import TokenCacheV1Policy
from tc_lightning.policies.tokencache_v2 import TokenCacheV2Policy

_METHODS: tuple[type[TargetedPolicy], ...] = (
    TokenCacheV1Policy,
    TokenCacheV2Policy,
    FORAPolicy,
    TaylorSeerPolicy,
    HiCachePolicy,
    FoCaPolicy,
    SpectrumPolicy,
    L2PPolicy,
    DeltaDiTPolicy,
    EBCachePolicy,
    FEBCachePolicy,
    ToCaPolicy,
    SmoothCachePolicy,
    DPPlacementPolicy,
    DPCachePolicy,
    MagCachePolicy,
    ERTACachePolicy,
    BudCachePolicy,
    ECADPolicy,
    LearningToCachePolicy,
    HarmoniCaPolicy,
)


def standard_policies(target_speedup: float) -> dict[str, Policy]:
    """Every published method, and fewer steps of every solver.

    Which of them can plan in a given run, and why not, `Policy.unavailable` tells.

    Args:
        target_speedup: in MACs against the full-compute run, at least.

    Raises:
        PlanError: if the target is not above 1.
    """
    methods: list[TargetedPolicy] = [method(target_speedup=target_speedup) for method in _METHODS]  # type: ignore[call-arg]
    methods += [FewerStepsPolicy(name, target_speedup) for name in SOLVERS]
    return {policy.name: policy for policy in methods}
