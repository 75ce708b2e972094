"""Tokens chosen by content: identities with full compute and with static tokens, ties, files, and the exported graphs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG, FULL, SIGNATURE, make_plan
from content_plans import LABELS, STEPS, content_plan, make_selector
from torch import Tensor

from export.compiler.explain import explain
from export.compiler.symbolic import Graph, Weights
from export.compiler.torch_functions import ANSWERS
from export.runtime.programs import computed_tokens, lower
from tc_lightning.cache.semantics import Step, choose_tokens, run_blocks
from tc_lightning.errors import PlanError, RunError
from tc_lightning.models.companions import Companions, companions_for
from tc_lightning.models.content_predictor import ContentPredictor, Selector
from tc_lightning.models.dit import DiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import block_macs, selector_macs, step_macs
from tc_lightning.plan.dataflow import Entry, entries_read
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import Segment, compute, content, partial, skip
from tc_lightning.rollout.evaluation import RolloutEvaluator
from tc_lightning.rollout.sampling import noise_for, sample, sample_steps


@pytest.fixture(scope="module")
def selector(teacher: DiT) -> Selector:
    return make_selector(teacher)


# The plan


def test_json_round_trip(teacher: DiT, selector: Selector) -> None:
    plan = content_plan(teacher, selector)
    raw = plan.to_json()
    assert CachePlan.from_json(raw) == plan
    assert raw["selector"] == selector.digest
    assert raw["steps"][1]["segments"][0] == {
        "blocks": [0, 1],
        "mode": "partial",
        "keep": 5,
        "choice": "content",
        "branches": ["attn", "mlp"],
        "order": 1,
    }
    other = dataclasses.replace(plan, selector="0" * 64)
    assert other.digest != plan.digest
    assert "selector" not in make_plan(SIGNATURE).to_json()


@pytest.mark.parametrize(
    ("segment", "selector", "message"),
    [
        (content(0, 4, 5), "", "names no content predictor"),
        (compute(0, 4), "1" * 64, "names the content predictor 11111111, but no segment needs one"),
        (content(0, 4, 0), "1" * 64, "content keeps 1 to 16 tokens"),
        (content(0, 4, 17), "1" * 64, "content keeps 1 to 16 tokens"),
        (Segment(0, 4, "partial", 0, ("attn", "mlp"), (1,), "content", 1), "1" * 64, "lists none; found keep 1, 1 listed"),
        (Segment(0, 4, "skip", choice="content", keep=3), "1" * 64, "content only where the mode is partial"),
        (Segment(0, 4, "partial", 0, ("attn", "mlp"), (1,), "dice"), "", r"choice 'dice' must be of \['static', 'content'\]"),
    ],
)
def test_plans_that_are_refused(segment: Segment, selector: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(make_plan(SIGNATURE, (FULL, FULL)), steps=(FULL, (segment,)), selector=selector)


def test_json_that_is_refused(teacher: DiT, selector: Selector) -> None:
    raw = content_plan(teacher, selector).to_json()
    with pytest.raises(PlanError, match="selector: expected a sha256, found 3"):
        CachePlan.from_json(raw | {"selector": 3})
    raw["steps"][1]["segments"][0]["keep"] = 5.0
    with pytest.raises(PlanError, match="and keep an integer"):
        CachePlan.from_json(raw)


def test_static_segments_count_their_tokens() -> None:
    segment = partial(0, 2, (1, 5))
    assert (segment.keep, segment.is_content) == (2, False)
    assert dataclasses.replace(segment, tokens=(1, 5, 6)).keep == 3


def test_content_reads_and_costs_what_static_does() -> None:
    static, chosen = partial(1, 3, (0, 1, 2), 1), content(1, 3, 3, 1)
    assert entries_read(chosen, 16) == entries_read(static, 16)
    assert entries_read(content(1, 3, 16, 1), 16) == {}
    assert computed_tokens(chosen, 16) == computed_tokens(static, 16) == 6
    rest = (skip(0, 1), skip(3, 4))
    extra = step_macs(SIGNATURE, (rest[0], chosen, rest[1])) - step_macs(SIGNATURE, (rest[0], static, rest[1]))
    assert extra == selector_macs(SIGNATURE) == block_macs(SIGNATURE, 16) + 16 * 32 * 4


def test_equal_content_steps_share_a_program(teacher: DiT, selector: Selector) -> None:
    plan = content_plan(teacher, selector)
    assert lower(plan, "cpu").bindings[1].program == lower(plan, "cpu").bindings[3].program != lower(plan, "cpu").bindings[4].program
    assert "[0,1) partial 5 content tokens order 1" in explain(plan, lower(plan, "cpu"))


# Choosing


def test_tokens_by_hand() -> None:
    a_BLN = torch.zeros(2, 4, 6)
    a_BLN[0, 1] = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.4])
    a_BLN[0, 2] = torch.tensor([0.1, 0.0, 0.2, 0.1, 0.3, 0.4])  # means with block 1: 0.1 0.45 0.2 0.45 0.3 0.4
    a_BLN[1, 1:3, 5] = 1.0

    def chosen(segment: Segment) -> list[list[int]]:
        return [sorted(row) for row in choose_tokens(segment, a_BLN).tolist()]

    assert chosen(content(1, 2, 2)) == [[1, 3], [0, 5]]
    assert chosen(content(1, 3, 3)) == [[1, 3, 5], [0, 1, 5]]
    assert chosen(content(0, 1, 4)) == [[0, 1, 2, 3]] * 2  # all equal: the first


@pytest.mark.parametrize(("N", "keep"), [(16, 5), (64, 64), (300, 77), (4096, 1000)])
def test_torch_and_onnxruntime_break_ties_alike(N: int, keep: int) -> None:
    """Scores of few different values, ties in every row, and scores that differ by less than the grid."""
    import onnxruntime as ort

    g, segment = Graph("ties", Weights("", {}, {}), ANSWERS), content(1, 3, keep)
    g.output("tokens", choose_tokens(segment, g.input("a", "fp32", ["batch", 4, N])), ["batch", keep])  # type: ignore[arg-type]
    session = ort.InferenceSession(g.model().SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(N)
    few = rng.integers(0, 3, (3, 4, N)) / 2
    near = 0.5 + rng.integers(0, 2, (3, 4, N)) * 1e-9
    for a_BLN in (few.astype(np.float32), near.astype(np.float32), np.ones((3, 4, N), np.float32)):
        ours = choose_tokens(segment, torch.from_numpy(a_BLN)).sort(1).values.numpy()
        (theirs,) = session.run(None, {"a": a_BLN})
        assert np.array_equal(np.sort(theirs, 1), ours)
        stable = np.argsort(-a_BLN[:, 1:3].mean(1), axis=1, kind="stable")[:, :keep]
        assert np.array_equal(ours, np.sort(stable, 1))


# The predictor


def test_predictor_starts_as_block_0_and_scores_everything_alike(teacher: DiT) -> None:
    predictor = ContentPredictor.from_teacher(teacher)
    assert all(torch.equal(value, teacher.blocks[0].state_dict()[name]) for name, value in predictor.block.state_dict().items())
    x, t = noise_for(0, range(2), teacher), torch.tensor([900.0, 20.0])
    a_BLN = predictor.scores(teacher, x, t)
    assert a_BLN.shape == (2, 4, 16)
    torch.testing.assert_close(a_BLN, torch.full_like(a_BLN, 0.75))
    assert {name for name, p in predictor.named_parameters() if p.requires_grad} == set(predictor.state_dict())
    assert not any(p.requires_grad for p in Selector.of(predictor).predictor.parameters())
    a_BLN.sum().backward()
    assert predictor.head.weight.grad is not None


@torch.no_grad()
def test_scores_look_at_image_and_time_but_not_at_the_label(teacher: DiT, selector: Selector) -> None:
    x, t = noise_for(0, range(2), teacher), torch.tensor([500.0, 500.0])
    a_BLN = selector.predictor.scores(teacher, x, t)
    assert (a_BLN[0] - a_BLN[1]).abs().max() > 1e-3
    assert (selector.predictor.scores(teacher, x, t - 300) - a_BLN).abs().max() > 1e-3
    plan = content_plan(teacher, selector, (FULL, STEPS[1]), Guidance(2.0, 4))
    half = [state.writes for state in sample_steps(teacher, plan, x[:1], torch.tensor([1]), companions=Companions(selector))]
    k = Entry("k", 0, 1)
    same = [bool((half[1][k][row, n] == half[0][k][row, n]).all()) for row in (0, 1) for n in range(16)]
    assert same[:16] == same[16:]  # both halves recompute the same tokens
    assert same[:16].count(False) == 5


def test_file_round_trip_and_what_is_refused(tmp_path: Path, teacher: DiT, selector: Selector) -> None:
    path = tmp_path / "content.safetensors"
    selector.save(path)
    loaded = Selector.load(path, CONFIG)
    assert loaded.digest == selector.digest != make_selector(teacher, 1).digest
    plan = content_plan(teacher, selector)
    assert companions_for(plan, path, None, CONFIG).selector.digest == plan.selector
    assert companions_for(make_plan(teacher), path, None, CONFIG).selector is None
    with pytest.raises(PlanError, match=r"none was given: load the `content\.safetensors`"):
        companions_for(plan, None, None, CONFIG)
    with pytest.raises(RunError, match="not hold a content predictor of this teacher's shape"):
        Selector.load(path, dataclasses.replace(CONFIG, depth=5))
    with pytest.raises(RunError, match="cannot read the content predictor"):
        Selector.load(tmp_path / "absent.safetensors", CONFIG)
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(RunError, match="is damaged"):
        Selector.load(path, CONFIG)


# The reference sampler


def final(model: DiT, plan: CachePlan, selector: Selector | None) -> Tensor:
    with torch.no_grad():
        return sample(model, plan, noise_for(4, range(2), model), LABELS, companions=Companions(selector))


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(1.5, 3)])
def test_keeping_every_token_is_full_compute_bit_for_bit(teacher: DiT, selector: Selector, guidance: Guidance) -> None:
    full = final(teacher, content_plan(teacher, selector, (FULL,) * 4, guidance), None)
    kept = (content(0, 1, 16), content(1, 4, 16))
    assert torch.equal(final(teacher, content_plan(teacher, selector, (FULL, *(kept,) * 3), guidance), selector), full)
    fewer = (content(0, 1, 15), content(1, 4, 16))
    other = final(teacher, content_plan(teacher, selector, (FULL, *(fewer,) * 3), guidance), selector)
    assert (other - full).abs().max() > 1e-4 * full.abs().max()


@pytest.mark.parametrize("branches", [("attn", "mlp"), ("mlp",)])
def test_scores_that_favour_a_list_give_the_static_segment(teacher: DiT, branches: tuple[str, ...]) -> None:
    """The content path with each row's own index, and the static path with one for all, are the same arithmetic."""
    kept = (1, 2, 7, 11, 14)
    z = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    mods, _ = teacher.modulations(teacher.condition(torch.tensor([500.0, 500.0]), label=LABELS))
    entries = [Entry("span", 1, 3), *(Entry(kind, b, b + 1) for b in (1, 2) for kind in ("k", "v", "attn"))]
    blocks = list(teacher.blocks)
    with torch.no_grad():
        _, cached = run_blocks(Step(FULL, (None,), {}, entries), z + 0.1, blocks, mods)
        a_BLN = torch.zeros(2, 4, 16)
        a_BLN[:, 1:3, list(kept)] = 1.0
        chosen = content(1, 3, 5, 0, branches)
        segments = [(partial(1, 3, kept, 0, branches), torch.tensor(kept)), (chosen, choose_tokens(chosen, a_BLN))]
        results = [run_blocks(Step((s,), (index,), cached, ()), z, blocks, mods) for s, index in segments]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    assert set(results[1][1]) == set(results[0][1])
    for entry, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][entry], value, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_image_has_its_own_tokens(teacher: DiT, selector: Selector) -> None:
    plan = content_plan(teacher, selector)
    x, labels = noise_for(0, range(3), teacher), torch.tensor([0, 3, 3])
    together = sample(teacher, plan, x, labels, companions=Companions(selector))
    for i in range(3):
        alone = sample(teacher, plan, x[i : i + 1], labels[i : i + 1], companions=Companions(selector))
        assert (together[i] - alone[0]).norm() < 1e-5 * alone.norm()
    k = Entry("k", 0, 1)
    first, second = [state.writes[k] for state in list(sample_steps(teacher, plan, x, labels, companions=Companions(selector)))[:2]]
    changed = (first != second).any(-1)
    assert (changed.sum(1) == 5).all()
    assert not torch.equal(changed[0], changed[1])


def test_missing_and_other_predictors_are_refused(teacher: DiT, selector: Selector) -> None:
    plan, x = content_plan(teacher, selector), noise_for(0, range(2), teacher)
    with pytest.raises(PlanError, match="but none was given"):
        sample(teacher, plan, x, LABELS)
    other = make_selector(teacher, 1)
    with pytest.raises(PlanError, match=f"{selector.digest[:8]}, but {other.digest[:8]} was given"):
        sample(teacher, plan, x, LABELS, companions=Companions(other))
    with pytest.raises(PlanError, match="but none was given"):
        RolloutEvaluator(teacher, x, LABELS, x)(plan)
    assert RolloutEvaluator(teacher, x, LABELS, final(teacher, plan, selector), Companions(selector))(plan, 1) > 0
