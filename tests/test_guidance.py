"""Guidance of which a half is left out: a network run by hand, and the reference sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import EVERY_MODE, FULL, make_plan, random_steps
from halves import DIFFERENCE
from torch import Tensor

from tc_lightning.cache.semantics import Guided, Step, predict
from tc_lightning.models.dit import DiT
from tc_lightning.models.network import KeyValue, Terms
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, reuse, skip
from tc_lightning.rollout.sampling import noise_for, sample, sample_steps

LABELS = torch.tensor([0, 3])


# A network that can be run by hand: each of three blocks adds gate x z to z; the gate is 1 in the conditional half, 2 in the other


class Growing:
    """A block that adds its input times the gate; it counts the rows that it has seen."""

    branches, source = ("attn", "mlp"), None

    def __init__(self) -> None:
        self.rows = 0

    def branch(self, name: str, z: Tensor, mod: Any) -> tuple[Tensor, KeyValue | None]:
        self.rows += len(z) * (name == "attn")
        return (z, KeyValue(z, z)) if name == "attn" else (0 * z, None)

    def gated(self, name: str, update: Tensor, mod: Any, at: None) -> Tensor:
        return mod * update


class ByHand:
    """Three growing blocks on latents of one channel and one pixel."""

    def __init__(self) -> None:
        self.blocks = [Growing() for _ in range(3)]

    def embed(self, x_BCHW: Tensor, start: Any) -> Tensor:
        return x_BCHW.flatten(2)

    def readout(self, z: Tensor, final: None) -> Tensor:
        return z[..., None]


def by_hand(mode: str, segments: Any, cached: dict[Entry, float], wanted: list[Entry]) -> tuple[float, dict[Entry, float], list[int]]:
    """eps at x = 1 and scale 3, the writes, and the rows that each block has seen, for one image."""
    model, gates = ByHand(), torch.tensor([1.0, 2.0] if mode == "both" else [1.0]).view(-1, 1, 1)
    mods = [gates] * 3
    values = {entry: torch.full((1, 1, 1), value) for entry, value in cached.items()}
    step = Step(tuple(segments), (None,) * len(segments), values, wanted)
    eps, writes = predict(step, Guided(mode, 3.0, 1), torch.ones(1, 1, 1, 1), model, Terms((), mods, None), 1)
    assert eps.shape == (1, 1, 1, 1)
    return eps.item(), {entry: value.item() for entry, value in writes.items()}, [block.rows for block in model.blocks]


def test_guidance_by_hand():
    spans = [Entry("span", 1, 3, half) for half in ("cond", "uncond")]
    everything = [compute(0, 3)]
    # cond 2^3 = 8, uncond 3^3 = 27: 27 + 3 (8 - 27) = -30
    eps, writes, rows = by_hand("both", everything, {}, [*spans, DIFFERENCE])
    assert (eps, rows) == (-30.0, [2, 2, 2])
    assert writes == {spans[0]: 6.0, spans[1]: 24.0, DIFFERENCE: -19.0}
    # one half: 8 + 2 x -19 is the same; with another difference, 8 + 2 x 5; without guidance, 8
    assert by_hand("forecast", everything, {DIFFERENCE: -19.0}, []) == (-30.0, {}, [1, 1, 1])
    assert by_hand("forecast", everything, {DIFFERENCE: 5.0}, spans[:1]) == (18.0, {spans[0]: 6.0}, [1, 1, 1])
    assert by_hand("cond", everything, {}, []) == (8.0, {}, [1, 1, 1])
    # skipping blocks 1 and 2: cond 2 + 10, uncond 3 + 100: each half takes its own
    some = [compute(0, 1), skip(1, 3)]
    assert by_hand("both", some, {spans[0]: 10.0, spans[1]: 100.0}, []) == (103.0 + 3 * (12 - 103), {}, [2, 0, 0])
    assert by_hand("cond", some, {spans[0]: 10.0}, []) == (12.0, {}, [1, 0, 0])
    attn = Entry("attn", 0, 1)
    halves = [attn._replace(half=half) for half in ("cond", "uncond")]
    cached = {halves[0]: 10.0, halves[1]: 100.0}  # 1 + 1 x 10 = 11 -> 44; 1 + 2 x 100 = 201 -> 1809
    assert by_hand("both", [reuse(0, 1, ("attn",)), compute(1, 3)], cached, [])[::2] == (1809.0 + 3 * (44 - 1809), [0, 2, 2])


# The reference sampler


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_without_the_unconditional_half_it_is_sampling_at_scale_one_bit_for_bit(teacher, seed):
    steps, x = random_steps(seed), noise_for(seed, range(2), teacher)
    alone = make_plan(teacher, steps, Guidance(2.5, 3), modes="c" * 7, sampler="dpmpp_2m")
    unguided = make_plan(teacher, steps, Guidance(), sampler="dpmpp_2m")
    assert torch.equal(sample(teacher, alone, x, LABELS), sample(teacher, unguided, x, LABELS))


@pytest.mark.parametrize("steps", [EVERY_MODE, random_steps(5, 8), random_steps(6, 8)])
@torch.no_grad()
def test_caches_of_two_halves_are_those_of_the_whole_bit_for_bit(teacher, steps):
    """As long as both halves are computed, and also after steps that touched neither cache."""
    x = noise_for(3, range(2), teacher)
    plain, split = make_plan(teacher, steps), make_plan(teacher, steps, modes="bbbbbbbc")
    states = [list(sample_steps(teacher, plan, x, LABELS)) for plan in (plain, split)]
    assert all(torch.equal(a.x_next, b.x_next) for a, b in zip(*(s[:7] for s in states), strict=True))
    assert not torch.equal(states[0][7].x_next, states[1][7].x_next)


def eps_of(teacher: DiT, x: Tensor, t: float, labels: Tensor) -> Tensor:
    return teacher.eps(x, torch.full((len(x),), t), labels)


@pytest.mark.parametrize("guided", [3, 4])
@torch.no_grad()
def test_forecasts_of_the_difference_by_hand(teacher, guided):
    """The teacher's own forward; order 0 repeats the difference of the step before, order 1 extends the last two."""
    plan = make_plan(teacher, (FULL,) * 5, Guidance(2.5, guided), modes="b0b1c")
    states = list(sample_steps(teacher, plan, noise_for(1, range(2), teacher), LABELS))
    null = torch.full_like(LABELS, 5)
    t = [row.t for row in plan.sampler.steps]
    cond = [eps_of(teacher, s.x, t[i], LABELS) for i, s in enumerate(states)]
    d = {i: cond[i] - eps_of(teacher, states[i].x, t[i], null) for i in (0, 2)}
    assert d[2].abs().max() > 0.05
    differences = [d[0], d[0], d[2], d[2] + (d[2] - d[0]) / 2, torch.zeros_like(d[0])]
    for state, c, difference in zip(states, cond, differences, strict=True):
        expected = c.clone()
        expected[:, :guided] += 1.5 * difference[:, :guided]
        torch.testing.assert_close(state.eps, expected, rtol=1e-4, atol=1e-5)
