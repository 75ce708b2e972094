from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EVERY_MODE, FULL, SIGNATURE, make_plan, make_teacher, random_modes, random_steps, vp_sampler
from test_export import export, graphs_of, torch_latents, worst_error
from torch import Tensor

from export.compiler.explain import explain, plan_figure
from export.compiler.parity import relative_l2
from export.runtime.programs import FULL as STEP_FULL
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from tc_lightning.cache.semantics import Guided, Step, predict
from tc_lightning.errors import PlanError
from tc_lightning.models.dit import DiT
from tc_lightning.models.network import KeyValue
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import cache_bytes_per_image, full_step_macs, macs_speedup, plan_macs
from tc_lightning.plan.dataflow import Entry, Read, assign_slots, lagrange_weights
from tc_lightning.plan.guidance import Guidance, GuidanceMode
from tc_lightning.plan.segments import compute, partial, reuse, skip
from tc_lightning.rollout.sampling import noise_for, reference_plan, sample, sample_steps

SKIP = (skip(0, 4, 1),)
DIFFERENCE = Entry("guidance", 0, 4)
COND, UNCOND = (Entry("span", 0, 4, half) for half in ("cond", "uncond"))
LABELS = torch.tensor([0, 3])


# The plan


@pytest.mark.parametrize("seed", range(3))
def test_json_round_trip_is_exact(seed):
    plan = make_plan(SIGNATURE, random_steps(seed), modes=random_modes(seed, 7))
    again = CachePlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest != make_plan(SIGNATURE, random_steps(seed)).digest


def test_json_names_only_the_steps_that_leave_a_half_out():
    steps = make_plan(SIGNATURE, (FULL,) * 4, modes="b1cb").to_json()["steps"]
    assert [step.get("guidance") for step in steps] == [None, {"mode": "forecast", "order": 1}, {"mode": "cond"}, None]


def test_both_everywhere_is_no_mode_at_all():
    both, plain = make_plan(SIGNATURE, modes="b" * 8), make_plan(SIGNATURE)
    assert both == plain
    assert both.digest == plain.digest
    assert lower(both, "cpu") == lower(plain, "cpu")


def test_full_steps_compute_both_halves():
    plan = make_plan(SIGNATURE, (FULL,) * 4, modes="bcb0")
    assert plan.full_steps == [0, 2]
    assert plan.summary == f"custom-ddim4-full2-both2-{plan.digest[:8]}"


@pytest.mark.parametrize(
    ("modes", "guidance", "message"),
    [
        ((GuidanceMode("uncond"), GuidanceMode()), None, "step 0, guidance: unknown mode 'uncond', choose one of both, forecast, cond"),
        ((GuidanceMode(), GuidanceMode("forecast", 3)), None, "step 1, guidance: order 3 is not 0, 1 or 2"),
        ((GuidanceMode(), GuidanceMode("cond", 1)), None, "order 1 .* or mode cond takes none"),
        ((GuidanceMode("cond"),) * 2, Guidance(), "leaves out the unconditional half, and at guidance scale 1 there is none"),
        ((GuidanceMode("cond"),), None, "there are 1 guidance modes for 2 steps"),
        ((GuidanceMode("forecast"), GuidanceMode()), None, "step 0 forecasts guidance from the difference of the two halves"),
    ],
)
def test_modes_that_are_refused(modes, guidance, message):
    plan = make_plan(SIGNATURE, (FULL,) * 2, guidance)
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(plan, guidance_modes=modes)


@pytest.mark.parametrize("raw", [[], {}, {"mode": 1}, {"mode": "cond", "colour": 1}, {"mode": "forecast", "order": 1.0}])
def test_json_that_is_refused(raw):
    plan = make_plan(SIGNATURE, (FULL,) * 2).to_json()
    plan["steps"][1]["guidance"] = raw
    with pytest.raises(PlanError, match=r"step 1: .*guidance"):
        CachePlan.from_json(plan)


def test_a_half_that_was_never_computed_cannot_be_read():
    with pytest.raises(PlanError, match=r"step 1 reads the cached span of blocks \[0, 4\) in the unconditional half"):
        make_plan(SIGNATURE, (FULL, SKIP), modes="cb")
    make_plan(SIGNATURE, (FULL, SKIP), modes="cc")


