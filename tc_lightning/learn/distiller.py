"""Distilling a cache plan: trains predictors against a frozen teacher, then measures, plans and writes the results.

    lightning fit -c lightning_configs/digits.yaml

What is trained, and by which loss, are objectives (`tc_lightning.learn.objectives`): the predictor of tokens on recorded pairs of
neighbouring steps, a router on the same pairs or on its own rollouts, or both at once; a corrector of forecasts on whole trajectories.
This module is what they share: teacher, optimiser, checkpoints, and the planning at the end.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import RunError, TeacherError
from tc_lightning.learn.objectives.base import Batch, Objective, Task
from tc_lightning.learn.objectives.content import ContentSuperposition
from tc_lightning.learn.objectives.corrector import ForecastCorrection
from tc_lightning.learn.objectives.routers import RouterObjective
from tc_lightning.learn.objectives.superposition import PairBatch, TokenSuperposition
from tc_lightning.learn.planning import Distilled, PlanningJob
from tc_lightning.measure.cache_cases import REPEATED, CacheCases
from tc_lightning.measure.scores import sampler_digest
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher, teacher_digest
from tc_lightning.models.companions import NO_COMPANIONS, Companions
from tc_lightning.models.conditions import require_null
from tc_lightning.models.network import Network
from tc_lightning.plan.forecasts import KV_ORDER
from tc_lightning.plan.guidance import Guidance
from tc_lightning.policies.base import Policy
from tc_lightning.policies.tprr import TPRRPolicy
from tc_lightning.rollout.sampling import model_signature
from tc_lightning.runs.folder import FIT, PURPOSES

SHOWN = ("loss", "distil_mse", "mean_w", "router_error", "router_mean_w", "corrector_left")  # beside the progress bar


class TokenCacheDistiller(LightningModule):
    """Trains predictors; at the end of `fit` the run's folder holds scores, figures, candidates and `plan.json`.

    Args:
        teacher: which teacher to load; it stays frozen, out of the optimiser and out of the checkpoint.
        sampler: ddim, dpmpp_2m or dpmpp_3m (trajectories are recorded, which takes a sampler that adds no noise).
        num_steps: sampling steps.
        spacing: how its times are chosen: one that the teacher's schedule has, for example uniform, logsnr or mix:0.5.
        guidance_scale: classifier-free guidance; 1 switches it off.
        guidance_channels: guided latent channels, the first ones; None for all (the original DiT release guides 3 of 4).
        policy: what turns scores into a plan; None for Two-Phase Round-Robin.
        train_tokens: train the Cache Predictor (`TokenSuperposition`, whose arguments the next four and `predictor_hidden_size` are).
        content: how to train version 2's predictor, which looks at the image, in its place; None for the Cache Predictor.
        router: how to train a router of branches, which Learning-to-Cache and HarmoniCa plan with; None for no router.
        corrector: how to train a corrector of forecasts, which plans may name; None for none.
        predictor_hidden_size: width of the Cache Predictor.
        lr: peak learning rate of Adam, annealed to a tenth by a cosine.
        target_share: mean of w over steps, blocks and tokens that training holds.
        budget_rate: step of the multiplier's dual ascent, for each optimiser step.
        budget_penalty: weight of the squared distance from `target_share`.
        orders: forecast orders of the caches for which tokens and sensitivities are scored, 0 to 2; 0 repeats.
        gaps: steps between the full steps from which these caches are forecast.
        kv_order: forecast order of their keys and values. With orders (0,), gaps (1,) and kv_order 0 the step before is repeated, as
            the papers have it.
        sensitivity_samples: trajectories over which sensitivities are averaged.
        sensitivity_probes: random probes for each step of these.
        purpose: what the run says that it is for: `fit`, or `ablation`, which later commands do not take for the user's newest run.

    Raises:
        TeacherError: if the teacher cannot be loaded, or has no null value of a condition and guidance is asked for.
        TokenCacheError: if the sampler, its spacing, or a number is out of range.
    """

    def __init__(
        self,
        teacher: TeacherSpec,
        sampler: str = "ddim",
        num_steps: int = 50,
        spacing: str = "uniform",
        guidance_scale: float = 1.5,
        guidance_channels: int | None = None,
        policy: Policy | None = None,
        train_tokens: bool = True,
        router: RouterObjective | None = None,
        content: ContentSuperposition | None = None,
        corrector: ForecastCorrection | None = None,
        predictor_hidden_size: int = 64,
        lr: float = 1e-2,
        target_share: float = 0.5,
        budget_rate: float = 0.1,
        budget_penalty: float = 10.0,
        orders: tuple[int, ...] = (0, 1, 2),
        gaps: tuple[int, ...] = (2, 3, 4),
        kv_order: int = KV_ORDER,
        sensitivity_samples: int = 16,
        sensitivity_probes: int = 4,
        purpose: str = FIT,
    ) -> None:
        super().__init__()
        if purpose not in PURPOSES:
            raise RunError(f"purpose is {purpose!r}: choose one of {', '.join(PURPOSES)}.")
        if num_steps < 2:
            raise RunError(f"num_steps is {num_steps}: with fewer than 2 there is nothing to reuse.")
        if min(sensitivity_samples, sensitivity_probes) < 1:
            raise RunError("sensitivity_samples and sensitivity_probes must be at least 1.")
        if not (lr > 0.0 and math.isfinite(lr)):
            raise RunError(f"lr is {lr:g}; it must be above 0.")
        tokens: Objective | None = content
        if train_tokens and content is None:
            tokens = TokenSuperposition(target_share, budget_rate, budget_penalty, predictor_hidden_size)
        _check_objectives(tokens, router, corrector)
        self.teacher: Network
        object.__setattr__(self, "teacher", load_teacher(teacher, rank_zero_only(print)))  # past nn.Module: not a submodule
        c = self.teacher.config
        self.teacher_spec, self.teacher_digest = teacher, teacher_digest(self.teacher)
        self.signature = model_signature(self.teacher, self.teacher_digest)
        self.sampler = make_sampler(self.teacher.schedule, sampler, num_steps, spacing)
        self.guidance = Guidance(guidance_scale, c.in_channels if guidance_channels is None else guidance_channels)
        _check_guidance(self.guidance, c.in_channels)
        require_null(self.teacher.conditions, self.guidance, self.teacher.nulls)
        self.policy = policy or TPRRPolicy()
        self.lr = lr
        self.sensitivity_samples, self.sensitivity_probes = sensitivity_samples, sensitivity_probes
        self.purpose = purpose
        self.task = Task(self.teacher, self.signature, self.sampler, self.guidance, CacheCases(orders, gaps, kv_order))
        self.reach = self.task.cases.reach
        self.tokens, self.router, self.corrector = tokens, router, corrector
        for objective in self.objectives:  # the tokens' first: whether there is a router does not change where they start
            objective.prepare(self.task)

    @property
    def objectives(self) -> list[Objective]:
        """What is trained."""
        return [objective for objective in (self.tokens, self.router, self.corrector) if objective is not None]

    def companions(self) -> Companions:
        """The networks that plans may name, of those that are trained."""
        return functools.reduce(Companions.joined, (objective.companions() for objective in self.objectives), NO_COMPANIONS)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Sum of the objectives' losses; they share no parameters."""
        shared = Batch(self.task, batch)
        losses = [objective.loss(shared, batch_idx) for objective in self.objectives]
        total = torch.stack([loss.total for loss in losses]).sum()
        self._log_training({"loss": total.detach()} | {name: value for loss in losses for name, value in loss.logs.items()})
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Tell the objectives."""
        for objective in self.objectives:
            objective.before_step()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each objective's gradients for themselves, so that one does not slow down the other."""
        for objective in self.objectives if gradient_clip_val else []:
            if gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(objective.parameters(), gradient_clip_val or 0.0)
            else:
                torch.nn.utils.clip_grad_norm_(objective.parameters(), gradient_clip_val or 0.0)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Errors of what was learned, taken as a plan would take it."""
        self._log_measures(batch, "val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """As in validation."""
        self._log_measures(batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over the predictors alone, with a cosine to a tenth of the rate."""
        optimiser = torch.optim.Adam(self.parameters(), self.lr)
        total = float(self.trainer.estimated_stepping_batches)  # infinite if nothing ends the run

        def factor(step: int) -> float:
            return 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / max(1.0, total)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Move the teacher, which Lightning does not know of.

        Raises:
            RunError: if the data cannot tell what planning will need at the end, or the policy needs what is not trained.
            PlanError: if the policy could not reach its target, whatever the scores.
        """
        known = {objective.learns for objective in self.objectives} | ({"corrector"} if self.corrector is not None else set())
        if missing := [name for name in self.policy.needs if name not in known]:
            setting = {"router_TL2": "router", "corrector": "corrector"}.get(missing[0], "train_tokens")
            raise RunError(f"{type(self.policy).__name__} needs {missing[0]}, which nothing trains: set `model.init_args.{setting}`.")
        self.policy.check(self.signature, self.sampler)
        wanted = ("heldout", "train_endpoints", *(["train_latents"] if isinstance(self.tokens, ContentSuperposition) else []))
        missing = [n for n in wanted if not hasattr(self.trainer.datamodule, n)]  # type: ignore[attr-defined]
        if missing and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise RunError(
                f"planning needs trajectories: use data.trajectory_module.TrajectoryDataModule, or one that has {', '.join(missing)}."
            )
        self.teacher.to(self.device)
        for objective in self.objectives:
            objective.start(self.device)

    def on_validation_start(self) -> None:
        """See `on_fit_start`."""
        self.teacher.to(self.device)

    def on_test_start(self) -> None:
        """See `on_fit_start`."""
        self.teacher.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name what the predictors were trained for. Those of tokens keep the names that they had when there were no others."""
        checkpoint["teacher_digest"], checkpoint["sampler_digest"] = self.teacher_digest, sampler_digest(self.sampler)
        checkpoint["cases"] = self.task.cases.in_words
        checkpoint["state_dict"] = {name.removeprefix("tokens."): v for name, v in checkpoint.get("state_dict", {}).items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a predictor that was trained for something else.

        Raises:
            TeacherError: if the teacher is another one.
            RunError: if the sampler is, or the cache.
        """
        if (theirs := checkpoint.get("teacher_digest")) != self.teacher_digest:
            raise TeacherError(
                f"the checkpoint was trained against the teacher {theirs}, and the configured one is {self.teacher_digest}. "
                "Set `model.teacher` to the former, or start a new run without `--ckpt_path`."
            )
        if (theirs := checkpoint.get("sampler_digest")) != (ours := sampler_digest(self.sampler)):
            raise RunError(
                f"the checkpoint was trained for the sampler {theirs}, and the configured one is {ours}. "
                "Restore sampler, num_steps and spacing, or start a new run without `--ckpt_path`."
            )
        if (theirs := checkpoint.get("cases", REPEATED.in_words)) != (ours := self.task.cases.in_words):
            raise RunError(
                f"the checkpoint was trained for a cache that {theirs}, and the configured one {ours}. "
                "Restore orders, gaps and kv_order, or start a new run without `--ckpt_path`."
            )
        state = {_state_name(name): value for name, value in checkpoint["state_dict"].items()}
        if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in self.state_dict().items()}:
            raise RunError(
                "the checkpoint holds predictors of another size, or others: restore predictor_hidden_size, train_tokens and router, "
                "or start a new run."
            )
        checkpoint["state_dict"] = state

    def on_fit_end(self) -> None:
        """Measure sensitivities on all ranks, then plan and write on rank 0.

        Lightning calls this after the last checkpoint and the last collective of its own, and also when a run that had already
        finished is resumed: a plan lost to an interruption is made by the same command with `--ckpt_path last`.
        """
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            PlanningJob(self._distilled(), self.trainer).run()

    def _distilled(self) -> Distilled:
        samples, probes = self.sensitivity_samples, self.sensitivity_probes
        return Distilled(self.task, self.teacher_spec, self.objectives, self.companions(), self.policy, samples, probes, self.purpose)

    def _log_training(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=name in SHOWN)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]

    def _log_measures(self, batch: PairBatch, stage: str) -> None:
        shared, size = Batch(self.task, batch), len(batch["index"])
        for objective in self.objectives:
            for name, value in objective.measure(shared).items():
                self.log(f"{stage}/{name}", value, prog_bar=name in SHOWN, sync_dist=True, batch_size=size)


def _state_name(name: str) -> str:
    """Name in a module's state of one in a checkpoint."""
    return name if name.startswith(("tokens.", "router.", "corrector.")) else f"tokens.{name}"


def _check_objectives(tokens: Objective | None, *others: Objective | None) -> None:
    """Refuse what no batch could train.

    Raises:
        RunError: naming the settings.
    """
    named = [other for other in others if other is not None]
    if tokens is None and not named:
        raise RunError("nothing is trained: set train_tokens to true, or name a router or a corrector.")
    for other in named:
        if tokens is not None and other.batches != tokens.batches:
            raise RunError(f"{type(other).__name__} trains on {other.batches}, tokens on {tokens.batches}: set train_tokens to false.")
        if other.batches != named[0].batches:
            found = " and ".join(f"{type(one).__name__} on {one.batches}" for one in named)
            raise RunError(f"{found} cannot be trained together: train each in a run of its own.")


def _check_guidance(guidance: Guidance, in_channels: int) -> None:
    """Refuse what no plan could hold, before hours of training.

    Raises:
        RunError: naming the setting.
    """
    if not math.isfinite(guidance.scale):
        raise RunError(f"guidance_scale is {guidance.scale}; it must be a finite number (1 switches guidance off).")
    least = 1 if guidance.doubles_batch else 0
    if not least <= guidance.channels <= in_channels:
        raise RunError(f"guidance_channels is {guidance.channels}; the teacher has {in_channels}: choose {least} to {in_channels}.")
