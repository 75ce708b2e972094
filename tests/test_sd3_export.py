"""Stable Diffusion 3 under plans: steps of some tokens of two streams, what steps cost, and artefacts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import Steps, guidance_mode
from exporting import planned
from onnx import GraphProto
from sd3_models import SD35, SMALL, asked, diffusers_sd3, make_sd3, of_diffusers

from export.compiler.compile import export_artefact
from export.compiler.parity import relative_l2
from export.runtime.manifest import read_manifest
from export.runtime.sampler import CachedSampler
from tc_lightning.cache.soft_network import full_eps, mixed_branches_eps, mixed_eps
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import PlanError
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.measure.sensitivity import branch_sensitivity, probes_for
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.models.conditions import Given
from tc_lightning.models.sd3 import SD3
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import block_macs, cache_bytes_per_image, entry_shape, full_step_macs, segment_macs
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, partial, reuse, skip
from tc_lightning.policies.base import PlanningContext
from tc_lightning.policies.tprr import TPRRPolicy
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample

TEXT, IMAGE, WIDTH = 5, 16, 32
MODEL, GUIDANCE, GIVEN = make_sd3(), Guidance(3.0, 4), asked(SMALL)
SIGNATURE = model_signature(MODEL)
FULL = (compute(0, 4),)
MODEL_WITH_EXAMPLES = make_sd3()
MODEL_WITH_EXAMPLES.examples = {name: value.numpy() for name, value in asked(SMALL, 4, seed=1).items()}
EVERY_MODE: Steps = (
    FULL,
    FULL,
    (reuse(0, 2, ("attn",), 1), skip(2, 3, 1), reuse(3, 4, ("mlp",), 1)),
    (partial(0, 2, SIGNATURE.kept((0, 3, 7, 15)), 1), compute(2, 4)),
    (partial(0, 2, SIGNATURE.kept((1, 3, 9)), 1), partial(2, 4, SIGNATURE.kept((2, 8)), 1)),
    (partial(0, 4, SIGNATURE.kept((2, 4)), 0, ("mlp",)),),
    (compute(0, 1), skip(1, 4, 2)),
    FULL,
)


def by_hand(steps: Steps, modes: str = "", sampler: str = "euler") -> CachePlan:
    table = make_sampler(MODEL.schedule, sampler, len(steps), "sd3:3")
    return CachePlan(SIGNATURE, table, GUIDANCE, steps, table, {}, (), tuple(map(guidance_mode, modes)))


def latents(plan: CachePlan) -> torch.Tensor:
    return sample(MODEL, plan, noise_for(5, range(2), MODEL), GIVEN)


def tprr_plan() -> CachePlan:
    """Made from scores, as planning makes it."""
    table, rng = make_sampler(MODEL.schedule, "euler", 10, "sd3:3"), np.random.default_rng(0)
    importance, sensitivity = rng.random((10, 4, IMAGE)), rng.random((10, 4, 2))
    importance[0], sensitivity[0] = 1, 0
    scores = Scores(importance, sensitivity, SIGNATURE.teacher, sampler_digest(table))
    context = PlanningContext(SIGNATURE, MODEL.schedule, table, GUIDANCE, scores, table, lambda plan, images: 0.5)
    return TPRRPolicy(1.5, kinds=("partial",)).plan(context).plan


# Against diffusers


def test_a_run_is_that_of_diffusers_pipeline(tmp_path: Path) -> None:
    """Its loop over scheduler and network, guided, from the same latents."""
    import diffusers

    theirs = diffusers_sd3(SD35 | {"sample_size": 8})
    theirs.save_pretrained(tmp_path)
    ours = load_teacher(TeacherSpec(str(tmp_path), text_tokens=11))
    assert isinstance(ours, SD3)
    given = asked(ours.config)
    one = asked(ours.config, 1, seed=7)
    ours.nulls = {name: value.numpy() for name, value in one.items()}
    nulls = Given({name: value.expand_as(given[name]) for name, value in one.items()})
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    x = noise = noise_for(5, range(2), ours)
    for t in scheduler.timesteps:
        uncond, cond = (of_diffusers(theirs, x, t.expand(2), conditions) for conditions in (nulls, given))
        x = scheduler.step(uncond + 4.0 * (cond - uncond), t, x, return_dict=False)[0]
    table = make_sampler(ours.schedule, "euler", 6, "sd3:3")
    end = sample(ours, full_plan(model_signature(ours), table, Guidance(4.0, 4)), noise, given)
    torch.testing.assert_close(end, x, atol=1e-4, rtol=1e-4)


# Steps


def test_a_partial_step_of_all_tokens_is_a_full_one() -> None:
    kept = (partial(0, 4, tuple(range(TEXT + IMAGE))),)
    some = (partial(0, 3, tuple(range(TEXT + IMAGE))), compute(3, 4))
    full = latents(by_hand((FULL,) * 4))
    torch.testing.assert_close(latents(by_hand((FULL, kept, some, kept))), full, atol=1e-5, rtol=1e-5)
    assert relative_l2(latents(by_hand(EVERY_MODE)).numpy(), latents(by_hand((FULL,) * 8)).numpy()) > 1e-3


def test_a_step_of_some_tokens_computes_the_texts_always() -> None:
    """Text is new in every step, and what its tokens give to those of the image that are recomputed is not of the step before."""
    with pytest.raises(PlanError, match="partial keeps tokens 0 to 4, which are none of the image"):
        by_hand((FULL, (partial(0, 4, (0, 1, 5, 6)),)))
    two = by_hand((FULL, (partial(0, 4, SIGNATURE.kept((0, 1))),)))
    kept = two.steps[1][0].tokens
    assert kept == (0, 1, 2, 3, 4, 5, 6)


def test_costs_of_each_kind_of_block() -> None:
    """Blocks 0 and 1 have a second attention, among the image's tokens; of the last one's text there are keys and values alone."""
    D, S, N = WIDTH, TEXT, IMAGE
    joint, dual = (S + N) * (4 * D**2 + 2 * D * (S + N)), N * (4 * D**2 + 2 * D * N)
    mlp, last = 8 * D**2, N * (4 * D**2 + 2 * D * (S + N)) + S * 2 * D**2
    costs = [joint + dual + (S + N) * mlp] * 2 + [joint + (S + N) * mlp, last + N * mlp]
    assert [segment_macs(SIGNATURE, compute(b, b + 1)) for b in range(4)] == costs
    assert full_step_macs(SIGNATURE) == SIGNATURE.fixed_macs + sum(costs)
    assert segment_macs(SIGNATURE, reuse(0, 4, ("attn",))) == (3 * (S + N) + N) * mlp
    m = 3
    partly = (S + m) * (4 * D**2 + 2 * D * (S + N)) + m * (4 * D**2 + 2 * D * N) + (S + m) * mlp
    assert segment_macs(SIGNATURE, partial(1, 2, SIGNATURE.kept((0, 1, 2)))) == partly
    assert segment_macs(SIGNATURE, partial(3, 4, SIGNATURE.kept(()))) == S * 2 * D**2
    assert block_macs(SIGNATURE, S + N) == costs[2]


def test_costs_are_those_of_the_linear_maps() -> None:
    """The weights of a block, each of which meets each of its stream's tokens once."""
    for b, block in enumerate(MODEL.blocks):
        maps = {name: m.weight.numel() for name, m in block.named_modules() if isinstance(m, torch.nn.Linear) and "adaLN" not in name}
        pairs = 2 * WIDTH * ((TEXT * (b < 3) + IMAGE) * (TEXT + IMAGE) + (b < 2) * IMAGE**2)
        tokens = {name: TEXT if name.startswith("text") else IMAGE for name in maps}
        assert segment_macs(SIGNATURE, compute(b, b + 1)) == sum(maps[name] * tokens[name] for name in maps) + pairs


