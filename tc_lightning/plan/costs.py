"""Multiply-accumulates and cache bytes of a plan: derived, never stored, and the same for every consumer."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.dataflow import Entry, assign_slots
from tc_lightning.plan.guidance import Guidance, GuidanceMode
from tc_lightning.plan.segments import Segment, compute
from tc_lightning.plan.signature import ModelSignature


def block_macs(model: ModelSignature, tokens: int, branches: tuple[str, ...] | None = None, block: int | None = None) -> int:
    """MACs of a block for one sample when `tokens` tokens are computed in `branches` (None: all); attention is over all tokens.

    Args:
        model: whose block it is.
        tokens: how many are computed, fixed ones among them.
        branches: in which branches.
        block: its number; None for one like most.
    """
    costs = zip(model.block.names, model.macs if block is None else model.macs_of(block), strict=True)
    return sum(macs.of(tokens, model.tokens) for name, macs in costs if branches is None or name in branches)


def blocks_macs(model: ModelSignature, blocks: Iterable[int], tokens: int, branches: tuple[str, ...] | None = None) -> int:
    """The same of several blocks, by their numbers."""
    return sum(block_macs(model, tokens, branches, block) for block in blocks)


def segment_macs(model: ModelSignature, segment: Segment) -> int:
    """MACs of a segment for one sample. Forecasts are elementwise and count as none."""
    if segment.mode == "skip":
        return corrector_macs(model) if segment.corrected else 0
    tokens = segment.keep if segment.mode == "partial" else model.tokens
    blocks = blocks_macs(model, segment.blocks, tokens, tuple(filter(segment.computes, model.block.names)))
    return blocks + model.skips.taken_in(segment.start, segment.stop) * tokens * model.skips.macs


def selector_macs(model: ModelSignature) -> int:
    """MACs of the content predictor for one image: a block over all tokens, and L scores for each. Its adaLN terms are constants."""
    return block_macs(model, model.tokens) + model.tokens * model.width * model.depth


def corrector_macs(model: ModelSignature) -> int:
    """MACs of the corrector for one sample: three widths in, attention, an MLP of twice the width, one width out, which makes twelve
    products by D x D a token, and q k and the weights times v a pair of tokens. Its terms are constants."""
    return model.tokens * (12 * model.width**2 + 2 * model.tokens * model.width)


def step_macs(model: ModelSignature, segments: tuple[Segment, ...], selector_runs: float = 1) -> float:
    """MACs of one step for one sample; the content predictor, where segments need one, runs so many times for it."""
    chosen = any(s.is_content for s in segments)
    return model.fixed_macs + sum(segment_macs(model, s) for s in segments) + chosen * selector_runs * selector_macs(model)


def full_step_macs(model: ModelSignature) -> int:
    """MACs of a full forward for one sample."""
    return model.fixed_macs + segment_macs(model, compute(0, model.depth))


def halves_share(mode: GuidanceMode) -> float:
    """Share of the guided batch that a step computes: 1, or a half."""
    return 0.5 if mode.single else 1


def selector_runs(guidance: Guidance, mode: GuidanceMode) -> float:
    """Runs of the content predictor for one sample: it runs once for both halves of guidance."""
    return 0.5 if guidance.doubles_batch and not mode.single else 1


def plan_macs(plan: CachePlan) -> float:
    """MACs of the whole plan for one sample (one half of guidance): the mean of the halves, where a step computes only one."""
    modes = [plan.guidance_mode(i) for i in range(plan.num_steps)]
    return sum(
        halves_share(mode) * step_macs(plan.model, segments, selector_runs(plan.guidance, mode))
        for mode, segments in zip(modes, plan.steps, strict=True)
    )


def macs_speedup(plan: CachePlan) -> float:
    """MACs of the reference run, at full compute, over those of the plan."""
    return len(plan.reference) * full_step_macs(plan.model) / plan_macs(plan)


def entry_shape(plan: CachePlan, entry: Entry) -> tuple[int, ...]:
    """Shape of a cache entry for one sample: [N, D], or [guided channels, H, W] of the difference of the halves of guidance.

    Keys and values may be of another width than D.
    """
    if entry.kind == "guidance":
        return (plan.guidance.channels, plan.model.input_size, plan.model.input_size)
    return (plan.model.tokens, plan.model.kv_width(entry.start) if entry.kind in ("k", "v") else plan.model.width)


def entry_rows(plan: CachePlan, entry: Entry) -> int:
    """Samples of an entry for one image: two where it holds both halves of guidance."""
    return 2 if plan.guidance.doubles_batch and not entry.half and entry.kind != "guidance" else 1


def entry_dtype(entry: Entry, working: str) -> str:
    """Precision that an entry is kept in: the working one, but for the difference of the halves, which is of latents."""
    return "fp32" if entry.kind == "guidance" else working


def entry_bytes(plan: CachePlan, entry: Entry, bytes_per_value: int) -> int:
    """Bytes of one value of an entry for one sample, at so many bytes a value in the working precision."""
    return math.prod(entry_shape(plan, entry)) * (4 if entry.kind == "guidance" else bytes_per_value)


def cache_bytes_per_image(plan: CachePlan, bytes_per_value: int = 4) -> int:
    """Bytes of cache for one image, at so many bytes a value in the working precision."""
    _, depth = assign_slots(plan.flows)
    return sum(slots * entry_rows(plan, entry) * entry_bytes(plan, entry, bytes_per_value) for entry, slots in depth.items())
