"""Forecasts of cached values: polynomials and free weights, of residuals, branches, keys and values, and guidance's difference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import FULL, SIGNATURE, make_plan, make_teacher
from exporting import export, torch_latents, worst_error

from export.compiler.parity import check_program
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from tc_lightning.diffusion.update import advance, coefficients
from tc_lightning.errors import PlanError
from tc_lightning.models.conditions import given_of
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.dataflow import Entry, Read, assign_slots
from tc_lightning.plan.forecasts import MAX_HISTORY, Forecast, lagrange_weights
from tc_lightning.plan.guidance import GuidanceMode
from tc_lightning.plan.segments import Segment, compute, partial, reuse, skip
from tc_lightning.rollout.sampling import Rollout, RunState, SamplingStep, noise_for, sample

KEY = Entry("k", 1, 2)
LABELS = torch.tensor([0, 3])


def weighted(segment: Segment, *weights: float, kv: tuple[float, ...] = ()) -> Segment:
    """The segment with free weights, and its keys and values with some of their own."""
    return dataclasses.replace(segment, order=0, weights=weights, kv_order=0, kv_weights=kv)


# What may be stated


@pytest.mark.parametrize(
    "segment",
    [
        skip(0, 4, 1),
        weighted(skip(0, 4), 1.5, -0.75),
        weighted(reuse(0, 4, ("attn",)), 0.9),
        partial(0, 4, (1, 2), 2, kv_order=1),
        weighted(partial(0, 4, (1, 2)), 1.5, -0.5, kv=(1.25, -0.25)),
    ],
)
def test_json_keeps_the_forecasts(segment):
    plan = make_plan(SIGNATURE, (FULL, FULL, (segment,)))
    again = CachePlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert again.flows == plan.flows


def test_json_keeps_the_weights_of_guidance():
    modes = (GuidanceMode(), GuidanceMode(), GuidanceMode("forecast", weights=(1.5, -0.5)))
    plan = dataclasses.replace(make_plan(SIGNATURE, (FULL,) * 3), guidance_modes=modes)
    assert CachePlan.from_json(plan.to_json()) == plan
    assert plan.flows[2].reads == (Read(Entry("guidance", 0, 4), (1, 0), (1.5, -0.5)),)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (partial(0, 4, (1,), kv_order=3), "keys and values: order 3 is not 0, 1 or 2"),
        (partial(0, 4, (1,), branches=("mlp",), kv_order=1), "keys and values are forecast where the mode is partial"),
        (dataclasses.replace(skip(0, 4), kv_order=1), "keys and values are forecast where the mode is partial"),
        (dataclasses.replace(compute(0, 4), weights=(1.0,)), "compute takes neither order nor weights"),
        (dataclasses.replace(skip(0, 4, 1), weights=(1.0,)), "order 1 is that of a polynomial.*one of the two"),
        (weighted(skip(0, 4), *[0.2] * (MAX_HISTORY + 1)), "5 weights: at most the last 4 values are kept"),
        (weighted(skip(0, 4), float("nan")), "must be finite"),
        (weighted(skip(0, 4), 0.5, 0.3, 0.2), "step 2 weighs the last 3 values of span_0_4, of which 2 have been computed"),
        (weighted(partial(0, 4, (1,)), 1.0, kv=(0.5, 0.3, 0.2)), "weighs the last 3 values of k_0, of which 2"),
    ],
)
def test_forecasts_that_are_refused(segment, message):
    with pytest.raises(PlanError, match=message):
        make_plan(SIGNATURE, (FULL, FULL, (segment,)))


def test_modes_of_guidance_that_take_no_weights():
    modes = (GuidanceMode(), GuidanceMode("cond", weights=(1.0,)))
    with pytest.raises(PlanError, match="step 1, guidance: mode cond takes neither order nor weights"):
        dataclasses.replace(make_plan(SIGNATURE, (FULL, FULL)), guidance_modes=modes)


@pytest.mark.parametrize(("forecast", "history", "repeats"), [(Forecast(), 1, True), (Forecast(2), 3, False)])
def test_history_of_polynomials(forecast, history, repeats):
    assert (forecast.history, forecast.repeats) == (history, repeats)


@pytest.mark.parametrize(("weights", "repeats"), [((1.0,), True), ((0.9,), False), ((1.0, 0.0), False)])
def test_history_of_free_weights(weights, repeats):
    assert (Forecast(0, weights).history, Forecast(0, weights).repeats) == (len(weights), repeats)


# What is read and where it lies


def test_keys_and_values_are_forecast_from_full_steps_whatever_was_updated_between():
    """Full, full, an update, a forecast, a repeat: the forecast takes steps 1 and 0, the repeat the update."""
    repeat, ahead = (partial(0, 4, (1, 2), 1),), (partial(0, 4, (1, 2), 1, kv_order=1),)
    plan = make_plan(SIGNATURE, (FULL, FULL, repeat, ahead, repeat))
    reads = [next((r for r in flow.reads if r.entry == KEY), None) for flow in plan.flows]
    assert reads[2:] == [Read(KEY, (1,), (1.0,)), Read(KEY, (1, 0), lagrange_weights((1, 0), 3)), Read(KEY, (2,), (1.0,))]
    assert [KEY in flow.writes for flow in plan.flows] == [True, True, True, False, True]
    slots, depth = assign_slots(plan.flows)
    assert len({slots[KEY, 0], slots[KEY, 1], slots[KEY, 2]}) == 3  # the update does not take the place of what is forecast from
    assert slots[KEY, 4] == slots[KEY, 2]  # nobody forecasts from an update
    assert depth[KEY] == 3


def test_a_step_that_forecasts_keys_and_values_writes_none():
    plan = make_plan(SIGNATURE, (FULL, FULL, (partial(0, 4, (1, 2), 1, kv_order=1),), (partial(0, 4, (3,), 1, kv_order=1),)))
    assert [len(flow.writes) for flow in plan.flows] == [9, 9, 0, 0]  # a span, four keys, four values


def test_steps_of_other_weights_share_a_program_and_steps_of_another_history_do_not():
    steps = (FULL, FULL, FULL, (skip(0, 4, 1),), (weighted(skip(0, 4), 1.25, -0.5),), (weighted(skip(0, 4), 0.5, 0.25, 0.125),))
    assert [p.steps for p in lower(make_plan(SIGNATURE, steps), "cpu").programs if p.reads] == [(3, 4), (5,)]
    kept = (partial(0, 4, (1, 2)),), (weighted(partial(0, 4, (1, 3)), 1.0, kv=(0.9,)),)  # the first updates, the second does not
    assert [p.steps for p in lower(make_plan(SIGNATURE, (FULL, *kept)), "cuda").programs if p.reads] == [(1,), (2,)]


# What a series in time becomes

EVERY_KIND = (reuse(0, 1, ("mlp",)), skip(1, 2), partial(2, 4, (1, 5, 6, 9)))


def with_forecast(forecast: Forecast) -> CachePlan:
    """Four full steps, one that takes residuals, a branch, keys and values and guidance's difference from a cache, and a full one."""
    own = {"order": forecast.order, "weights": forecast.weights}
    kv = {"kv_order": forecast.order, "kv_weights": forecast.weights}
    last = tuple(dataclasses.replace(s, **own, **(kv if s.mode == "partial" else {})) for s in EVERY_KIND)
    modes = (*[GuidanceMode()] * 4, GuidanceMode("forecast", **own), GuidanceMode())
    return dataclasses.replace(make_plan(make_teacher(3), (*[FULL] * 4, last, FULL)), guidance_modes=modes)


