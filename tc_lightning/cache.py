"""What caching means: pure functions in which the cache is an argument and a return value.

The one definition of compute, recompute-some-tokens, reuse and skip. The reference sampler calls these functions with tensors, the
exporter with symbolic values that stand for tensors and write ONNX nodes (`export.symbolic`), and training calls their soft forms,
`mixed_block` (partial steps) and `mixed_branches` (reuse), which equal the hard forms wherever their weights are 0 or 1.

Shape suffixes: B batch (both halves of guidance), L blocks, N tokens, K kept tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tc_lightning.dataflow import Entry
from tc_lightning.diffusion.update import difference_of_halves, guide, guide_by
from tc_lightning.lean import put, take
from tc_lightning.models.dit import DiTBlock, KeyValue, Modulation
from tc_lightning.segments import Segment

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
    """Weighted sum of an entry's last values, latest first (TaylorSeer, arXiv 2503.06923, with exact extrapolation weights)."""
    if len(values) == 1:
        return values[0]
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
        blocks: the blocks of a `DiT`, or objects with their methods.
        mods: adaLN terms of each block.

    Returns:
        Tokens [B, N, D], and the value of every wanted entry.
    """
    writes: dict[Entry, Tensor] = {}
    spans = [entry for entry in step.wanted if entry.kind == "span"]
    edges = {entry.start for entry in spans} | {entry.stop for entry in spans}
    z_at: dict[int, Tensor] = {0: z_BND}
    for segment, kept in zip(step.segments, step.kept, strict=True):
        if segment.mode == "skip":
            z_BND = z_BND + step.cached[Entry("span", segment.start, segment.stop)]
        elif segment.mode == "partial":
            assert kept is not None, "tokens are chosen before blocks are run"
            z_BND = _run_partial(segment, kept, z_BND, blocks, mods, step.cached, writes)
        else:
            for b in segment.blocks:
                z_BND = _run_block(segment, b, z_BND, blocks[b], mods[b], step.cached, step.wanted, writes)
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
) -> Tensor:
    """Compute a block over all tokens, but for the branches that the segment reuses; add what is wanted to `writes`."""
    reused = segment.branches if segment.mode == "reuse" else ()
    available: dict[str, Tensor] = {}
    if "attn" in reused:
        a_BND = cached[Entry("attn", b, b + 1)]
    else:
        a_BND, kv = block.attn_branch(z_BND, mod)
        available |= {"attn": a_BND, "k": kv.k, "v": kv.v}
    z_BND = z_BND + mod.gate_attn * a_BND
    if "mlp" in reused:
        m_BND = cached[Entry("mlp", b, b + 1)]
    else:
        m_BND = block.mlp_branch(z_BND, mod)
        available["mlp"] = m_BND
    for kind, value in available.items():
        if (entry := Entry(kind, b, b + 1)) in wanted:
            writes[entry] = value
    return z_BND + mod.gate_mlp * m_BND


def _run_partial(
    segment: Segment,
    kept: Tensor,
    z_BND: Tensor,
    blocks: Sequence[Any],
    mods: Sequence[Any],
    cached: Cache,
    writes: dict[Entry, Tensor],
) -> Tensor:
    """Recompute the kept tokens through the segment: one gather on entry, one scatter on exit, however deep it is.

    Nothing inside the segment looks at the other tokens but through their cached keys and values, so their path through it is a
    single tensor, the segment's summed residual. The kept tokens' keys and values take their places in the cache: attention then
    reads one tensor, and later steps find the latest known key and value of every token.
    """
    span = cached.get(Entry("span", segment.start, segment.stop))
    if span is None:  # every token is kept, and in its place
        return _run_every_token(segment, z_BND, blocks, mods, cached)
    z_BKD = take(z_BND, kept)
    for b in segment.blocks:
        if "attn" in segment.branches:
            q, k, v = blocks[b].qkv(z_BKD, mods[b])
            k, v = (put(cached[Entry(kind, b, b + 1)], kept, new) for kind, new in (("k", k), ("v", v)))
            writes |= {Entry("k", b, b + 1): k, Entry("v", b, b + 1): v}
            a_BKD = blocks[b].attention(q, k, v)
        else:
            a_BKD = take(cached[Entry("attn", b, b + 1)], kept)
        z_BKD = z_BKD + mods[b].gate_attn * a_BKD
        z_BKD = z_BKD + mods[b].gate_mlp * blocks[b].mlp_branch(z_BKD, mods[b])
    return put(z_BND + span, kept, z_BKD)


def _run_every_token(segment: Segment, z_BND: Tensor, blocks: Sequence[Any], mods: Sequence[Any], cached: Cache) -> Tensor:
    """A partial segment that keeps all tokens; with the MLP alone recomputed, attention still comes from the cache."""
    for b in segment.blocks:
        a_BND = blocks[b].attn_branch(z_BND, mods[b])[0] if "attn" in segment.branches else cached[Entry("attn", b, b + 1)]
        z_BND = z_BND + mods[b].gate_attn * a_BND
        z_BND = z_BND + mods[b].gate_mlp * blocks[b].mlp_branch(z_BND, mods[b])
    return z_BND


class Guided(NamedTuple):
    """How a step is guided: the halves that it computes (`tc_lightning.guidance`), the scale (a number, or a scalar in the graph; None
    where it has no say) and the guided channels."""

    mode: str
    scale: Any
    channels: int


def predict(
    step: Step, guided: Guided | None, x_BCHW: Tensor, model: Any, mods: Sequence[Any], final: Any, channels: int
) -> tuple[Tensor, dict[Entry, Tensor]]:
    """Guided eps of one step, from latents to latents.

    Blocks know nothing of the halves of guidance: what is cached of each is put together on entry and taken apart on exit.

    Args:
        step: what the step does; its entries may be of one half, and `guidance`.
        guided: None for a network without guidance, which sees the batch as it is.
        x_BCHW: latents.
        model: a `DiT`, or an object with its methods.
        mods: adaLN terms of each block, for the rows that are computed.
        final: those of the readout.
        channels: channels C of the latents.

    Returns:
        eps [B, C, H, W], and the value of every wanted entry.
    """
    both = guided is not None and guided.mode == "both"
    wanted = dict.fromkeys(entry.whole for entry in step.wanted if entry.kind != "guidance")
    inner = step._replace(cached=join_halves(step.cached), wanted=tuple(wanted))
    z_BND = model.embed(torch.cat([x_BCHW, x_BCHW]) if both else x_BCHW)
    inner = _choose_all(inner, z_BND, both)
    z_BND, found = run_blocks(inner, z_BND, model.blocks, mods)
    eps = model.readout(z_BND, final)[:, :channels]
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


class BlockCache(NamedTuple):
    """What the soft form takes from the neighbouring step: residual update, keys and values, each [B, N, D]."""

    residual: Tensor
    kv: KeyValue


class BranchCache(NamedTuple):
    """What the soft form of reuse takes from the step before: both branches before their gates, each [B, N, D]."""

    attn: Tensor
    mlp: Tensor


def full_block(block: DiTBlock, z_BND: Tensor, mod: Modulation) -> tuple[Tensor, BlockCache, BranchCache]:
    """Compute a block and return its tokens, and what `mixed_block` and `mixed_branches` need of it."""
    a_BND, kv = block.attn_branch(z_BND, mod)
    h_BND = z_BND + mod.gate_attn * a_BND
    m_BND = block.mlp_branch(h_BND, mod)
    out_BND = h_BND + mod.gate_mlp * m_BND
    return out_BND, BlockCache(out_BND - z_BND, kv), BranchCache(a_BND, m_BND)


def mixed_block(block: DiTBlock, z_BND: Tensor, mod: Modulation, w_BN: Tensor, cached: BlockCache) -> Tensor:
    """Superposition of computing and reusing, token by token (TokenCache v1): z + w f(z) + (1 - w) cached.

    Keys and values are mixed with the same weights, so that with w in {0, 1} this is exactly the partial step of a one-block
    segment: kept tokens attend to all tokens, those of weight 0 through their cached keys and values.
    """
    w_BN1 = w_BN[:, :, None]
    q, k, v = block.qkv(z_BND, mod)
    k, v = k * w_BN1 + cached.kv.k * (1 - w_BN1), v * w_BN1 + cached.kv.v * (1 - w_BN1)
    h_BND = z_BND + mod.gate_attn * block.attention(q, k, v)
    f_BND = h_BND + mod.gate_mlp * block.mlp_branch(h_BND, mod) - z_BND
    return z_BND + w_BN1 * f_BND + (1 - w_BN1) * cached.residual


def mixed_branches(
    block: DiTBlock, z_BND: Tensor, mod: Modulation, w_attn: Tensor, w_mlp: Tensor, cached: BranchCache
) -> tuple[Tensor, BranchCache]:
    """Superposition of computing and reusing, branch by branch (routers: Learning-to-Cache, arXiv 2406.01733; HarmoniCa, 2410.01723).

    A branch is w b(z) + (1 - w) cached, before the current gate. What it leaves for the next step is that mixture, so that with w in
    {0, 1} this is, bit for bit, compute or a reuse segment of order 0: an entry keeps the value that was last computed.

    Args:
        block: the block.
        z_BND: its tokens.
        mod: its adaLN terms.
        w_attn: weight of computing attention, of any shape that broadcasts to [B, N, D]: [B, 1, 1] for each image, [B, N, 1] for
            each token.
        w_mlp: the same for the MLP.
        cached: branches of the step before.

    Returns:
        Tokens [B, N, D], and both mixtures.
    """
    a_BND = w_attn * block.attn_branch(z_BND, mod)[0] + (1 - w_attn) * cached.attn
    h_BND = z_BND + mod.gate_attn * a_BND
    m_BND = w_mlp * block.mlp_branch(h_BND, mod) + (1 - w_mlp) * cached.mlp
    return h_BND + mod.gate_mlp * m_BND, BranchCache(a_BND, m_BND)
