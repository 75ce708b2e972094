"""Steps that compute some of the tokens, against a slow definition of what they are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from caching import LABELS, cache_of_another_time, tokens_of
from conftest import FULL, make_plan, make_teacher
from torch import Tensor

from tc_lightning.cache.semantics import Cache, Step, run_blocks
from tc_lightning.models.dit import DiT, Modulation
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import partial
from tc_lightning.rollout.sampling import kept_tokens, noise_for, sample_steps


def slow_partial(model: DiT, z: Tensor, mods, kept: tuple[int, ...], cached: Cache, start: int, stop: int) -> Tensor:
    """A partial segment, one token and one head at a time, straight from the weights."""
    batch, N, D = z.shape
    M, E = model.config.num_heads, D // model.config.num_heads
    out = z + cached[Entry("span", start, stop)]
    for s in range(batch):
        current = {n: z[s, n] for n in kept}
        for b in range(start, stop):
            block, mod = model.blocks[b], Modulation(*(term[s, 0] for term in mods[b]))
            heads: dict[int, tuple[Tensor, ...]] = {}
            for n in kept:
                h = F.layer_norm(current[n], (D,), eps=1e-6) * mod.scale_attn + mod.shift_attn
                qkv = block.attn.qkv.weight @ h + block.attn.qkv.bias
                heads[n] = tuple(part.reshape(M, E) for part in qkv.split(D))
            for n in kept:
                attended = []
                for m in range(M):
                    keys = [heads[j][1][m] if j in heads else cached[Entry("k", b, b + 1)][s, j].reshape(M, E)[m] for j in range(N)]
                    values = [heads[j][2][m] if j in heads else cached[Entry("v", b, b + 1)][s, j].reshape(M, E)[m] for j in range(N)]
                    scores = torch.stack([heads[n][0][m] @ key / math.sqrt(E) for key in keys]).softmax(0)
                    attended.append(sum(w * v for w, v in zip(scores, values, strict=True)))
                a = block.attn.proj.weight @ torch.cat(attended) + block.attn.proj.bias
                y = current[n] + mod.gate_attn * a
                h = F.layer_norm(y, (D,), eps=model.config.mlp_norm_eps) * mod.scale_mlp + mod.shift_mlp
                current[n] = y + mod.gate_mlp * block.mlp(h)
        for n in kept:
            out[s, n] = current[n]
    return out


@pytest.mark.parametrize(("start", "stop"), [(1, 2), (0, 3)])
@torch.no_grad()
def test_partial_equals_the_slow_definition(start, stop):
    model = make_teacher(1, mlp_norm_eps=1e-2)
    kept, cached = (0, 2, 7, 8, 15), cache_of_another_time(model, start, stop)
    z, mods, _ = tokens_of(model, t=500.0)
    segment = partial(start, stop, kept)
    step = Step((segment,), (kept_tokens(segment),), cached, ())
    out, _ = run_blocks(step, z, list(model.blocks), mods)
    torch.testing.assert_close(out, slow_partial(model, z, mods, kept, cached, start, stop), rtol=1e-4, atol=1e-4)

    pruned = [n for n in range(16) if n not in kept]
    span = cached[Entry("span", start, stop)]
    assert torch.equal(out[:, pruned], (z + span)[:, pruned])
    assert (out[:, kept] - (z + span)[:, kept]).abs().max() > 0.01

    k = Entry("k", stop - 1, stop)  # a change in the cached key of any pruned token reaches the kept ones
    for n in (1, 14):
        moved = dict(cached) | {k: cached[k].clone()}
        moved[k][:, n] += 5.0
        assert (run_blocks(step._replace(cached=moved), z, list(model.blocks), mods)[0] - out)[:, kept].abs().max() > 1e-4
    moved[k] = cached[k].clone()  # of a kept token it does not
    moved[k][:, 7] += 5.0
    assert torch.equal(run_blocks(step._replace(cached=moved), z, list(model.blocks), mods)[0], out)


@torch.no_grad()
def test_partial_leaves_the_latest_key_and_value_of_every_token(teacher):
    """Those of its own tokens, in their places; and the next partial step reads what this one left."""
    kept, b, blocks = [1, 4, 9], 2, list(teacher.blocks)
    cached = cache_of_another_time(teacher, b, b + 1)
    z, mods, _ = tokens_of(teacher, t=500.0)
    segment = partial(b, b + 1, tuple(kept))
    _, writes = run_blocks(Step((segment,), (kept_tokens(segment),), cached, ()), z, blocks, mods)
    _, k, v = blocks[b].qkv(z[:, kept], mods[b])
    assert set(writes) == {Entry("k", b, b + 1), Entry("v", b, b + 1)}
    others = [n for n in range(16) if n not in kept]
    for entry, new in zip(sorted(writes), (k, v), strict=True):
        assert torch.equal(writes[entry][:, kept], new)
        assert torch.equal(writes[entry][:, others], cached[entry][:, others])

    plan = make_plan(teacher, (FULL, (partial(0, 4, (1, 4)),), (partial(0, 4, (2, 4)),), FULL, (partial(0, 4, (3,)),)), Guidance())
    states = list(sample_steps(teacher, plan, noise_for(0, range(2), teacher), LABELS))
    for entry in (Entry("k", 3, 4), Entry("v", 0, 1)):
        left = [state.writes[entry] for state in states]
        same = [[bool((a[:, n] == b[:, n]).all()) for n in range(5)] for a, b in itertools.pairwise(left)]
        assert same == [
            [True, False, True, True, False],
            [True, True, False, True, False],
            [False] * 5,
            [True, True, True, False, True],
        ]


@torch.no_grad()
def test_partial_of_the_mlp_alone(teacher):
    kept, cached = [1, 4, 9], cache_of_another_time(teacher, 2, 4)
    z, mods, _ = tokens_of(teacher, t=500.0)
    expected = z + cached[Entry("span", 2, 4)]
    part = z[:, kept]
    for b in (2, 3):
        part = part + mods[b].gate_attn * cached[Entry("attn", b, b + 1)][:, kept]
        part = part + mods[b].gate_mlp * teacher.blocks[b].mlp_branch(part, mods[b])
    expected[:, kept] = part
    segment = partial(2, 4, tuple(kept), 0, ("mlp",))
    out, _ = run_blocks(Step((segment,), (kept_tokens(segment),), cached, ()), z, list(teacher.blocks), mods)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
