"""Corrected skips: in the plan, what they cost, the module, and the reference sampler."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, FULL, SIGNATURE, VP, make_plan
from corrected_plans import LABELS, REPEATED, corrected_plan, make_corrector, uncorrected
from torch import Tensor, nn

from export.compiler.explain import explain
from export.runtime.programs import lower
from tc_lightning.errors import PlanError, RunError
from tc_lightning.models.companions import Companions, companions_for
from tc_lightning.models.corrector import Corrector, ResidualCorrector, correction_clocks
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import cache_bytes_per_image, corrector_macs, plan_macs, segment_macs, step_macs
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.guidance import BOTH, Guidance, GuidanceMode
from tc_lightning.plan.segments import Segment, compute, skip
from tc_lightning.rollout.sampling import noise_for, sample, sample_steps


@pytest.fixture(scope="module")
def companions(teacher: DiT) -> Companions:
    return Companions(corrector=make_corrector(teacher))


# The plan


def test_json_round_trip(teacher: DiT, companions: Companions) -> None:
    plan = corrected_plan(teacher, companions)
    raw = plan.to_json()
    assert CachePlan.from_json(raw) == plan
    assert raw["corrector"] == plan.corrector == companions.corrector.digest
    assert raw["steps"][2]["segments"] == [{"blocks": [0, 4], "mode": "skip", "order": 2, "corrected": True}]
    assert raw["steps"][5]["segments"] == [{"blocks": [0, 4], "mode": "skip", "order": 1}]
    assert dataclasses.replace(plan, corrector="0" * 64).digest != plan.digest
    assert "corrector" not in uncorrected(plan).to_json()


@pytest.mark.parametrize(
    ("segment", "corrector", "message"),
    [
        (skip(0, 4, 1, corrected=True), "", "names no corrector that adds to their forecasts"),
        (skip(0, 4, 1), "1" * 64, "names the corrector 11111111, but no segment is corrected"),
        (skip(0, 4, 0, corrected=True), "1" * 64, "order 1 or 2, or weights; 1 and 0 repeat"),
        (Segment(0, 4, "skip", weights=(1.0,), corrected=True), "1" * 64, "order 1 or 2, or weights; 1 and 0 repeat"),
        (dataclasses.replace(compute(0, 4), corrected=True), "1" * 64, r"with a skip of all blocks, \[0, 4\), alone"),
        (Segment(0, 4, "reuse", 1, ("attn",), corrected=True), "1" * 64, r"with a skip of all blocks, \[0, 4\), alone"),
    ],
)
def test_plans_that_are_refused(segment: Segment, corrector: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(make_plan(SIGNATURE, (FULL,) * 3), steps=(FULL, FULL, (segment,)), corrector=corrector)


def test_a_part_of_the_blocks_and_a_single_value_are_refused() -> None:
    plan = make_plan(SIGNATURE, (FULL,) * 3)
    with pytest.raises(PlanError, match=r"step 2, blocks \[0, 2\): corrected goes with a skip of all blocks"):
        dataclasses.replace(plan, steps=(FULL, FULL, (skip(0, 2, 1, corrected=True), compute(2, 4))), corrector="1" * 64)
    with pytest.raises(PlanError, match="step 1 is corrected by how the residual of its blocks moved, of which one value"):
        dataclasses.replace(plan, steps=(FULL, (skip(0, 4, 1, corrected=True),), FULL), corrector="1" * 64)


def test_json_that_is_refused(teacher: DiT, companions: Companions) -> None:
    raw = corrected_plan(teacher, companions).to_json()
    with pytest.raises(PlanError, match="corrector: expected a sha256, found 3"):
        CachePlan.from_json(raw | {"corrector": 3})
    raw["steps"][2]["segments"][0]["corrected"] = 1
    with pytest.raises(PlanError, match="corrected must be true or false, found 1"):
        CachePlan.from_json(raw)


def test_macs_by_hand(teacher: DiT) -> None:
    """Width 32, 16 tokens: 12 * 32 * 32 a token, 2 * 32 a pair; what the module's linear maps and its attention do."""
    by_hand = 16 * (12 * 32 * 32 + 2 * 16 * 32)
    assert corrector_macs(SIGNATURE) == segment_macs(SIGNATURE, skip(0, 4, 1, corrected=True)) == by_hand
    assert segment_macs(SIGNATURE, skip(0, 4, 1)) == 0
    module = ResidualCorrector(CONFIG)
    parts = [module.enter, module.leave, *(p for name, p in module.block.named_modules() if "adaLN" not in name)]
    a_token = sum(part.weight.numel() for part in parts if isinstance(part, nn.Linear))
    assert by_hand == 16 * a_token + 2 * 16 * 16 * 32
    assert step_macs(SIGNATURE, (skip(0, 4, 1, corrected=True),)) == SIGNATURE.fixed_macs + by_hand


