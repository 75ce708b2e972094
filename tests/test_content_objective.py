"""Training the content predictor: what the loss says at its ends, what a run holds, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilling import fit, make_data, make_distiller, make_teacher, make_trainer

from tc_lightning.cache.soft_network import enter
from tc_lightning.errors import RunError
from tc_lightning.learn.distiller import TokenCacheDistiller
from tc_lightning.learn.objectives.base import Batch
from tc_lightning.learn.objectives.content import ContentSuperposition
from tc_lightning.measure.scores import Scores
from tc_lightning.models.checkpoints import TeacherSpec
from tc_lightning.models.content_predictor import Selector
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.policies.tokencache_v2 import TokenCacheV2Policy
from tc_lightning.rollout.sampling import model_signature
from tc_lightning.runs.folder import read_run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return make_teacher(tmp_path_factory.mktemp("teacher"), seed=0)


def make_module(teacher: TeacherSpec, uncached: int = 1, **changes: Any) -> tuple[TokenCacheDistiller, ContentSuperposition]:
    objective = ContentSuperposition(uncached_blocks=uncached, **changes)
    return make_distiller(teacher, content=objective), objective


def make_batch(module: TokenCacheDistiller) -> Batch:
    x_prev, x, eps = torch.randn(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = x_prev[:, None].expand(-1, module.reach, -1, -1, -1)
    numbers = {"label": torch.tensor([0, 2]), "step": torch.tensor([1, 4]), "index": torch.tensor([0, 1])}
    return Batch(module.task, {"x_prev": before, "x": x, "eps": eps, **numbers})


@pytest.mark.parametrize("uncached", [0, 1, 2])
def test_errors_at_both_ends(teacher: TeacherSpec, uncached: int) -> None:
    """w = 1 is full compute, w = 0 reuse of all blocks but the last ones; x_L is what the network's readout takes."""
    module, objective = make_module(teacher, uncached)
    batch = make_batch(module)
    ones, zeros = torch.ones(2, 3, 16), torch.zeros(2, 3, 16)
    error_B, reuse_B, size_B = objective._token_errors(batch, ones)
    assert (error_B < 1e-10 * reuse_B).all()
    zeros[:, 3 - uncached :] = 1.0
    torch.testing.assert_close(objective._token_errors(batch, zeros)[0], reuse_B)
    b = batch.content
    z, mods, _ = enter(module.teacher, module.guidance, b["x"], batch.times(batch.step), b["label"])
    x_L, reused = z, z
    caches = batch.caches(module.task.cases).blocks
    for l, (block, mod, cache) in enumerate(zip(module.teacher.blocks, mods, caches, strict=True)):  # noqa: E741
        x_L = block(x_L, mod)
        reused = reused + cache.residual if l < 3 - uncached else block(reused, mod)
    by_hand = (reused - x_L).square().reshape(2, 2, -1).mean((0, 2))  # both halves, tokens and width
    torch.testing.assert_close(reuse_B, by_hand)
    torch.testing.assert_close(size_B, x_L.square().reshape(2, 2, -1).mean((0, 2)))


def test_loss_is_the_papers_up_to_its_unit(teacher: TeacherSpec) -> None:
    for emphasis in (0.0, 0.5, 1.0):
        module, objective = make_module(teacher, cost=0.3, emphasis=emphasis)
        batch = make_batch(module)
        a_BLN = objective._importances(batch)
        assert (a_BLN[:, 2:] == 1).all()
        error_B, reuse_B, size_B = objective._token_errors(batch, a_BLN)
        unit_B = {0.0: reuse_B, 0.5: (reuse_B * size_B).sqrt(), 1.0: size_B}[emphasis]
        expected = (error_B / unit_B).mean() + 0.3 * 0.75  # scores start at 0.75
        torch.testing.assert_close(objective.loss(batch, 0).total, expected)


def test_fit_learns_and_the_run_holds_the_predictor(teacher: TeacherSpec, tmp_path: Path) -> None:
    objective = ContentSuperposition(target_share=0.4, samples=5)
    policy = TokenCacheV2Policy(1.25, full_shares=(0.2,))
    module, rows = fit(teacher, tmp_path, 60, content=objective, policy=policy, lr=5e-3)
    assert abs(rows[-1]["train/mean_w"] - 0.4) < 0.06
    assert {"train/loss", "train/x_L_mse", "train/distil_relative", "val/distil_mse", "val/reuse_mse"} <= set(rows[-1])
    assert 0 < rows[-1]["val/distil_mse"] < rows[-1]["val/reuse_mse"]

    run = read_run(tmp_path / "run")
    assert run.content == tmp_path / "run" / "content.safetensors"
    selector, scores = Selector.load(run.content, module.teacher.config), Scores.load(run.scores)
    assert scores.selector == selector.digest
    plan = CachePlan.load(run.plan)
    assert plan.selector == selector.digest
    assert plan.provenance["arguments"]["scores"] == scores.digest

    latents = module.trainer.datamodule.train_latents(5)
    t_B = torch.full((5,), module.sampler.steps[3].t)
    with torch.no_grad():
        mean_LN = selector.predictor.scores(module.teacher, latents[:, 3], t_B).mean(0)
    assert np.allclose(scores.importance_TLN[3, :2], mean_LN[:2], atol=1e-5)
    assert (scores.importance_TLN[:, 2] == 1).all()
    assert (scores.importance_TLN[0] == 1).all()
    assert mean_LN[:2].std() > 0.01  # it does tell tokens apart


def test_only_the_predictor_is_trained_and_kept(teacher: TeacherSpec, tmp_path: Path) -> None:
    module, _ = fit(teacher, tmp_path, 2, content=ContentSuperposition())
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"predictor", "multiplier"}
    assert model_signature(module.teacher).teacher == module.teacher_digest
    resumed = make_distiller(teacher, content=ContentSuperposition())
    make_trainer(tmp_path / "again", 3).fit(resumed, make_data(teacher), ckpt_path=str(tmp_path / "a.ckpt"))
    assert resumed.trainer.global_step == 3
    with pytest.raises(RunError, match="predictors of another size, or others"):
        make_distiller(teacher).on_load_checkpoint(checkpoint)


def test_arguments_out_of_range(teacher: TeacherSpec) -> None:
    for wrong in ({"target_share": 0.0}, {"emphasis": 1.5}, {"cost": 0.0}, {"samples": 0}, {"uncached_blocks": -1}):
        with pytest.raises(RunError):
            ContentSuperposition(**wrong)
    with pytest.raises(RunError, match="uncached_blocks is 3, and the teacher has 3 blocks"):
        make_module(teacher, 3)
