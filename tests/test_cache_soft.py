"""The soft form: at 0 and 1 it is the step that is run, and in between it mixes."""

from __future__ import annotations

import pytest
import torch
from caching import EVERYTHING, cache_of_another_time, tokens_of

from tc_lightning.cache.semantics import Step, run_blocks
from tc_lightning.cache.soft import BlockCache, full_block, mixed_block, mixed_branches
from tc_lightning.models.network import KeyValue
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.segments import compute, partial, reuse
from tc_lightning.rollout.sampling import kept_tokens


@pytest.mark.parametrize("kept", [(0, 2, 7, 8, 15), (3,), EVERYTHING, ()])
@torch.no_grad()
def test_soft_form_at_zero_and_one_is_the_partial_step(teacher, kept):
    b = 2
    cached = cache_of_another_time(teacher, b, b + 1)
    z, mods, _ = tokens_of(teacher, t=500.0)
    w = torch.zeros(2, 16)
    w[:, list(kept)] = 1.0
    residual, k, v = (cached[Entry(kind, b, b + 1)] for kind in ("span", "k", "v"))
    soft_cache = BlockCache(residual, KeyValue(k, v))
    soft = mixed_block(teacher.blocks[b], z, mods[b], w, soft_cache)
    if kept:
        segment = partial(b, b + 1, kept)
        hard, _ = run_blocks(Step((segment,), (kept_tokens(segment),), cached, ()), z, list(teacher.blocks), mods)
    else:
        hard = z + soft_cache.residual
    torch.testing.assert_close(soft, hard, rtol=1e-5, atol=1e-5)
    if len(kept) == 16:
        torch.testing.assert_close(soft, teacher.blocks[b](z, mods[b]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_soft_weights_mix_per_sample_and_token(teacher):
    """With the block's own cache every weight gives full compute: nothing is there to differ."""
    z, mods, _ = tokens_of(teacher)
    full, cache, _ = full_block(teacher.blocks[0], z, mods[0])
    assert torch.equal(full, teacher.blocks[0](z, mods[0]))
    w = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed_block(teacher.blocks[0], z, mods[0], w, cache), full, rtol=1e-5, atol=1e-5)
    other = cache._replace(residual=torch.zeros_like(z))
    expected = z + w[:, :, None] * cache.residual
    torch.testing.assert_close(mixed_block(teacher.blocks[0], z, mods[0], w, other), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reused", [(), ("attn",), ("mlp",), ("attn", "mlp")])
@torch.no_grad()
def test_soft_branches_at_zero_and_one_are_the_reuse_step_bit_for_bit(teacher, reused):
    b = 2
    z_old, mods_old, _ = tokens_of(teacher, t=900.0)
    _, _, old = full_block(teacher.blocks[b], z_old, mods_old[b])
    z, mods, _ = tokens_of(teacher, t=300.0, seed=1)
    weights = {branch: torch.full((2, 1, 1), float(branch not in reused)) for branch in ("attn", "mlp")}
    soft, left = mixed_branches(teacher.blocks[b], z, mods[b], weights, old)

    entries = [Entry("attn", b, b + 1), Entry("mlp", b, b + 1)]
    segment = reuse(b, b + 1, reused) if reused else compute(b, b + 1)
    step = Step((segment,), (None,), dict(zip(entries, old.values(), strict=True)), entries)
    hard, writes = run_blocks(step, z, list(teacher.blocks), mods)
    assert torch.equal(soft, hard)
    for entry, before, value in zip(entries, old.values(), left.values(), strict=True):
        assert torch.equal(value, writes.get(entry, before))  # an entry that is not written keeps its value


@torch.no_grad()
def test_soft_branches_mix_before_the_current_gate_per_image_or_token(teacher):
    block, b = teacher.blocks[1], 1
    z_old, mods_old, _ = tokens_of(teacher, t=900.0)
    _, _, old = full_block(block, z_old, mods_old[b])
    z, mods, _ = tokens_of(teacher, t=300.0, seed=1)
    w_attn, w_mlp = torch.rand(2, 1, 1), torch.rand(2, 16, 1)
    a = w_attn * block.attn_branch(z, mods[b])[0] + (1 - w_attn) * old["attn"]
    h = z + mods[b].gate_attn * a
    m = w_mlp * block.mlp_branch(h, mods[b]) + (1 - w_mlp) * old["mlp"]
    out, left = mixed_branches(block, z, mods[b], {"attn": w_attn, "mlp": w_mlp}, old)
    torch.testing.assert_close(out, h + mods[b].gate_mlp * m)
    torch.testing.assert_close(left, {"attn": a, "mlp": m})