def test_both_halves_and_every_value_are_counted(teacher: DiT, companions: Companions) -> None:
    plan = corrected_plan(teacher, companions)
    assert plan_macs(plan) - plan_macs(uncorrected(plan)) == 4 * corrector_macs(SIGNATURE)  # for one sample, of two halves
    modes = (BOTH, BOTH, BOTH, BOTH, GuidanceMode("forecast", 1), BOTH, BOTH, GuidanceMode("cond"))
    assert plan_macs(dataclasses.replace(plan, guidance_modes=modes)) - plan_macs(
        dataclasses.replace(uncorrected(plan), guidance_modes=modes)
    ) == 3 * corrector_macs(SIGNATURE)
    # Repeating takes one value of its entry, being corrected another one.
    repeated = corrected_plan(teacher, companions, (FULL, FULL, (REPEATED,)))
    alone = dataclasses.replace(uncorrected(repeated), steps=(FULL, FULL, (skip(0, 4),)))
    assert cache_bytes_per_image(repeated) == 2 * cache_bytes_per_image(alone) == 2 * 2 * 16 * 32 * 4


def test_dataflow_and_programs(teacher: DiT, companions: Companions) -> None:
    plan = corrected_plan(teacher, companions)
    span = Entry("span", 0, 4)
    assert [{r.entry: r.sources for r in flow.reads}.get(span) for flow in plan.flows[2:]] == [
        (1, 0),
        None,
        (3, 1),
        (3, 1),
        (3, 1),
        (3, 1, 0),
    ]
    lowered = lower(plan, "cpu")
    programs = [binding.program for binding in lowered.bindings]
    assert programs[2] == programs[7] != programs[4] == programs[6] != programs[5]
    assert "[0,4) corrected skip order 2" in explain(plan, lowered)


# The module


def test_before_training_it_changes_nothing(teacher: DiT) -> None:
    fresh = Companions(corrector=make_corrector(teacher, std=0.0))
    for guidance in (Guidance(), Guidance(1.5, 3)):
        plan = corrected_plan(teacher, fresh, guidance=guidance)
        assert torch.equal(final(teacher, plan, fresh), final(teacher, uncorrected(plan), Companions()))


