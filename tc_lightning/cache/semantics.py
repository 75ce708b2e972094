"""What caching means: pure functions in which the cache is an argument and a return value.

The one definition of compute, recompute-some-tokens, reuse and skip. The reference sampler calls these functions with tensors, the
exporter with symbolic values that stand for tensors and write ONNX nodes (`export.compiler.symbolic`), and training calls their soft
forms (`tc_lightning.cache.soft`), which equal these wherever their weights are 0 or 1.

Shape suffixes: B batch (both halves of guidance), L blocks, N tokens, K kept tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tc_lightning.diffusion.update import difference_of_halves, guide, guide_by
from tc_lightning.models.lean import put, take
from tc_lightning.models.network import KeyValue, Taps, Terms, compose
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.segments import Segment

Cache = Mapping[Entry, Tensor]
EXACT = 1 << 24  # fp32 holds every integer up to here


class Step(NamedTuple):
    """What one step does: its segments, the kept tokens of each partial one ([K], or [B, K] if each row of the batch has its own;
    None if they are still to be chosen by content), the values it reads, the entries it must return, and what scores the tokens of
    one half of guidance for content segments."""

    segments: tuple[Segment, ...]
    kept: tuple[Tensor | None, ...]
    cached: Cache
    wanted: Collection[Entry]
    scorer: Callable[[Tensor], Tensor] | None = None


def forecast(values: Sequence[Tensor], weights: Sequence[Any]) -> Tensor:
    """Weighted sum of an entry's last values, latest first; without weights the one value as it is (`tc_lightning.plan.forecasts`)."""
    if not weights:
        (value,) = values
        return value
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value * weight
    return total