class Series:
    """Values of every entry that change in time as a polynomial does, whose coefficients are random."""

    def __init__(self, plan: CachePlan, degree: int) -> None:
        run = Rollout(make_teacher(3), plan, LABELS)
        self._x = noise_for(7, range(2), run.model)
        state = run.start(self._x)
        with torch.no_grad():
            for i in range(4):
                eps, writes = run.predict(state)
                state = run.after(state, *advance(state.x, eps, state.past, coefficients(plan.sampler.steps[i])), writes)
        self._run = run
        shapes = {entry: value.shape for (entry, _), value in state.store.items()}
        generator = torch.Generator().manual_seed(0)
        self._terms = {e: [torch.randn(shape, generator=generator) * 0.1**d for d in range(degree + 1)] for e, shape in shapes.items()}

    def value(self, entry: Entry, step: int) -> torch.Tensor:
        return torch.stack([term * step**d for d, term in enumerate(self._terms[entry])]).sum(0)

    def state(self, plan: CachePlan, at: tuple[int, ...]) -> RunState:
        """Before the step of a plan that forecasts, where full step s has left the series' value of time at[s]."""
        store = {(r.entry, s): self.value(r.entry, at[s]) for r in plan.flows[4].reads for s in r.sources}
        return RunState(4, self._x, (), store)

    def step(self, plan: CachePlan, at: tuple[int, ...]) -> SamplingStep:
        """That step of a plan."""
        state = self.state(plan, at)
        with torch.no_grad():
            eps, writes = Rollout(self._run.model, plan, LABELS).predict(state)
        x_next, m = advance(state.x, eps, state.past, coefficients(plan.sampler.steps[4]))
        return SamplingStep(4, state.x, eps, x_next, state.past, m, state.store, writes)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_series_of_the_orders_degree_is_forecast_exactly_in_torch_and_in_the_graph(tmp_path, order):
    plan, repeated = with_forecast(Forecast(order)), with_forecast(Forecast())
    series = Series(with_forecast(Forecast(2)), order)
    exact, found = series.step(repeated, (4, 4, 4, 4)), series.step(plan, (0, 1, 2, 3))
    torch.testing.assert_close(found.x_next, exact.x_next, rtol=1e-5, atol=1e-5)
    lowest = series.step(with_forecast(Forecast(max(order - 1, 0))), (0, 1, 2, 3))
    assert order == 0 or (lowest.x_next - exact.x_next).abs().max() > 1e-3  # an order less is not enough
    model = make_teacher(3)
    export(model, plan, tmp_path / "artefact")
    (program,) = (p for p in lower(plan, "cpu").programs if 4 in p.steps)
    wanted = found._replace(x_next=exact.x_next, m=exact.m)
    given = given_of(model.conditions, LABELS)
    checks = check_program(plan, program, CachedSampler(tmp_path / "artefact"), wanted, given, model.nulls)
    assert {check.output for check in checks} >= {"x_next"}
    assert max(check.rel_l2 for check in checks) < 1e-5