def test_its_output_is_in_units_of_the_movement(companions: Companions) -> None:
    module, terms = companions.corrector.module, torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    z, forecast, moved = torch.randn(3, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    out = module(z, forecast, moved, terms)
    assert out.shape == (2, 16, 32)
    assert (module(z, forecast, torch.zeros_like(moved), terms) == 0).all()
    torch.testing.assert_close(module(z, forecast, 1000 * moved, terms), 1000 * out, rtol=1e-3, atol=1e-2)
    for changed in ((z + 1 * z[:, :1], forecast, moved), (z, forecast.flip(1), moved), (z, forecast, moved.flip(2))):
        assert (module(*changed, terms) - out).abs().max() > 1e-3  # it looks at all three
    other = z.clone()
    other[:, 5] = z[:, 6]
    assert (module(other, forecast, moved, terms) - out)[:, 0].abs().max() > 1e-5  # and each token at the others


def test_terms_follow_the_times_of_what_is_read(teacher: DiT, companions: Companions) -> None:
    plan = corrected_plan(teacher, companions)
    t = [row.t for row in plan.sampler.steps]
    expected = [[t[0]] * 3, [t[1]] * 3, [t[2], t[1], t[0]], [t[3]] * 3, [t[4], t[3], t[1]], [t[5]] * 3]
    expected += [[t[6], t[3], t[1]], [t[7], t[3], t[1]]]
    assert correction_clocks(plan, VP).tolist() == expected
    terms = companions.corrector.terms(plan, VP)
    assert terms.shape == (8, 8, 32)
    assert (terms[4] - terms[6]).abs().max() > 1e-3


def test_file_round_trip_and_what_is_refused(tmp_path: Path, teacher: DiT, companions: Companions) -> None:
    path, corrector = tmp_path / "corrector.safetensors", companions.corrector
    corrector.save(path)
    assert Corrector.load(path, CONFIG).digest == corrector.digest != make_corrector(teacher, 1).digest
    plan = corrected_plan(teacher, companions)
    assert companions_for(plan, None, path, CONFIG).corrector.digest == plan.corrector
    assert companions_for(uncorrected(plan), None, tmp_path / "absent", CONFIG).corrector is None
    with pytest.raises(PlanError, match=r"none was given: load the `corrector\.safetensors`"):
        companions_for(plan, None, None, CONFIG)
    with pytest.raises(RunError, match="not hold a corrector of this teacher's shape"):
        Corrector.load(path, dataclasses.replace(CONFIG, hidden_size=64))
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(RunError, match="is damaged"):
        Corrector.load(path, CONFIG)


# The reference sampler


def final(model: DiT, plan: CachePlan, companions: Companions) -> Tensor:
    return sample(model, plan, noise_for(4, range(2), model), LABELS, companions=companions)


@torch.no_grad()
def test_a_corrected_step_by_hand(teacher: DiT, companions: Companions) -> None:
    """z + forecast + corrector(z, forecast, movement), of both halves, and the readout of that."""
    plan = corrected_plan(teacher, companions, (FULL, FULL, (skip(0, 4, 1, corrected=True),)), Guidance(1.5, 4))
    states = list(sample_steps(teacher, plan, noise_for(4, range(2), teacher), LABELS, companions=companions))
    span = Entry("span", 0, 4)
    before, last = (states[i].writes[span] for i in (0, 1))
    x, t = torch.cat([states[2].x] * 2), torch.full((4,), plan.sampler.steps[2].t)
    labels = torch.tensor([0, 3, 5, 5])
    z, forecast, moved = teacher.embed(x), 2 * last - before, last - before
    terms = companions.corrector.terms(plan, VP)[2]
    z = z + forecast + companions.corrector.module(z, forecast, moved, terms)
    _, readout = teacher.modulations(teacher.condition(t, label=labels))
    cond, uncond = teacher.readout(z, readout)[:, :4].chunk(2)
    torch.testing.assert_close(states[2].eps, uncond + 1.5 * (cond - uncond), rtol=1e-4, atol=1e-4)


def test_what_it_adds_is_noticed_and_each_image_has_its_own(teacher: DiT, companions: Companions) -> None:
    plan = corrected_plan(teacher, companions)
    together = final(teacher, plan, companions)
    assert (together - final(teacher, uncorrected(plan), companions)).norm() > 1e-2 * together.norm()
    x = noise_for(4, range(2), teacher)
    for i in range(2):
        alone = sample(teacher, plan, x[i : i + 1], LABELS[i : i + 1], companions=companions)
        assert (together[i] - alone[0]).norm() < 1e-5 * alone.norm()


def test_missing_and_other_correctors_are_refused(teacher: DiT, companions: Companions) -> None:
    plan, other = corrected_plan(teacher, companions), make_corrector(teacher, 1)
    with pytest.raises(PlanError, match=r"corrects forecasts with the corrector [0-9a-f]{8}, but none was given"):
        final(teacher, plan, Companions())
    with pytest.raises(PlanError, match=f"{plan.corrector[:8]}, but {other.digest[:8]} was given"):
        final(teacher, plan, Companions(corrector=other))
