"""The reference sampler: runs a cache plan in torch, step by step. What the exported graphs must agree with.

Shape suffixes: B images (guidance doubles them inside), C H W latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tc_lightning.cache.semantics import Guided, Step, forecast, predict
from tc_lightning.diffusion.update import advance, coefficients
from tc_lightning.errors import TeacherError, TokenCacheError
from tc_lightning.models.checkpoints import teacher_digest
from tc_lightning.models.content_predictor import Selector, require_selector
from tc_lightning.models.dit import DiTConfig
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.dataflow import Entry, StepFlow
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.rollout.noise import drawn_labels, initial_noise

Store = dict[tuple[Entry, int], Tensor]  # (entry, step that wrote it) -> value


class RunState(NamedTuple):
    """What a run goes on from: the step to take, latents [B, C, H, W] before it, the sampler's last m as far as it looks back, latest
    first, and the cached values that this step or a later one reads."""

    step: int
    x: Tensor
    past: tuple[Tensor, ...]
    store: Store


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """A plan at work on some images, for those who take its steps themselves; `sample_steps` takes them all.

    Args:
        model: the teacher.
        plan: a plan for it.
        labels_B: class of each image.
        selector: the content predictor that the plan names.
    """

    model: Network
    plan: CachePlan
    labels_B: Tensor
    selector: Selector | None = None

    def check(self) -> None:
        """Refuse what does not belong together.

        Raises:
            TokenCacheError: if a label is out of range.
            PlanError: if the plan is for another model or content predictor.
            TeacherError: if the plan is guided and the model has no null label.
        """
        check_labels(self.labels_B, self.plan.model.num_classes)
        self.plan.require_model(model_signature(self.model, self.plan.model.teacher))
        require_null_label(self.model.config, self.plan.guidance)
        require_selector(self.plan, self.selector)

    def start(self, x_BCHW: Tensor) -> RunState:
        """Before the first step."""
        return RunState(0, x_BCHW, (), {})

    def predict(self, state: RunState) -> tuple[Tensor, dict[Entry, Tensor]]:
        """Guided eps [B, C, H, W] of a step, and what it writes; gradients are recorded if they are wanted."""
        flow = self.plan.flows[state.step]
        return _predict(self.model, self.plan, state.step, flow, state.x, self.labels_B, state.store, self.selector)

    def after(self, state: RunState, x_next: Tensor, m: Tensor, writes: dict[Entry, Tensor]) -> RunState:
        """The state that a step leads to; the old one belongs to whoever kept it."""
        store = _updated(state.store, writes, self.plan.flows, state.step)
        return RunState(state.step + 1, x_next, (m, *state.past)[: self.plan.sampler.history], store)


class SamplingStep(NamedTuple):
    """All there is to know of one sampling step.

    Latents before it, guided eps (not yet times the plan's `eps_scale`) and latents after it, each [B, C, H, W]; the solver's last m
    before it, latest first, and its own; the cached values that exist before it; the values that it writes.
    """

    step: int
    x: Tensor
    eps: Tensor
    x_next: Tensor
    past: tuple[Tensor, ...]
    m: Tensor
    store: Store
    writes: dict[Entry, Tensor]


def model_signature(model: Network, digest: str | None = None) -> ModelSignature:
    """Signature of a network; pass its digest if it is already known, since hashing reads every weight."""
    return model.signature(digest or teacher_digest(model))  # type: ignore[arg-type]


def full_plan(signature: ModelSignature, sampler: SamplerTable, guidance: Guidance) -> CachePlan:
    """The plan that computes everything: the run that it stands for is its own."""
    everything = (compute(0, signature.depth),)
    return CachePlan(signature, sampler, guidance, (everything,) * len(sampler), sampler, {"policy": "full"})


def reference_plan(plan: CachePlan) -> CachePlan:
    """The full-compute run that a plan replaces, as a plan of its own."""
    return full_plan(plan.model, plan.reference, plan.guidance)


def device_of(model: Network) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


def noise_for(seed: int, indices: range, model: Network, device: torch.device | str = "cpu", stream: int = 0) -> Tensor:
    """Initial noise of images `indices`, [B, C, H, W]."""
    c = model.config
    return torch.from_numpy(initial_noise(seed, indices, (c.in_channels, c.input_size, c.input_size), stream)).to(device)


def labels_for(seed: int, indices: Sequence[int], num_classes: int, device: torch.device | str = "cpu") -> Tensor:
    """Class of images `indices`, [B] int64, as `drawn_labels` draws it: few images are of all classes alike."""
    return torch.from_numpy(drawn_labels(seed, indices, num_classes)).to(device)


@torch.no_grad()
def sample_steps(
    model: Network,
    plan: CachePlan,
    x_BCHW: Tensor,
    labels_B: Tensor,
    seed: int = 0,
    first_index: int = 0,
    selector: Selector | None = None,
) -> Iterator[SamplingStep]:
    """Run a plan from noise, yielding every step.

    Args:
        model: the teacher.
        plan: a plan for this teacher (its shape is checked here; its digest by whoever loaded both).
        x_BCHW: initial noise.
        labels_B: class of each image.
        seed: seed of what a stochastic sampler adds.
        first_index: global index of the first image, which keys that noise.
        selector: the content predictor that the plan names, on the device of the latents; not looked at by plans without one.

    Raises:
        TokenCacheError: if a label is out of range, or the latents become NaN.
        PlanError: if the plan is for another model or content predictor.
        TeacherError: if the plan is guided and the model has no null label.
    """
    run = Rollout(model, plan, labels_B, selector)
    run.check()
    state = run.start(x_BCHW)
    for i, row in enumerate(plan.scaled_sampler.steps):
        eps, writes = run.predict(state)
        x_next, m = advance(state.x, eps, state.past, coefficients(row))
        if row.noise:
            x_next = x_next + row.noise * noise_for(
                seed, range(first_index, first_index + len(x_next)), model, x_next.device, stream=i + 1
            )
        if not torch.isfinite(x_next).all():
            raise TokenCacheError(f"latents became NaN or infinite at step {i} (t = {row.t:g}): check the teacher's weights.")
        yield SamplingStep(i, state.x, eps, x_next, state.past, m, state.store, writes)
        state = run.after(state, x_next, m, writes)


def sample(
    model: Network, plan: CachePlan, x_BCHW: Tensor, labels_B: Tensor, seed: int = 0, selector: Selector | None = None
) -> Tensor:
    """Final latents [B, C, H, W] of a plan; arguments and errors of `sample_steps`."""
    for state in sample_steps(model, plan, x_BCHW, labels_B, seed, selector=selector):
        x_BCHW = state.x_next
    return x_BCHW


def require_null_label(config: DiTConfig, guidance: Guidance) -> None:
    """Refuse guidance where there is nothing to guide away from.

    Raises:
        TeacherError: if the guidance scale is not 1 and the model has no null label.
    """
    if guidance.doubles_batch and not config.null_label:
        classes = config.num_classes
        other = f", or, if the last row is the null label, `num_classes` to {classes - 1}" if classes > 1 else ""
        raise TeacherError(
            f"guidance {guidance.scale:g} needs a null label, and the teacher has none: the rows of its label table are as many as its "
            f"classes ({classes}). Set `guidance_scale` to 1{other}."
        )


def check_labels(labels_B: Tensor, num_classes: int) -> None:
    """Refuse labels outside 0 to num_classes - 1.

    Raises:
        TokenCacheError: naming the first such label.
    """
    bad = labels_B[(labels_B < 0) | (labels_B >= num_classes)]
    if len(bad):
        raise TokenCacheError(f"label {int(bad[0])} is out of range: the model has classes 0 to {num_classes - 1}.")


def _predict(
    model: Network,
    plan: CachePlan,
    i: int,
    flow: StepFlow,
    x_BCHW: Tensor,
    labels_B: Tensor,
    store: Store,
    selector: Selector | None,
) -> tuple[Tensor, dict[Entry, Tensor]]:
    """Guided eps of step i, and what it writes."""
    cached = {r.entry: forecast([store[r.entry, s] for s in r.sources], r.weights) for r in flow.reads}
    kept = tuple(kept_tokens(s, x_BCHW.device) for s in plan.steps[i])
    y = _rows(plan, i, labels_B)
    t_M = torch.full((len(y),), plan.sampler.steps[i].t, device=x_BCHW.device)
    mods, final = model.modulations(model.condition(t_M, y))
    guidance = plan.guidance
    guided = Guided(plan.guidance_mode(i).mode, guidance.scale, guidance.channels) if guidance.doubles_batch else None
    step = Step(plan.steps[i], kept, cached, flow.writes, None if selector is None else selector.scorer(model, t_M[: len(x_BCHW)]))
    return predict(step, guided, x_BCHW, model, mods, final, plan.model.in_channels)


def _rows(plan: CachePlan, i: int, labels_B: Tensor) -> Tensor:
    """Labels of the rows that step i computes: those given, then as many of the null class where it computes both halves."""
    if not plan.guidance.doubles_batch or plan.guidance_mode(i).single:
        return labels_B
    return torch.cat([labels_B, torch.full_like(labels_B, plan.model.num_classes)])


def kept_tokens(segment: Segment, device: torch.device | str = "cpu") -> Tensor | None:
    """Index tensor [K] of a static partial segment; None for others."""
    return torch.tensor(segment.tokens, device=device) if segment.tokens else None


def _updated(store: Store, writes: dict[Entry, Tensor], flows: Sequence[StepFlow], i: int) -> Store:
    """The store with this step's writes, less what no later step reads."""
    still_read = {(read.entry, source) for flow in flows[i + 1 :] for read in flow.reads for source in read.sources}
    known = store | {(entry, i): value for entry, value in writes.items()}
    return {key: value for key, value in known.items() if key in still_read}
