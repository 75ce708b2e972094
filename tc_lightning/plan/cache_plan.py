"""The cache plan: for each sampling step, what happens to every block. The waist of the package; needs no torch.

    {"step": 7, "segments": [
        {"blocks": [0, 3],   "mode": "compute"},
        {"blocks": [3, 20],  "mode": "skip",    "order": 2},
        {"blocks": [20, 25], "mode": "partial", "keep": 4, "tokens": [3, 17, 18, 40], "order": 1, "kv_order": 1},
        {"blocks": [25, 27], "mode": "partial", "keep": 64, "choice": "content", "order": 1},
        {"blocks": [27, 28], "mode": "reuse",   "branches": ["attn"], "weights": [1.4, -0.5, 0.1]}]}

compute: everything. partial: some tokens are recomputed and attend to all tokens; keys and values of the others, and their summed
residual through the segment, come from the cache. Keys and values have a forecast of their own, kv_order; where they are repeated (0),
those of the recomputed tokens take their places in the cache. Static tokens are listed; content tokens are the `keep` ones that the
content predictor, named by the plan's `selector`, scores highest, image by image. With branches ["mlp"] only the MLP is recomputed,
and attention comes from the cache. reuse: the named branches come from the cache before their gate, the current gate is applied;
other branches are computed. skip: the segment's summed residual comes from the cache as one tensor. order: 0 repeats the cached
value, 1 and 2 extrapolate it from the last 2 and 3 times that it was computed for all tokens; weights in its place state what the
last 1 to 4 of these count, latest first (kv_weights: of keys and values).

A segment that knows some tokens alone (skip, partial) holds both ends of a long skip between blocks, or neither.

A step may compute the conditional half of a guided batch alone (`tc_lightning.plan.guidance`): it then has a further key,
"guidance": {"mode": "forecast", "order": 1}. Each half of the batch has its own cache, and such a step touches only the conditional
half's.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tc_lightning.errors import PlanError
from tc_lightning.plan.atomic import write_atomically
from tc_lightning.plan.dataflow import StepFlow, trace
from tc_lightning.plan.forecasts import Forecast
from tc_lightning.plan.guidance import BOTH, GUIDANCE_MODES, Guidance, GuidanceMode
from tc_lightning.plan.json_fields import as_list, check_keys, from_fields, is_int, is_name, is_number, shown
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.plan.segments import Segment, require_branches, require_valid
from tc_lightning.plan.signature import ModelSignature
from tc_lightning.plan.skips import require_uncut

FORMAT_VERSION = (
    6  # 4: conditions, costs of branches; 5: the model's fixed tokens, and blocks unlike the rest; 6: free weights, forecasts of K/V
)


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """A frozen, validated, hashed caching schedule.

    Args:
        model: what it was made for.
        sampler: coefficients of the sampler.
        guidance: guidance scale and channels.
        steps: the segments of each sampling step, noisiest step first.
        reference: the sampler of the full-compute run that the plan replaces: the run that savings and errors are measured against.
            Stated in every plan, equal to the plan's own or not: a plan whose sampler is replaced still replaces the same run.
        provenance: policy, its arguments, digests of what it was made from: plain JSON values.
        eps_scale: one factor a step by which the guided eps is multiplied (EB-Cache, arXiv 2503.07120: caching amplifies exposure
            bias, and a factor a little below 1 makes up for it); empty for none. The reference run has none.
        guidance_modes: which halves of the guided batch each step computes; empty: both at every step, as in the reference run.
        selector: sha256 of the content predictor that chooses the tokens of content segments; empty if there are none.
        fewer_steps: a sampler with which full compute costs no more than the plan's budget, fitted as the plan's own was: what the
            plan has to beat, for whoever verifies it. Never run by the plan; None where none was fitted, or the plan is that run.

    Raises:
        PlanError: if segments do not cover the blocks, a token or block does not exist, something is reused that was never
            computed, the number of steps is not the sampler's, a factor of eps is not positive and finite, a step leaves out
            a half that there is not, or a selector is missing or not needed.
    """

    model: ModelSignature
    sampler: SamplerTable
    guidance: Guidance
    steps: tuple[tuple[Segment, ...], ...]
    reference: SamplerTable
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eps_scale: tuple[float, ...] = ()
    guidance_modes: tuple[GuidanceMode, ...] = ()
    selector: str = ""
    fewer_steps: SamplerTable | None = None

    def __post_init__(self) -> None:
        if set(self.guidance_modes) == {BOTH} and len(self.guidance_modes) == self.num_steps:
            object.__setattr__(self, "guidance_modes", ())
        object.__setattr__(self, "eps_scale", tuple(map(float, self.eps_scale)))
        _validate(self)

    @functools.cached_property
    def scaled_sampler(self) -> SamplerTable:
        """The sampler with `eps_scale` folded in: the coefficients that a run of the plan goes by."""
        return self.sampler.scaled(self.eps_scale) if self.eps_scale else self.sampler

    @property
    def num_steps(self) -> int:
        """Sampling steps T."""
        return len(self.steps)

    @property
    def full_steps(self) -> list[int]:
        """The I-steps: those that compute every block, in both halves if there are two."""
        computed = [all(s.mode == "compute" for s in segments) for segments in self.steps]
        return [i for i, everything in enumerate(computed) if everything and not self.guidance_mode(i).single]

    @property
    def caches(self) -> bool:
        """Whether any step takes something from a cache; else the plan is full compute, with a sampler of its own."""
        return len(self.full_steps) < self.num_steps

    def guidance_mode(self, step: int) -> GuidanceMode:
        """Which halves of the guided batch a step computes."""
        return self.guidance_modes[step] if self.guidance_modes else BOTH

    @functools.cached_property
    def flows(self) -> tuple[StepFlow, ...]:
        """What each step reads from and writes to the cache."""
        return trace(self)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def in_words(self) -> str:
        """What a run of the plan does, for a person."""
        steps, sampler = f"{len(self.full_steps)} full", self.sampler.in_words
        return f"{self.num_steps} steps, {steps}, with {sampler}" if self.caches else f"no cache: {steps} steps with {sampler}"

    @property
    def summary(self) -> str:
        """One line, fit for a file name."""
        policy = str(self.provenance.get("policy", "custom"))
        halves = f"-both{sum(not mode.single for mode in self.guidance_modes)}" if self.guidance_modes else ""
        return f"{policy}-{self.sampler.name}{self.num_steps}-full{len(self.full_steps)}{halves}-{self.digest[:8]}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` inverts it exactly."""
        fewer = None if self.fewer_steps is None else self.fewer_steps.to_json()
        optional = {"eps_scale": list(self.eps_scale), "selector": self.selector, "fewer_steps": fewer}
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model.to_json(),
            "sampler": self.sampler.to_json(),
            "guidance": dataclasses.asdict(self.guidance),
            "steps": [self._step_to_json(i) for i in range(self.num_steps)],
            "provenance": dict(self.provenance),
            "reference": self.reference.to_json(),
        } | {name: value for name, value in optional.items() if value}

    def _step_to_json(self, i: int) -> dict[str, Any]:
        mode = self.guidance_mode(i)
        guidance = {"guidance": mode.to_json()} if mode.single else {}
        return {"step": i, **guidance, "segments": [s.to_json() for s in self.steps[i]]}

    @classmethod
    def from_json(cls, raw: Any) -> CachePlan:
        """Inverse of `to_json`.

        Raises:
            PlanError: if the format is not this version's, or anything in it is invalid.
        """
        if isinstance(raw, dict) and (version := raw.get("format_version", FORMAT_VERSION)) != FORMAT_VERSION:
            raise PlanError(f"plan format version {shown(version)} is not {FORMAT_VERSION}: make the plan again.")
        keys = {"format_version", "model", "sampler", "guidance", "steps", "provenance", "reference"}
        check_keys(raw, keys, {"eps_scale", "selector", "fewer_steps"}, "plan")
        eps_scale = as_list(raw.get("eps_scale", []), "eps_scale")
        if not isinstance(raw["provenance"], dict):
            raise PlanError(f"provenance: expected an object, found {type(raw['provenance']).__name__}.")
        if not all(map(is_number, eps_scale)):
            raise PlanError(f"eps_scale: expected a list of numbers, found {shown(eps_scale)}.")
        if not is_name(raw.get("selector", "")):
            raise PlanError(f"selector: expected a sha256, found {shown(raw['selector'])}.")
        steps = as_list(raw["steps"], "steps")
        return cls(
            ModelSignature.from_json(raw["model"], "model"),
            SamplerTable.from_json(raw["sampler"]),
            from_fields(Guidance, raw["guidance"], "guidance"),
            tuple(_segments_from_json(step, i) for i, step in enumerate(steps)),
            SamplerTable.from_json(raw["reference"]),
            raw["provenance"],
            tuple(eps_scale),
            tuple(GuidanceMode.from_json(step.get("guidance", {"mode": "both"}), f"step {i}") for i, step in enumerate(steps)),
            raw.get("selector", ""),
            SamplerTable.from_json(raw["fewer_steps"]) if "fewer_steps" in raw else None,
        )

    def save(self, path: Path) -> None:
        """Write `plan.json` atomically: a reader sees the old file or the new one."""
        write_atomically(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> CachePlan:
        """Read `plan.json`.

        Raises:
            PlanError: if the file is missing, is not JSON, or is not a valid plan.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}. Make it again with `lightning fit`.") from error
        try:
            return cls.from_json(raw)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def require_model(self, signature: ModelSignature) -> None:
        """Check that the plan was made for this model.

        Raises:
            PlanError: naming every field that differs, teacher weights included.
        """
        ours, theirs = dataclasses.asdict(self.model), dataclasses.asdict(signature)
        differing = [f"{name} (plan {ours[name]}, model {theirs[name]})" for name in ours if ours[name] != theirs[name]]
        if differing:
            raise PlanError(
                f"the plan {self.digest[:8]} was made for another model: they differ in {'; '.join(differing)}. "
                "Make a plan for this model with `lightning fit`, or load the teacher that the plan names."
            )


def _validate(plan: CachePlan) -> None:
    if plan.num_steps != len(plan.sampler):
        raise PlanError(f"the plan has {plan.num_steps} steps, its sampler {len(plan.sampler)}: they must be equal.")
    if plan.eps_scale and len(plan.eps_scale) != plan.num_steps:
        raise PlanError(f"eps_scale holds {len(plan.eps_scale)} factors for {plan.num_steps} steps: give one a step, or none.")
    for i, factor in enumerate(plan.eps_scale):
        if not (math.isfinite(factor) and factor > 0.0):
            raise PlanError(f"step {i}: eps_scale is {factor}: a factor must be positive and finite, and is near 1 as a rule.")
    if not 0 <= plan.guidance.channels <= plan.model.in_channels:
        raise PlanError(f"guidance channels {plan.guidance.channels}: the model has {plan.model.in_channels} channels.")
    if not math.isfinite(plan.guidance.scale):
        raise PlanError(f"guidance scale {plan.guidance.scale} is not finite.")
    if plan.guidance.doubles_batch and plan.guidance.channels == 0:
        raise PlanError(f"guidance scale {plan.guidance.scale} acts on no channel: set guidance channels to 1 or more.")
    if plan.guidance_modes and len(plan.guidance_modes) != plan.num_steps:
        raise PlanError(f"there are {len(plan.guidance_modes)} guidance modes for {plan.num_steps} steps: give one a step, or none.")
    for i, mode in enumerate(plan.guidance_modes):
        _validate_mode(mode, plan.guidance, f"step {i}, guidance")
    require_branches(plan.model.branches)
    names = plan.model.block.names
    if wrong := [macs for macs in (plan.model.macs, *(one.macs for one in plan.model.unlike)) if len(macs) != len(names)]:
        raise PlanError(f"the model has MACs of {len(wrong[0])} branches, and has {len(names)}: give them for each.")
    for i, segments in enumerate(plan.steps):
        reached = 0
        for segment in segments:
            where = f"step {i}, blocks [{segment.start}, {segment.stop})"
            require_valid(segment, reached, plan.model.depth, plan.model.tokens, where, plan.model.block, plan.model.fixed_tokens)
            require_uncut(segment, plan.model.skips, plan.model.tokens, where)
            reached = segment.stop
        if reached != plan.model.depth:
            raise PlanError(f"step {i} covers {reached} of {plan.model.depth} blocks: the plan is for another depth, or a gap.")
    chosen = any(s.is_content for segments in plan.steps for s in segments)
    if chosen != bool(plan.selector):
        raise PlanError(
            "the plan has content segments, but names no content predictor that chooses their tokens: set selector to its digest."
            if chosen
            else f"the plan names the content predictor {plan.selector[:8]}, but no segment needs one: leave selector empty."
        )
    _ = plan.flows  # raises if something is read that was never computed


def _validate_mode(mode: GuidanceMode, guidance: Guidance, where: str) -> None:
    if mode.mode not in GUIDANCE_MODES:
        raise PlanError(f"{where}: unknown mode {mode.mode!r}, choose one of {', '.join(GUIDANCE_MODES)}.")
    if fault := mode.forecast.fault():
        raise PlanError(f"{where}: {fault}.")
    if mode.mode != "forecast" and mode.forecast != Forecast():
        raise PlanError(f"{where}: mode {mode.mode} takes neither order nor weights.")
    if mode.single and not guidance.doubles_batch:
        raise PlanError(f"{where}: mode {mode.mode} leaves out the unconditional half, and at guidance scale 1 there is none.")


def _segments_from_json(raw: Any, i: int) -> tuple[Segment, ...]:
    check_keys(raw, {"step", "segments"}, {"guidance"}, f"step {i}")
    if not is_int(raw["step"]) or raw["step"] != i:
        raise PlanError(f"steps must be listed in order: found step {shown(raw['step'])} at place {i}.")
    return tuple(Segment.from_json(s, f"step {i}, segment {j}") for j, s in enumerate(as_list(raw["segments"], f"step {i}")))