# Reads and writes


def test_each_half_reads_what_it_wrote_itself():
    flows = make_plan(SIGNATURE, (FULL, FULL, SKIP, SKIP), modes="bcbc").flows
    assert [set(flow.writes) for flow in flows] == [{COND, UNCOND}, {COND}, set(), set()]
    assert flows[2].reads == (Read(COND, (1, 0), (2.0, -1.0)), Read(UNCOND, (0,), (1.0,)))
    assert flows[3].reads == (Read(COND, (1, 0), lagrange_weights((1, 0), 3)),)
    assert assign_slots(flows)[1] == {COND: 2, UNCOND: 1}


def test_the_difference_is_written_with_both_halves_and_read_by_forecasts():
    flows = make_plan(SIGNATURE, (FULL,) * 6, modes="bb1b10").flows
    assert [flow.writes for flow in flows] == [(DIFFERENCE,), (DIFFERENCE,), (), (DIFFERENCE,), (), ()]
    assert [flow.reads for flow in flows[:3]] == [(), (), (Read(DIFFERENCE, (1, 0), (2.0, -1.0)),)]
    assert flows[4].reads == (Read(DIFFERENCE, (3, 1), lagrange_weights((3, 1), 4)),)
    assert flows[5].reads == (Read(DIFFERENCE, (3,), (1.0,)),)
    assert DIFFERENCE.name == "guidance"
    assert (COND.name, Entry("k", 3, 4, "uncond").name) == ("span_0_4_cond", "k_3_uncond")


def test_keys_and_values_are_updated_half_by_half():
    p = (partial(0, 4, (1, 2)),)
    flows = make_plan(SIGNATURE, (FULL, p, p, p), modes="bcbc").flows
    cond, uncond = (Entry("k", 2, 3, half) for half in ("cond", "uncond"))

    def sources(i: int) -> dict[Entry, tuple[int, ...]]:
        return {read.entry: read.sources for read in flows[i].reads if read.entry in (cond, uncond)}

    assert [sources(i) for i in (1, 2, 3)] == [{cond: (0,)}, {cond: (1,), uncond: (0,)}, {cond: (2,)}]
    assert [flow.updates(cond) for flow in flows] == [False, True, True, True]
    assert [flow.updates(uncond) for flow in flows] == [False, False, True, False]


# Costs


def test_a_step_of_one_half_costs_half():
    full, fixed = full_step_macs(SIGNATURE), SIGNATURE.fixed_macs
    plan = make_plan(SIGNATURE, (FULL, FULL, SKIP, SKIP), modes="b0cb", reference=vp_sampler("ddim", 8))
    assert plan_macs(plan) == full + full / 2 + fixed / 2 + fixed
    assert macs_speedup(plan) == pytest.approx(8 * full / (1.5 * full + 1.5 * fixed))


def test_cache_bytes_of_each_kind():
    """Two values of the conditional span, one of the other, two differences of 3 channels in fp32 whatever the precision."""
    plan = make_plan(SIGNATURE, (FULL, FULL, FULL, SKIP), modes="bcb1")
    assert assign_slots(plan.flows)[1] == {COND: 2, DIFFERENCE: 2}
    assert cache_bytes_per_image(plan) == 2 * 16 * 32 * 4 + 2 * 3 * 8 * 8 * 4
    assert cache_bytes_per_image(plan, 2) == 2 * 16 * 32 * 2 + 2 * 3 * 8 * 8 * 4
    whole = make_plan(SIGNATURE, (FULL, FULL, SKIP, FULL), modes="bbbc")
    assert cache_bytes_per_image(whole) == cache_bytes_per_image(make_plan(SIGNATURE, (FULL, FULL, SKIP, FULL)))


# A network that can be run by hand: each of three blocks adds gate x z to z; the gate is 1 in the conditional half, 2 in the other


