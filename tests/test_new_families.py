"""What a new family finds beyond its own file: its saved weights are read again, and methods take its branches for what they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import REGISTERS, Toy, make_toy

from export.bench.plans import benchmark_plans
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, save_teacher, teacher_digest
from tc_lightning.models.dit import DiTConfig
from tc_lightning.models.families import FAMILIES, Family
from tc_lightning.plan.guidance import Guidance
from tc_lightning.policies.base import PlanningContext, Policy
from tc_lightning.policies.tokencache_v1 import TokenCacheV1Policy
from tc_lightning.policies.tokencache_v2 import TokenCacheV2Policy
from tc_lightning.policies.tprr import TPRRPolicy
from tc_lightning.rollout.sampling import model_signature

TOY, NAMES, GUIDANCE = make_toy(), ("look", "widen", "shade"), Guidance(1.5, 3)
SIGNATURE, TOKENS = model_signature(TOY), 16 + REGISTERS
POLICIES = (TPRRPolicy(1.5, kinds=("partial",)), TokenCacheV1Policy(target_speedup=1.5), TokenCacheV2Policy(target_speedup=1.5))


@pytest.mark.parametrize("policy", POLICIES)
def test_methods_that_choose_tokens_recompute_all_its_branches(policy: Policy) -> None:
    table = make_sampler(TOY.schedule, "ddim", 10)
    rng = np.random.default_rng(0)
    importance, sensitivity = rng.random((10, 3, TOKENS - REGISTERS)), rng.random((10, 3, 3))
    importance[0], sensitivity[0] = 1, 0
    scores = Scores(importance, sensitivity, SIGNATURE.teacher, sampler_digest(table))
    context = PlanningContext(SIGNATURE, TOY.schedule, table, GUIDANCE, scores, table, lambda plan, images: 0.5)
    chosen = [segment for step in policy.plan(context).plan.steps for segment in step if segment.mode == "partial"]
    assert {segment.branches for segment in chosen} == {NAMES}
    assert {segment.tokens[:REGISTERS] for segment in chosen} == {(0, 1, 2)}  # a plan without them would be refused
    assert max(segment.tokens[-1] for segment in chosen) >= 16  # tokens of the image are counted after those


def test_the_benchmark_recomputes_all_its_branches() -> None:
    plan = benchmark_plans(SIGNATURE, make_sampler(TOY.schedule, "ddim", 10), 6)["quarter of the tokens"]
    assert {segment.branches for step in plan.steps for segment in step if segment.mode == "partial"} == {NAMES}


@dataclasses.dataclass(frozen=True)
class OwnShape:
    """A shape that is no DiT's: fields without defaults, one that DiT has not, and no `output`."""

    width: int
    heads: int
    gain: float = 1.5


class OwnlyShaped(Toy):
    """A toy that is made from a shape of its own."""

    family = "own"

    def __init__(self, shape: OwnShape) -> None:
        super().__init__(DiTConfig(8, 2, 3, hidden_size=shape.width, depth=1, num_heads=shape.heads, learn_sigma=False))
        self.config, self.gain = shape, shape.gain


def test_a_saved_teacher_of_any_family_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", Family(Toy, DiTConfig))
    monkeypatch.setitem(FAMILIES, "own", Family(OwnlyShaped, OwnShape))
    for network in (make_toy(), OwnlyShaped(OwnShape(16, 2, 0.5))):
        save_teacher(network, path := tmp_path / f"{network.family}.safetensors")
        for family in (None, network.family):
            found = load_teacher(TeacherSpec(str(path), family=family))
            assert type(found) is type(network)
            assert found.config == network.config
            assert teacher_digest(found) == teacher_digest(network)
            assert not any(parameter.requires_grad for parameter in found.parameters())
        with pytest.raises(TokenCacheError, match=f"holds a {network.family}, and `family` is dit"):
            load_teacher(TeacherSpec(str(path), family="dit"))
        with pytest.raises(TokenCacheError, match=r"contradicts the configuration .*depth is .* there and 12 here"):
            load_teacher(TeacherSpec(str(path), preset="DiT-S/2"))


def test_a_file_that_does_not_fit_its_family_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.safetensors"
    save_teacher(OwnlyShaped(OwnShape(16, 2)), path)
    with pytest.raises(TokenCacheError, match="family = 'own', which this version does not understand"):
        load_teacher(TeacherSpec(str(path)))
    for shape, said in (
        (dataclasses.make_dataclass("Narrower", [("width", "int"), ("heads", "int")]), "has gain = 1.5"),
        (
            dataclasses.make_dataclass("Wider", [(n, "int") for n in ("width", "heads", "more")] + [("gain", "float")]),
            "no shape of a own",
        ),
        (dataclasses.make_dataclass("Worded", [("width", "str"), ("heads", "int"), ("gain", "float")]), "has width = 16"),
    ):
        monkeypatch.setitem(FAMILIES, "own", Family(OwnlyShaped, shape))
        with pytest.raises(TokenCacheError, match=said):
            load_teacher(TeacherSpec(str(path)))

    class Grown(OwnlyShaped):
        def __init__(self, shape: OwnShape) -> None:
            super().__init__(shape)
            self.more = torch.nn.Linear(1, 1)

    monkeypatch.setitem(FAMILIES, "own", Family(Grown, OwnShape))
    with pytest.raises(TokenCacheError, match=r"does not fit a own of its shape: missing more\.weight \(1, 1\)"):
        load_teacher(TeacherSpec(str(path)))
