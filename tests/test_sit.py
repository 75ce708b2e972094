"""SiT: DiT's weights under DiT's names, another schedule, and an output whose second half is dropped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, EVERY_MODE, make_teacher
from safetensors.torch import save_file

from export.compiler.compile import export_artefact
from export.runtime.manifest import read_manifest
from export.runtime.sampler import CachedSampler
from export.verify import verify
from tc_lightning.diffusion.flow import Flow
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, save_teacher, teacher_digest
from tc_lightning.models.checkpoints.digest import digest, plain
from tc_lightning.models.dit import DiT
from tc_lightning.models.families import family_of
from tc_lightning.models.sit import SiT
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import compute
from tc_lightning.rollout.sampling import full_plan, model_signature, noise_for, sample, sample_steps
from tc_lightning.runs.folder import _teacher

GUIDANCE = Guidance(1.5, 3)


def sit_of(dit: DiT) -> SiT:
    """A SiT of the same weights."""
    sit = SiT(dit.config)
    sit.load_state_dict(dit.state_dict())
    return sit.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sit(teacher: DiT) -> SiT:
    return sit_of(teacher)


@pytest.fixture(scope="module")
def file(sit: SiT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teachers") / "sit.safetensors"
    save_teacher(sit, path)
    return path


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 0.3, 0.98]), torch.tensor([0, 4, 5])


def every_mode(sit: SiT) -> CachePlan:
    """A plan that uses every mode, on the network's own schedule."""
    table = make_sampler(sit.schedule, "dpmpp_2m", len(EVERY_MODE))
    return CachePlan(model_signature(sit), table, GUIDANCE, EVERY_MODE, make_sampler(sit.schedule, "euler", len(EVERY_MODE)))


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_the_forward_is_dits_but_for_the_second_half(learn_sigma: bool) -> None:
    dit = make_teacher(learn_sigma=learn_sigma)
    x, t, y = batch()
    velocity = sit_of(dit)(x, t, y)
    assert torch.equal(velocity, dit(x, t, y)[:, :4])
    assert velocity.shape == x.shape
    assert torch.equal(velocity, sit_of(dit).eps(x, t, y))


def test_it_says_what_it_is(sit: SiT, teacher: DiT) -> None:
    assert sit.schedule == Flow(0.0, 1.0)
    assert set(sit.state_dict()) == set(teacher.state_dict())
    assert dataclasses.replace(model_signature(sit), family="dit", teacher="") == dataclasses.replace(
        model_signature(teacher), teacher=""
    )
    assert model_signature(sit).family == "sit"
    assert teacher_digest(sit) != teacher_digest(teacher)  # the same weights mean something else


def test_a_step_of_euler_is_x_plus_the_velocity(sit: SiT) -> None:
    plan = full_plan(model_signature(sit), make_sampler(sit.schedule, "euler", 4), Guidance())
    labels = torch.tensor([1, 2])
    for i, state in enumerate(sample_steps(sit, plan, noise_for(0, range(2), sit), labels)):
        velocity = sit(state.x, torch.full((2,), i / 4), labels)
        torch.testing.assert_close(state.x_next, state.x + velocity / 4, atol=1e-6, rtol=0)


def test_its_own_file_tells_the_family(file: Path, sit: SiT) -> None:
    loaded = load_teacher(TeacherSpec(str(file)))
    assert type(loaded) is SiT
    assert teacher_digest(loaded) == teacher_digest(sit)
    assert type(load_teacher(TeacherSpec(str(file), family="sit"))) is SiT
    with pytest.raises(TeacherError, match="holds a sit, and `family` is dit"):
        load_teacher(TeacherSpec(str(file), family="dit"))
    with pytest.raises(TeacherError, match="unknown family 'uvit': choose one of dit, sit"):
        load_teacher(TeacherSpec(str(file), family="uvit"))


@pytest.mark.parametrize("family", ["uvit", ["sit"], None])
def test_a_file_of_a_family_that_nobody_knows_is_refused(family: object, tmp_path: Path, sit: SiT) -> None:
    told, state = (
        json.dumps(dataclasses.asdict(CONFIG) | {"family": family}),
        {name: plain(value) for name, value in sit.state_dict().items()},
    )
    save_file(state, tmp_path / "odd.safetensors", {"dit_config": told, "sha256": digest(told, state)})
    with pytest.raises(TeacherError, match=r"family = .* which this version does not understand"):
        load_teacher(TeacherSpec(str(tmp_path / "odd.safetensors")))


def test_a_release_is_what_the_configuration_says(tmp_path: Path, sit: SiT) -> None:
    path = tmp_path / "SiT-tiny.pt"
    torch.save(sit.state_dict(), path)
    x, t, y = batch()
    loaded = load_teacher(TeacherSpec(str(path), dit=CONFIG, family="sit"))
    assert torch.equal(loaded(x, t, y), sit(x, t, y))
    assert type(load_teacher(TeacherSpec(str(path), dit=CONFIG))) is DiT


def test_a_dits_file_stays_as_it_was(tmp_path: Path, teacher: DiT) -> None:
    save_teacher(teacher, tmp_path / "dit.safetensors")
    assert b'"family"' not in (tmp_path / "dit.safetensors").read_bytes().partition(b"__metadata__")[2][:2000]
    with pytest.raises(TeacherError, match="holds a dit, and `family` is sit"):
        load_teacher(TeacherSpec(str(tmp_path / "dit.safetensors"), family="sit"))


def test_runs_keep_the_family() -> None:
    spec = TeacherSpec("/teachers/SiT-XL-2-256x256.pt", "DiT-XL/2", family="sit")
    assert _teacher(dataclasses.asdict(spec)) == spec
    old = {name: value for name, value in dataclasses.asdict(spec).items() if name != "family"}
    assert _teacher(old).family is None


def test_keep_everything_is_full_compute(sit: SiT) -> None:
    table = make_sampler(sit.schedule, "unipc", 4)
    noise, labels = noise_for(0, range(2), sit), torch.tensor([0, 4])
    full = full_plan(model_signature(sit), table, GUIDANCE)
    kept = dataclasses.replace(full, steps=((compute(0, 2), compute(2, 4)),) * 4)
    assert torch.equal(sample(sit, kept, noise, labels), sample(sit, full, noise, labels))


def test_an_artefact_is_exported_run_and_verified(sit: SiT, tmp_path: Path) -> None:
    plan = every_mode(sit)
    export_artefact(sit, plan, tmp_path / "sit", "fp32", "cpu", images=2, report=lambda _: None)
    assert read_manifest(tmp_path / "sit")["model"]["family"] == "sit"
    got = torch.from_numpy(CachedSampler(tmp_path / "sit", "cpu").sample([1, 4], seed=3).latents)
    ours = sample(sit, plan, noise_for(3, range(2), sit), torch.tensor([1, 4]))
    assert (got - ours).norm() < 1e-4 * ours.norm()
    report = verify(tmp_path / "sit", "cpu", 2, 2, seed=1, quiet=True)
    assert report["rel_l2_export"] < 1e-4
    assert any(name.startswith("euler, ") for name in report["baselines_psnr_db"])


def test_families_are_listed() -> None:
    assert family_of("sit").network is SiT
    assert family_of("dit").network is DiT
