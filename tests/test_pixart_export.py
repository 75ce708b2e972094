"""PixArt through plans, caching and export: what depends on the text alone is in no step's graph, and artefacts agree with torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Steps, make_plan
from exporting import graphs_of, planned, worst_error

from export.compiler.compile import export_artefact
from export.runtime.manifest import read_manifest
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.models.conditions import Given
from tc_lightning.models.pixart import PixArt, PixArtConfig
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute, partial, reuse, skip
from tc_lightning.policies.tprr import tprr_plan
from tc_lightning.rollout.sampling import full_plan, given_for, model_signature, noise_for, sample

CONFIG = PixArtConfig(8, 2, 4, 8, 24, depth=4, num_heads=3, text_tokens=5, text_width=6, sized=True)
NAMES, FULL, GUIDANCE, EVERYTHING = ("attn", "cross", "mlp"), (compute(0, 4),), Guidance(1.5, 4), tuple(range(16))
STEPS: Steps = (
    FULL,
    FULL,
    (reuse(0, 1, ("cross",), 1), skip(1, 3, 1), partial(3, 4, (0, 3, 7), 0, ("cross", "mlp"))),
    (partial(0, 2, (1, 5, 6, 9, 15), 1, NAMES), compute(2, 3), reuse(3, 4, ("attn", "mlp"))),
    (partial(0, 2, (0, 2, 3, 13, 14), 1, NAMES), compute(2, 3), reuse(3, 4, ("attn", "mlp"))),
    (skip(0, 4, 1),),
)


def make_pixart(config: PixArtConfig = CONFIG) -> PixArt:
    """A frozen one whose branches matter, with texts of several lengths for images that nobody gave any."""
    model, generator = PixArt(config).eval().requires_grad_(False), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            parameter.normal_(0.0, 0.2, generator=generator)
    rng, lengths = np.random.default_rng(0), np.array([5, 3, 1, 4])
    texts = {
        "text": rng.normal(size=(4, config.text_tokens, config.text_width)).astype(np.float32),
        "text_mask": (np.arange(config.text_tokens) < lengths[:, None]).astype(np.int64),
    }
    sizes = {"resolution": np.float32([[512, 768]] * 4), "aspect_ratio": np.float32([[0.7]] * 4)}
    model.examples = texts | (sizes if config.sized else {})
    null_mask = np.array([[1, 1, *[0] * (config.text_tokens - 2)]])
    model.nulls = {"text": rng.normal(size=(1, *texts["text"].shape[1:])).astype(np.float32), "text_mask": null_mask}
    return model


PIXART = make_pixart()
SIGNATURE = model_signature(PIXART)


def tprr() -> CachePlan:
    """Two-Phase Round-Robin whose P-steps recompute other tokens at each step."""
    table = make_sampler(PIXART.schedule, "dpmpp_2m", 7)

    def pruned(i: int) -> tuple[Any, ...]:
        return skip(0, 1, 1), partial(1, 4, (i, i + 3, i + 8), 1, NAMES)

    return tprr_plan(SIGNATURE, table, GUIDANCE, table, boundary=4, k1=3, k2=2, pruned_step=pruned)


PLANS: dict[str, Callable[[], CachePlan]] = {
    "by hand": lambda: make_plan(SIGNATURE, STEPS, GUIDANCE),
    "halves": lambda: make_plan(SIGNATURE, STEPS, GUIDANCE, "dpmpp_2m", modes="bb1bb1"),
    "tprr": tprr,
    "planned": lambda: planned(PIXART, GUIDANCE),
}


def torch_latents(plan: CachePlan, given: Given) -> np.ndarray:
    return sample(PIXART, plan, noise_for(5, range(given.images), PIXART), given).numpy()


@pytest.fixture(scope="module", params=PLANS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[CachePlan, Path]:
    plan, out = PLANS[request.param](), tmp_path_factory.mktemp("pixart") / "artefact"
    export_artefact(PIXART, plan, out, "fp32", "cpu", 2, lambda _: None)
    return plan, out


def test_artefacts_agree_with_torch_over_whole_trajectories(exported: tuple[CachePlan, Path]) -> None:
    plan, folder = exported
    sampler, given = CachedSampler(folder), given_for(3, range(4), PIXART)
    result = sampler.sample(seed=5, conditions={name: value.numpy() for name, value in given.items()})
    wanted = torch_latents(plan, given)
    assert worst_error(result.latents, wanted) < 1e-4
    assert plan.caches
    assert worst_error(torch_latents(full_plan(SIGNATURE, plan.sampler, GUIDANCE), given), wanted) > 1e-3  # caching is felt here
    assert sampler.manifest["modulations"] == 6 + 2  # for all blocks together, and the readout
    assert result.receipt["constant_bytes"] == 5 * 4 * (5 + 4 * 2 * 5 * 24)  # of four texts and the null one
    kv = {f"constant.{b}.text_{name}": [5, 24] for b in range(4) for name in "kv"}
    assert sampler.manifest["constants"] == kv | {"constant.0.text_bias": [1, 1, 5]}


def test_no_step_computes_what_depends_on_the_text_alone(exported: tuple[CachePlan, Path]) -> None:
    plan, folder = exported
    programs, graphs = {p.name: p for p in lower(plan, "cpu").programs}, graphs_of(folder)
    hoisted = ("y_embedder", "t_embedder", "t_block", "csize_embedder", "ar_embedder")
    for name, model in graphs.items():
        held, ops = [tensor.name for tensor in model.graph.initializer], Counter(node.op_type for node in model.graph.node)
        outside = [weight for weight in held if weight.startswith(hoisted) or ".kv_linear." in weight]
        assert bool(outside) == (name == "condition")
        if name == "condition":
            assert ops["FusedMatMul"] == 2 * 4 + 2 + 2 + 1 + 2 + 2  # keys and values; text, time, one vector, two sizes
            continue
        counts = Counter(b for s in programs[name].segments for b in NAMES for _ in s.blocks if computes(s, b))
        assert ops["FusedMatMul"] == 4 * counts["attn"] + 2 * counts["cross"] + 2 * counts["mlp"] + 2
        attentions = Counter(len(node.input) for node in model.graph.node if node.op_type == "Attention")
        assert attentions == Counter({3: counts["attn"], 4: counts["cross"]})  # those to the text have a mask
        assert read_manifest(folder)["programs"][name]["inputs"] == [value.name for value in model.graph.input]


def computes(segment: Any, branch: str) -> bool:
    return segment.mode != "skip" and segment.computes(branch)


def test_a_partial_step_that_keeps_all_tokens_is_full_compute() -> None:
    given = given_for(3, range(2), PIXART)
    kept = make_plan(SIGNATURE, (FULL, *((partial(0, 4, EVERYTHING, 0, NAMES),),) * 2), GUIDANCE)
    whole = full_plan(SIGNATURE, kept.sampler, GUIDANCE)
    np.testing.assert_allclose(torch_latents(kept, given), torch_latents(whole, given), rtol=1e-5, atol=1e-5)


def test_half_precision_and_a_network_whose_terms_depend_on_time_alone(tmp_path: Path) -> None:
    model = make_pixart(PixArtConfig(8, 2, 4, 4, 24, depth=2, num_heads=3, text_tokens=5, text_width=24, project_text=False))
    plan = make_plan(model_signature(model), ((compute(0, 2),), (partial(0, 2, (1, 5), 0, NAMES),)), GUIDANCE)
    manifest = export_artefact(model, plan, tmp_path / "half", "fp16", "cpu", 2, lambda _: None)
    assert manifest["parity"]["trajectory_rel_l2"] < 3e-2