@pytest.mark.parametrize("weights", [(0.9,), (1.5, -0.75), (0.5, 0.25, -0.125, 0.0625)])
def test_free_weights_are_those_that_are_stated(weights):
    """The sum of weights times values, by hand, and the forecast agree; latest value first."""
    plan = with_forecast(Forecast(0, weights))
    series = Series(with_forecast(Forecast(0, (0.25,) * 4)), 2)
    store = {
        (r.entry, 3): torch.stack([w * series.value(r.entry, 3 - j) for j, w in enumerate(weights)]).sum(0) for r in plan.flows[4].reads
    }
    by_hand = RunState(4, series.state(plan, (0, 1, 2, 3)).x, (), store)
    with torch.no_grad():
        eps, _ = Rollout(make_teacher(3), with_forecast(Forecast()), LABELS).predict(by_hand)
    torch.testing.assert_close(series.step(plan, (0, 1, 2, 3)).eps, eps, rtol=1e-5, atol=1e-5)


# Whole runs

MIXED = (
    FULL,
    FULL,
    (partial(0, 4, (1, 5, 6), 1, kv_order=1),),
    (partial(0, 4, (0, 2, 13), 1),),
    (weighted(partial(0, 4, (2, 3, 4)), 1.25, -0.25, kv=(0.75, 0.25)),),
    (weighted(reuse(0, 1, ("mlp",)), 0.95), weighted(skip(1, 4), 0.5, 0.5)),
    FULL,
    (partial(0, 4, (2, 3, 8), 2, kv_order=2),),
    (weighted(skip(0, 4), 1.5, -0.75, 0.25),),
)


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_slots_hold_what_the_plan_reads(provider):
    """Run the schedule on labels in place of values, updates that are not in place among them."""
    plan = make_plan(SIGNATURE, MIXED)
    lowered = lower(plan, provider)
    buffers = {e.name: [-1] * n for e, n in lowered.slots.items()}
    for i, (bound, flow) in enumerate(zip(lowered.bindings, plan.flows, strict=True)):
        for read in flow.reads:
            assert [buffers[read.entry.name][slot] for slot in bound.reads[read.entry.name]][: len(read.sources)] == [*read.sources]
        for name, slot in bound.writes.items():
            buffers[name][slot] = i


@pytest.mark.parametrize("modes", ["", "bb1bcb2b1"])
def test_forecasts_of_every_kind_agree_with_torch(tmp_path, modes):
    model = make_teacher(2)
    plan = make_plan(model, MIXED, modes=modes)
    manifest = export(model, plan, tmp_path / "artefact")
    assert max(row["rel_l2"] for row in manifest["parity"]["programs"]) < 1e-5
    for labels in ([4], [2, 2, 0, 4, 1]):
        found = CachedSampler(tmp_path / "artefact", max_batch=5).sample(labels, seed=11).latents
        assert worst_error(found, torch_latents(model, plan, labels, 11)) < 1e-5
    flat = make_plan(model, tuple(tuple(dataclasses.replace(s, weights=(), kv_order=0, kv_weights=()) for s in step) for step in MIXED))
    assert worst_error(found, torch_latents(model, flat, labels, 11)) > 1e-3


def test_an_update_of_some_tokens_does_not_spoil_the_history_of_the_others():
    """The last step forecasts alike, whatever the step between has put in place."""
    model, x = make_teacher(2), noise_for(0, range(2), make_teacher(2))
    last = (partial(0, 4, (0, 7), 1, kv_order=1),)
    between = ((skip(0, 4, 1),), (partial(0, 4, (1, 2), 1, kv_order=1),), (partial(0, 4, (1, 2), 1),))
    reads = []
    for middle in between:
        plan = make_plan(model, (FULL, FULL, middle, last))
        reads.append([read for read in plan.flows[3].reads if read.entry.kind in ("k", "v")])
        assert torch.isfinite(sample(model, plan, x, LABELS)).all()
    assert reads[0] == reads[1] == reads[2]
    assert {read.sources for read in reads[0]} == {(1, 0)}


def test_every_token_kept_is_full_compute_whatever_the_forecast(teacher):
    every = tuple(range(16))
    full, kept = (make_plan(teacher, (FULL, FULL, last)) for last in (FULL, (partial(0, 4, every, 1, kv_order=1),)))
    x = noise_for(1, range(2), teacher)
    np.testing.assert_allclose(sample(teacher, kept, x, LABELS), sample(teacher, full, x, LABELS), rtol=1e-5, atol=1e-5)
