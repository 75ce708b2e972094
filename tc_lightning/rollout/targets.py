"""What plans are measured against: final latents of the reference run and of the converged ODE, from noise that was not trained on.

Shape suffixes: B images, C H W latent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from torch import Tensor

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.diffusion.schedule import Schedule
from tc_lightning.models.conditions import Given, drawn_given
from tc_lightning.models.network import Network
from tc_lightning.plan.atomic import write_atomically
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.given import Arrays
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.plan.tensor_files import TensorFileError, read_tensors
from tc_lightning.rollout.evaluation import OnStep, final_latents
from tc_lightning.rollout.sampling import full_plan, noise_for

ODE_SAMPLER, ODE_SPACING, ODE_STEPS = "dpmpp_2m", "logsnr", 400


def converged_ode(schedule: Schedule, steps: int = ODE_STEPS) -> SamplerTable:
    """The sampler whose run stands for the converged solution of the teacher's ODE, wherever one is compared with or planned for."""
    return make_sampler(schedule, ODE_SAMPLER, min(steps, schedule.most_steps), ODE_SPACING)


@dataclasses.dataclass(frozen=True)
class TargetKey:
    """All that targets depend on.

    Args:
        model: the teacher.
        schedule: its schedule.
        reference: sampler of the reference run.
        guidance: guidance scale and channels.
        seed: seed of the noise.
        images: number of images; their conditions are drawn (`tc_lightning.plan.given.drawn`).
        ode_steps: steps of the solver that stands for the converged ODE.
        examples: of conditions that cannot be drawn.
    """

    model: ModelSignature
    schedule: Schedule
    reference: SamplerTable
    guidance: Guidance
    seed: int
    images: int
    ode_steps: int = ODE_STEPS
    examples: Arrays | None = dataclasses.field(default=None, compare=False)

    @property
    def plans(self) -> dict[str, CachePlan]:
        """The two full-compute plans."""
        samplers = {"reference": self.reference, "ode": converged_ode(self.schedule, self.ode_steps)}
        return {name: full_plan(self.model, sampler, self.guidance) for name, sampler in samplers.items()}

    @property
    def digest(self) -> str:
        """sha256 of both plans, seed and conditions."""
        given = {name: value.tolist() for name, value in self.given.items()}
        content = [self.seed, given, *(plan.digest for plan in self.plans.values())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def given(self) -> Given:
        """Conditions of each image."""
        return drawn_given(self.model.conditions, self.seed, range(self.images), self.examples)

    @property
    def image_steps(self) -> int:
        """Steps times images that computing the targets takes."""
        return self.images * sum(plan.num_steps for plan in self.plans.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """Noise, conditions, and final latents [B, C, H, W] of the reference run and of the converged ODE, all on the CPU."""

    x_T: Tensor
    given: Given
    reference: Tensor
    ode: Tensor


def compute_targets(model: Network, key: TargetKey, on_step: OnStep = lambda _: None) -> Targets:
    """Run both plans at full compute, in batches on the model's device.

    Raises:
        TokenCacheError: if the teacher's latents become NaN.
    """
    x_T, given = noise_for(key.seed, range(key.images), model), key.given
    finals = {name: final_latents(model, plan, x_T, given, on_step=on_step) for name, plan in key.plans.items()}
    return Targets(x_T, given, finals["reference"], finals["ode"])


def cached_targets(model: Network, key: TargetKey, folder: Path, on_step: OnStep = lambda _: None) -> Targets:
    """Targets from `folder`, computed and written there if it has none for this key; a damaged file is computed again."""
    path = folder / f"{key.digest[:16]}.safetensors"
    if (known := _read(path, key, model)) is not None:
        on_step(key.image_steps)
        return known
    from safetensors.torch import save

    targets = compute_targets(model, key, on_step)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"reference": targets.reference.contiguous(), "ode": targets.ode.contiguous()}
    write_atomically(path, save(tensors, {"digest": key.digest}))
    return targets


def _read(path: Path, key: TargetKey, model: Network) -> Targets | None:
    x_T = noise_for(key.seed, range(key.images), model)
    try:
        finals, metadata = read_tensors(path, "pt")
    except TensorFileError:
        return None
    fit = all(final.shape == x_T.shape and final.dtype == x_T.dtype for final in finals.values())
    if metadata.get("digest") != key.digest or set(finals) != {"reference", "ode"} or not fit:
        return None
    return Targets(x_T, key.given, **finals)
