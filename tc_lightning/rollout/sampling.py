"""The reference sampler: runs a cache plan in torch, step by step. What the exported graphs must agree with.

Shape suffixes: B images (guidance doubles them inside), C H W latent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tc_lightning.cache.semantics import Guided, Step, forecast, predict
from tc_lightning.diffusion.update import advance, coefficients
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.checkpoints import teacher_digest
from tc_lightning.models.conditions import Asked, Given, drawn_given, given_of, require_given, require_null
from tc_lightning.models.content_predictor import Selector, require_selector
from tc_lightning.models.network import Constants, Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.dataflow import Entry, StepFlow
from tc_lightning.plan.given import drawn_labels, part_for
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, compute
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.rollout.noise import initial_noise

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
        asked: conditions of each image; of a class-conditional model its labels [B] will do.
        selector: the content predictor that the plan names.
    """

    model: Network
    plan: CachePlan
    asked: Asked
    selector: Selector | None = None

    @property
    def given(self) -> Given:
        """Conditions of each image, by name."""
        return given_of(self.model.conditions, self.asked)

    @functools.cached_property
    def rows(self) -> Given:
        """Conditions of each row that the network computes: those of the images, then the null values, if the plan is guided."""
        return self.given.with_nulls(self.model.conditions, self.model.nulls) if self.plan.guidance.doubles_batch else self.given

    @functools.cached_property
    def constants(self) -> Constants:
        """What the network makes of these rows for all steps."""
        return self.model.constants(**self.rows)

    def check(self) -> None:
        """Refuse what does not belong together.

        Raises:
            TokenCacheError: if a condition is missing, or cannot be what it is.
            PlanError: if the plan is for another model or content predictor.
            TeacherError: if the plan is guided and a condition of the model has no null value.
        """
        require_given(self.model.conditions, self.given)
        self.plan.require_model(model_signature(self.model, self.plan.model.teacher))
        require_null(self.model.conditions, self.plan.guidance, self.model.nulls, self.given.negative)
        require_selector(self.plan, self.selector)

    def start(self, x_BCHW: Tensor) -> RunState:
        """Before the first step."""
        return RunState(0, x_BCHW, (), {})

    def predict(self, state: RunState) -> tuple[Tensor, dict[Entry, Tensor]]:
        """Guided eps [B, C, H, W] of a step, and what it writes; gradients are recorded if they are wanted."""
        plan, model, i, x_BCHW = self.plan, self.model, state.step, state.x
        flow, mode, guidance = plan.flows[i], plan.guidance_mode(i), plan.guidance
        cached = {r.entry: forecast([state.store[r.entry, s] for s in r.sources], () if r.repeats else r.weights) for r in flow.reads}
        kept = tuple(kept_tokens(s, x_BCHW.device) for s in plan.steps[i])
        half = slice(len(x_BCHW)) if mode.single else slice(None)
        rows = self.rows.part(half)
        t_M = torch.full((rows.images,), plan.sampler.steps[i].t, device=x_BCHW.device)
        guided = Guided(mode.mode, guidance.scale, guidance.channels) if guidance.doubles_batch else None
        scorer = None if self.selector is None else self.selector.scorer(model, t_M[: len(x_BCHW)])
        step = Step(plan.steps[i], kept, cached, flow.writes, scorer)
        terms = model.terms(t_M, rows, self.constants.part(half))
        return predict(step, guided, x_BCHW, model, terms, plan.model.in_channels)

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
    return model.signature(digest or teacher_digest(model))


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


def given_for(seed: int, indices: Sequence[int], model: Network, device: torch.device | str = "cpu", use: str | None = None) -> Given:
    """Conditions of images `indices` that nobody gave any: drawn labels, and rows of the model's examples.

    Args:
        seed: of the labels.
        indices: of the images.
        model: whose conditions they are.
        device: where they are wanted.
        use: what they are for (`tc_lightning.plan.given.part_for`): of the examples, rows that are for nothing else; None: all rows.

    Raises:
        TokenCacheError: if there is a condition that cannot be drawn, and the model has no examples of it, or too few.
    """
    return drawn_given(model.conditions, seed, indices, model.examples if use is None else part_for(model.examples, use), device)


def labels_for(seed: int, indices: Sequence[int], classes: int, device: torch.device | str = "cpu") -> Tensor:
    """Class of images `indices`, [B] int64, as `drawn_labels` draws it: few images are of all classes alike."""
    return torch.from_numpy(drawn_labels(seed, indices, classes)).to(device)


@torch.no_grad()
def sample_steps(
    model: Network,
    plan: CachePlan,
    x_BCHW: Tensor,
    asked: Asked,
    seed: int = 0,
    first_index: int = 0,
    selector: Selector | None = None,
) -> Iterator[SamplingStep]:
    """Run a plan from noise, yielding every step.

    Args:
        model: the teacher.
        plan: a plan for this teacher (its shape is checked here; its digest by whoever loaded both).
        x_BCHW: initial noise.
        asked: conditions of each image; of a class-conditional model its labels [B] will do.
        seed: seed of what a stochastic sampler adds.
        first_index: global index of the first image, which keys that noise.
        selector: the content predictor that the plan names, on the device of the latents; not looked at by plans without one.

    Raises:
        TokenCacheError: if a condition is missing or cannot be what it is, or the latents become NaN.
        PlanError: if the plan is for another model or content predictor.
        TeacherError: if the plan is guided and a condition of the model has no null value.
    """
    run = Rollout(model, plan, asked, selector)
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


def sample(model: Network, plan: CachePlan, x_BCHW: Tensor, asked: Asked, seed: int = 0, selector: Selector | None = None) -> Tensor:
    """Final latents [B, C, H, W] of a plan; arguments and errors of `sample_steps`."""
    for state in sample_steps(model, plan, x_BCHW, asked, seed, selector=selector):
        x_BCHW = state.x_next
    return x_BCHW


def kept_tokens(segment: Segment, device: torch.device | str = "cpu") -> Tensor | None:
    """Index tensor [K] of a static partial segment; None for others."""
    return torch.tensor(segment.tokens, device=device) if segment.tokens else None


def _updated(store: Store, writes: dict[Entry, Tensor], flows: Sequence[StepFlow], i: int) -> Store:
    """The store with this step's writes, less what no later step reads."""
    still_read = {(read.entry, source) for flow in flows[i + 1 :] for read in flow.reads for source in read.sources}
    known = store | {(entry, i): value for entry, value in writes.items()}
    return {key: value for key, value in known.items() if key in still_read}