def choose_tokens(segment: Segment, a_BLN: Tensor) -> Tensor:
    """Tokens [B, K] of a content segment: those with the highest mean score over its blocks; of equals, the first (TokenCache v2).

    Which of several equal values a TopK takes differs between torch, and ONNX Runtime's kernels for small and for long rows. So
    they are made distinct: scores become levels of a grid, and the token's number breaks a tie, in integers that fp32 holds exactly.

    Args:
        segment: a content segment.
        a_BLN: scores in [0, 1] in fp32, 1 meaning recompute.
    """
    N, (start, stop) = a_BLN.shape[2], (segment.start, segment.stop)
    mean_BN = a_BLN[:, start] if stop == start + 1 else a_BLN[:, start:stop].mean(1)
    level_BN = (mean_BN * float(EXACT // N - 1)).floor()
    first_wins_N = torch.arange(N - 1, -1, -1, dtype=a_BLN.dtype, device=a_BLN.device)
    return (level_BN * float(N) + first_wins_N).topk(segment.keep, dim=1, sorted=False).indices


def _choose_all(step: Step, z_BND: Tensor, both: bool) -> Step:
    """The step with the tokens of its content segments chosen, by one half of guidance for both."""
    if not any(s.is_content for s in step.segments):
        return step
    assert step.scorer is not None, "content segments need a scorer"
    a_BLN = step.scorer(z_BND.chunk(2)[0] if both else z_BND)
    kept = list(step.kept)
    for j, segment in enumerate(step.segments):
        if segment.is_content:
            own = choose_tokens(segment, a_BLN)
            kept[j] = torch.cat([own, own]) if both else own
    return step._replace(kept=tuple(kept))


def run_blocks(step: Step, z_BND: Tensor, blocks: Sequence[Any], mods: Sequence[Any]) -> tuple[Tensor, dict[Entry, Tensor]]:
    """Run all blocks as the step says.

    Args:
        step: segments, kept tokens, cached values and the entries to return.
        z_BND: tokens.
        blocks: blocks of a network, or objects with their methods.
        mods: terms of the conditioning of each.

    Returns:
        Tokens [B, N, D], and the value of every wanted entry.
    """
    writes: dict[Entry, Tensor] = {}
    spans = [entry for entry in step.wanted if entry.kind == "span"]
    edges = {entry.start for entry in spans} | {entry.stop for entry in spans}
    z_at: dict[int, Tensor] = {0: z_BND}
    taps = Taps(blocks, z_BND)
    for segment, kept in zip(step.segments, step.kept, strict=True):
        if segment.mode == "skip":
            z_BND = z_BND + step.cached[Entry("span", segment.start, segment.stop)]
        elif segment.mode == "partial":
            assert kept is not None, "tokens are chosen before blocks are run"
            z_BND = _run_partial(segment, kept, z_BND, blocks, mods, step.cached, writes, taps)
        else:
            for b in segment.blocks:
                z_BND = _run_block(segment, b, z_BND, blocks[b], mods[b], step.cached, step.wanted, writes, taps)
                if b + 1 in edges:
                    z_at[b + 1] = z_BND
        z_at[segment.stop] = z_BND
    for entry in spans:
        writes[entry] = z_at[entry.stop] - z_at[entry.start]
    return z_BND, writes


def _run_block(
    segment: Segment,
    b: int,
    z_BND: Tensor,
    block: Any,
    mod: Any,
    cached: Cache,
    wanted: Collection[Entry],
    writes: dict[Entry, Tensor],
    taps: Taps,
) -> Tensor:
    """Compute a block over all tokens, but for the branches that come from the cache; add what is wanted to `writes`."""

    def take_branch(name: str, z_BND: Tensor) -> Tensor:
        if not segment.computes(name):
            return cached[Entry(name, b, b + 1)]
        update_BND, kv = block.branch(name, z_BND, mod)
        found = {name: update_BND} | ({"k": kv.k, "v": kv.v} if kv else {})
        writes.update({entry: value for kind, value in found.items() if (entry := Entry(kind, b, b + 1)) in wanted})
        return update_BND

    z_BND = compose(block, z_BND, mod, take_branch, skip_BnD=taps.enter(b))
    taps.leave(b, z_BND)
    return z_BND


def _run_partial(
    segment: Segment,
    kept: Tensor,
    z_BND: Tensor,
    blocks: Sequence[Any],
    mods: Sequence[Any],
    cached: Cache,
    writes: dict[Entry, Tensor],
    taps: Taps,
) -> Tensor:
    """Recompute the kept tokens through the segment: one gather on entry, one scatter on exit, however deep it is.

    Nothing inside the segment looks at the other tokens but through their cached keys and values, so their path through it is a
    single tensor, the segment's summed residual. The kept tokens' keys and values take their places in the cache: attention then
    reads one tensor, and later steps find the latest known key and value of every token.
    """
    span = cached.get(Entry("span", segment.start, segment.stop))
    if span is None:  # every token is kept, and in its place
        for b in segment.blocks:
            z_BND = _run_block(segment, b, z_BND, blocks[b], mods[b], cached, (), writes, taps)
        return z_BND
    z_BKD, inside = take(z_BND, kept), Taps(blocks)
    for b in segment.blocks:
        skip_BKD = inside.enter(b)
        if skip_BKD is None and (outer_BND := taps.enter(b)) is not None:
            skip_BKD = take(outer_BND, kept)
        z_BKD = _run_kept(segment, kept, b, z_BKD, blocks[b], mods[b], cached, writes, skip_BKD)
        inside.leave(b, z_BKD)
    return put(z_BND + span, kept, z_BKD)


def _run_kept(
    segment: Segment,
    kept: Tensor,
    b: int,
    z_BKD: Tensor,
    block: Any,
    mod: Any,
    cached: Cache,
    writes: dict[Entry, Tensor],
    skip_BKD: Tensor | None,
) -> Tensor:
    """Recompute the kept tokens in one block."""
    k, v = Entry("k", b, b + 1), Entry("v", b, b + 1)

    def among_all(own: KeyValue) -> KeyValue:
        return KeyValue(put(cached[k], kept, own.k), put(cached[v], kept, own.v))

    def take_branch(name: str, z_BKD: Tensor) -> Tensor:
        if not segment.computes(name):
            return take(cached[Entry(name, b, b + 1)], kept)
        update_BKD, kv = block.branch(name, z_BKD, mod, kept, among_all)
        writes.update({k: kv.k, v: kv.v} if kv else {})
        return update_BKD

    return compose(block, z_BKD, mod, take_branch, kept, skip_BKD)


class Guided(NamedTuple):
    """How a step is guided: the halves that it computes (`tc_lightning.plan.guidance`), the scale (a number, or a scalar in the graph;
    None where it has no say) and the guided channels."""

    mode: str
    scale: Any
    channels: int


def predict(
    step: Step, guided: Guided | None, x_BCHW: Tensor, model: Any, terms: Terms, channels: int
) -> tuple[Tensor, dict[Entry, Tensor]]:
    """Guided eps of one step, from latents to latents.

    Blocks know nothing of the halves of guidance: what is cached of each is put together on entry and taken apart on exit.

    Args:
        step: what the step does; its entries may be of one half, and `guidance`.
        guided: None for a network without guidance, which sees the batch as it is.
        x_BCHW: latents.
        model: a network, or an object with its methods.
        terms: those of the conditioning, for the rows that are computed.
        channels: channels C of the latents.

    Returns:
        eps [B, C, H, W], and the value of every wanted entry.
    """
    both = guided is not None and guided.mode == "both"
    wanted = dict.fromkeys(entry.whole for entry in step.wanted if entry.kind != "guidance")
    inner = step._replace(cached=join_halves(step.cached), wanted=tuple(wanted))
    z_BND = model.embed(torch.cat([x_BCHW, x_BCHW]) if both else x_BCHW, terms.start)
    inner = _choose_all(inner, z_BND, both)
    z_BND, found = run_blocks(inner, z_BND, model.blocks, terms.blocks)
    eps = model.readout(z_BND, terms.final)[:, :channels]
    writes = split_halves(found, step.wanted, both)
    for entry in (e for e in step.wanted if e.kind == "guidance"):
        assert guided is not None
        writes[entry] = difference_of_halves(eps, guided.channels, channels)
    if guided is None or guided.mode == "cond":
        return eps, writes
    if both:
        return guide(eps, guided.scale, guided.channels, channels), writes
    difference = next(value for entry, value in step.cached.items() if entry.kind == "guidance")
    return guide_by(eps, difference, guided.scale, guided.channels, channels), writes


def join_halves(values: Cache) -> dict[Entry, Tensor]:
    """Cached values as blocks take them: those of the two halves of a batch one after the other, or the one that there is."""
    joined = {}
    for entry, value in values.items():
        if entry.half != "uncond":
            other = values.get(entry._replace(half="uncond")) if entry.half else None
            joined[entry.whole] = value if other is None else torch.cat([value, other])
    return joined


def split_halves(found: Cache, wanted: Collection[Entry], both: bool) -> dict[Entry, Tensor]:
    """The wanted ones of the values that blocks return; `both`: whether these hold two halves."""
    divided = {entry.whole for entry in wanted if entry.half} if both else set()
    pieces = {entry: dict(zip(("cond", "uncond"), found[entry].chunk(2), strict=True)) for entry in sorted(divided)}
    return {e: pieces[e.whole][e.half] if e.whole in divided else found[e.whole] for e in wanted if e.kind != "guidance"}