def test_keys_and_values_of_two_attentions_lie_side_by_side() -> None:
    plan = by_hand((FULL, (compute(0, 1), partial(1, 3, SIGNATURE.kept((0,))), compute(3, 4))))
    shapes = {name: entry_shape(plan, Entry(name, b, b + 1)) for b, name in ((1, "k"), (2, "v"), (1, "attn"))}
    assert shapes == {"k": (21, 64), "v": (21, 32), "attn": (21, 32)}
    assert entry_shape(plan, Entry("span", 1, 3)) == (21, 32)
    assert cache_bytes_per_image(plan) == 2 * 4 * 21 * (32 + 2 * 64 + 2 * 32)  # both halves: the span, keys and values of 1, and of 2


def test_a_plan_tells_which_blocks_are_unlike_the_rest(tmp_path: Path) -> None:
    plan = by_hand(EVERY_MODE)
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan
    told = plan.to_json()["model"]
    assert [(one["blocks"], one["kv_widths"]) for one in told["unlike"]] == [([0, 1], 2), ([3], 1)]
    plain = make_sd3(dataclasses.replace(SMALL, dual_blocks=""))
    assert [one.blocks for one in model_signature(plain).unlike] == [(3,)]


def test_what_training_and_measurements_see() -> None:
    """All of them importances of 1: the network itself. Scores are of the image's tokens, and branches matter in every block."""
    x_prev, x = noise_for(0, range(2), MODEL), noise_for(1, range(2), MODEL)
    t_prev, t = torch.tensor([950.0, 700.0]), torch.tensor([900.0, 600.0])
    eps, _ = full_eps(MODEL, GUIDANCE, x, t, GIVEN)
    _, caches = full_eps(MODEL, GUIDANCE, x_prev, t_prev, GIVEN)
    branches, _ = mixed_branches_eps(MODEL, GUIDANCE, caches.branches, x, t, GIVEN, torch.ones(2, 4, 2))
    torch.testing.assert_close(branches, eps, rtol=1e-5, atol=1e-5)
    tokens = mixed_eps(MODEL, GUIDANCE, caches.blocks, x, t, GIVEN, torch.ones(2, 4, IMAGE))
    torch.testing.assert_close(tokens, eps, rtol=1e-5, atol=1e-5)
    sensitivity = branch_sensitivity(MODEL, GUIDANCE, caches.branches, x, t, GIVEN, probes_for(MODEL, 0, [1, 2], 1))
    assert sensitivity.shape == (2, 4, 2)
    assert (sensitivity > 0).all()