class Growing:
    """A block that adds its input times the gate; it counts the rows that it has seen."""

    branches = ("attn", "mlp")

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

    def embed(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.flatten(2)

    def readout(self, z: Tensor, final: None) -> Tensor:
        return z[..., None]


def by_hand(mode: str, segments: Any, cached: dict[Entry, float], wanted: list[Entry]) -> tuple[float, dict[Entry, float], list[int]]:
    """eps at x = 1 and scale 3, the writes, and the rows that each block has seen, for one image."""
    model, gates = ByHand(), torch.tensor([1.0, 2.0] if mode == "both" else [1.0]).view(-1, 1, 1)
    mods = [gates] * 3
    values = {entry: torch.full((1, 1, 1), value) for entry, value in cached.items()}
    step = Step(tuple(segments), (None,) * len(segments), values, wanted)
    eps, writes = predict(step, Guided(mode, 3.0, 1), torch.ones(1, 1, 1, 1), model, mods, None, 1)
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


# Programs


def test_steps_of_different_halves_have_programs_of_their_own():
    lowered = lower(make_plan(SIGNATURE, (FULL, SKIP, SKIP, FULL, SKIP, FULL), modes="bb0b1c"), "cpu")
    assert [(p.name, p.steps, p.guidance.mode) for p in lowered.programs] == [
        ("step_00", (0, 3), "both"),
        ("step_01", (1,), "both"),
        ("step_02", (2,), "forecast"),
        ("step_03", (4,), "forecast"),
        ("step_04", (5,), "cond"),
        (STEP_FULL, (), "both"),
    ]
    assert lowered.programs[3].reads == ((DIFFERENCE, 2), (COND, 2))
    assert lowered.programs[0].writes == (DIFFERENCE, COND, UNCOND)


def test_step_full_is_for_both_halves():
    programs = lower(make_plan(SIGNATURE, (FULL,) * 3, modes="bcb"), "cpu").programs
    assert [(p.name, p.steps) for p in programs] == [("step_00", (1,)), (STEP_FULL, (0, 2))]


def test_listing_and_picture(tmp_path):
    plan = make_plan(SIGNATURE, (FULL, FULL, SKIP, (partial(0, 4, (1, 2)),), SKIP), modes="bb1cb")
    text = explain(plan, lower(plan, "cpu"))
    assert "step_01: 1 steps" in text
    for line in (
        "of a full step; conditional half alone, guided by a forecast of order 1",
        "of a full step; conditional half alone, not guided",
        "    reads  guidance x2, span [0,4) cond x2",
        "    reads  span [0,4) cond, k 0-3 cond, v 0-3 cond",
        "    reads  span [0,4) cond x2, span [0,4) uncond x2",
        "    writes guidance, span [0,4) cond, span [0,4) uncond, k 0-3 cond, v 0-3 cond",
    ):
        assert line in text
    assert text.endswith("in 12 places of 2 kB a sample and 2 places of 1 kB a sample")
    macs = SIGNATURE.fixed_macs / full_step_macs(SIGNATURE)
    assert f"{macs / 2:.3f} of a full step; conditional half alone, guided" in text
    plan_figure(plan, lower(plan, "cpu"), tmp_path / "modes.png")
    plan_figure(dataclasses.replace(plan, guidance_modes=()), lower(plan, "cpu"), tmp_path / "plain.png")
    assert (tmp_path / "modes.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


# The artefact

MIXED = (
    FULL,
    FULL,
    (reuse(0, 1, ("mlp",), 1), skip(1, 3, 2), partial(3, 4, (0, 3, 7), 0, ("mlp",))),
    (partial(0, 2, (1, 5, 6), 1), compute(2, 4)),
    (partial(0, 2, (0, 2, 13), 1), compute(2, 4)),
    (partial(0, 2, (2, 3, 4), 1), compute(2, 4)),
    FULL,
    (partial(0, 2, (2, 3, 8), 1), skip(2, 4, 2)),
    (skip(0, 4, 1),),
)


@pytest.mark.parametrize(
    ("modes", "guidance", "sampler"),
    [("bb1bc2bbc", Guidance(1.5, 3), "dpmpp_2m"), ("bb0cbb21b", Guidance(2.5, 4), "ddim"), ("bbcccccc2", Guidance(0.5, 1), "dpmpp_3m")],
)
def test_mixed_halves_agree_with_torch(tmp_path, modes, guidance, sampler):
    model = make_teacher(2)
    plan = make_plan(model, MIXED, guidance, sampler, "logsnr", modes=modes)
    manifest = export(model, plan, tmp_path / "artefact")
    assert max(row["rel_l2"] for row in manifest["parity"]["programs"]) < 1e-5
    assert {row["where"].split(",")[0] for row in manifest["parity"]["programs"]} == {*manifest["programs"]}
    loaded = CachedSampler(tmp_path / "artefact", max_batch=3)
    for labels in ([4], [0, 3, 1], [2, 2, 0, 4, 1]):
        result = loaded.sample(labels, seed=11)
        assert worst_error(result.latents, torch_latents(model, plan, labels, 11)) < 1e-5
    assert worst_error(loaded.sample(labels, seed=11, full=True).latents, torch_latents(model, reference_plan(plan), labels, 11)) < 1e-5
    assert relative_l2(result.latents, torch_latents(model, dataclasses.replace(plan, guidance_modes=()), labels, 11)) > 1e-3
    assert result.receipt["cache_bytes"] == 3 * cache_bytes_per_image(plan)


@pytest.mark.parametrize("seed", range(4))
def test_random_halves_agree_with_torch(tmp_path, seed):
    model = make_teacher(seed, depth=3)
    plan = make_plan(model, random_steps(seed, num_steps=6, depth=3), modes=random_modes(seed, 6))
    export(model, plan, tmp_path / "artefact")
    loaded = CachedSampler(tmp_path / "artefact", preload=False)
    assert worst_error(loaded.sample([1, 3], seed=5).latents, torch_latents(model, plan, [1, 3], 5)) < 1e-5


def test_half_precision_keeps_the_difference_in_fp32(tmp_path, teacher):
    plan = make_plan(teacher, (FULL, FULL, SKIP, SKIP), modes="bb1b")
    manifest = export(teacher, plan, tmp_path / "half", "fp16")
    assert manifest["parity"]["trajectory_rel_l2"] < 3e-2
    entries = manifest["entries"]
    assert entries["guidance"] == {"shape": (3, 8, 8), "rows": 1, "dtype": "fp32", "slots": 2}
    assert entries["span_0_4_uncond"] == {"shape": (16, 32), "rows": 1, "dtype": "fp16", "slots": 2}
    receipt = CachedSampler(tmp_path / "half").sample([1, 2]).receipt
    assert receipt["cache_bytes"] == 2 * cache_bytes_per_image(plan, 2)


def test_receipt_tells_which_halves_were_computed(tmp_path, teacher):
    plan = make_plan(teacher, (FULL, FULL, FULL, SKIP, SKIP), modes="b0c1b")
    export(teacher, plan, tmp_path / "artefact")
    sampler = CachedSampler(tmp_path / "artefact")
    cached, full, strong = (sampler.sample([0, 3], seed=1, **kw) for kw in ({}, {"full": True}, {"guidance": 4.0}))
    assert cached.receipt["guidance"]["steps"] == {"both": 2, "forecast": 2, "cond": 1}
    assert full.receipt["guidance"]["steps"] == {"both": 5}
    assert cached.receipt["blocks_x_tokens_computed"] == 64 + 32 + 32
    assert cached.receipt["blocks_x_tokens_share"] == pytest.approx(2 / 5)
    expected = torch_latents(teacher, dataclasses.replace(plan, guidance=Guidance(4.0, 3)), [0, 3], 1)
    assert worst_error(strong.latents, expected) < 1e-5
    assert not np.allclose(strong.latents, cached.latents)


def test_a_step_of_one_half_knows_nothing_of_the_other(tmp_path, teacher):
    """No graph of one half divides or doubles its batch, and without guidance its scale is no input."""
    plan = make_plan(teacher, (FULL, FULL, SKIP, SKIP), modes="b0bc")
    export(teacher, plan, tmp_path / "artefact")
    graphs = graphs_of(tmp_path / "artefact")
    for program in lower(plan, "cpu").programs:
        graph = graphs[program.name].graph
        axes = [a.i for node in graph.node if node.op_type in ("Split", "Concat") for a in node.attribute if a.name == "axis"]
        inputs = {value.name for value in graph.input}
        assert (0 in axes) == (not program.guidance.single), program.name
        assert ("guidance" in inputs) == (program.guidance.mode != "cond")