# Artefacts


def require_parity(plan: CachePlan, out: Path) -> None:
    """Export's own proof, and a request's trajectory against torch."""
    manifest = export_artefact(MODEL_WITH_EXAMPLES, plan, out, "fp32", "cpu", 2, lambda _: None)
    assert manifest["parity"]["trajectory_rel_l2"] < 1e-4
    found = CachedSampler(out).sample(seed=5, **{name: value.numpy() for name, value in GIVEN.items()}).latents
    expected = latents(plan).numpy()
    assert max(relative_l2(a, e) for a, e in zip(found, expected, strict=True)) < 1e-4


@pytest.mark.parametrize("modes", ["", "bb1bb1bb"])
def test_artefacts_run_as_torch_does(tmp_path: Path, modes: str) -> None:
    require_parity(by_hand(EVERY_MODE, modes), tmp_path / "sd3")


def test_an_artefact_of_the_planners_own(tmp_path: Path) -> None:
    plan = planned(MODEL_WITH_EXAMPLES, GUIDANCE, "euler", "sd3:3")
    assert plan.caches
    require_parity(plan, tmp_path / "sd3")


def test_an_artefact_of_a_tprr_plan(tmp_path: Path) -> None:
    plan = tprr_plan()
    chosen = [segment for step in plan.steps for segment in step if segment.mode == "partial"]
    assert chosen
    assert all(segment.tokens[:TEXT] == tuple(range(TEXT)) for segment in chosen)
    require_parity(plan, tmp_path / "sd3")


def test_no_step_reads_the_texts_embedder_or_modulates_anew(tmp_path: Path) -> None:
    plan = by_hand(EVERY_MODE)
    export_artefact(MODEL_WITH_EXAMPLES, plan, tmp_path / "sd3", "fp32", "cpu", 2, lambda _: None)
    graphs = {path.stem: onnx.load(str(path), load_external_data=False).graph for path in (tmp_path / "sd3").glob("*.onnx")}
    hoisted = ("text_embedder", "pooled_embedder", "t_embedder")
    for name, graph in graphs.items():
        weights = {tensor.name for tensor in graph.initializer}
        assert any(w.startswith(hoisted) or "adaLN" in w for w in weights) == (name == "condition"), name
    assert read_manifest(tmp_path / "sd3")["constants"] == {"constant.start.text": [TEXT, WIDTH]}
    full = graphs["step_full"]
    # one attention a block and another in two blocks; and norms of queries and keys: the last block's text has no queries
    assert count(full, "Attention") == 4 + 2
    assert count(full, "RMSNormalization") == 3 * 4 + 3 + 2 * 2
    assert count(full, "LayerNormalization") == 2 * 4 + 1


def count(graph: GraphProto, op_type: str) -> int:
    return sum(node.op_type == op_type for node in graph.node)
