"""The end of a distillation run: sensitivities, scores, plan, and the files that tell of them.

The run's folder gets scores.safetensors, content.safetensors if the predictor looks at the image, corrector.safetensors if one was
trained, figures/*.png, plan.json, candidates.csv, calibration.safetensors if the policy asked for it, front/ if it looked at several
budgets, and run.json when all others are there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor
from tqdm import tqdm

from tc_lightning.cache.soft_forecast import forecast_caches
from tc_lightning.learn.objectives.base import Objective, Task
from tc_lightning.measure.cache_cases import REPEATED, CacheCases
from tc_lightning.measure.calibrate import run_calibration
from tc_lightning.measure.figures import importance_figure, router_figure, sensitivity_figure
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.measure.sensitivity import branch_sensitivity, probes_for
from tc_lightning.models.checkpoints import TeacherSpec
from tc_lightning.models.companions import Companions
from tc_lightning.models.conditions import Asked, Given, given_of
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.planner.front import write_front
from tc_lightning.policies.base import PlanningContext, Policy
from tc_lightning.policies.choice import FOLDER as FRONT
from tc_lightning.policies.choice import PlanChoice
from tc_lightning.rollout.evaluation import RolloutEvaluator
from tc_lightning.rollout.ranks import ALONE, Ranks
from tc_lightning.rollout.sampling import full_plan, sample_steps
from tc_lightning.runs.candidates import finalists_table, write_candidates
from tc_lightning.runs.folder import CONTENT, CORRECTOR, write_run

STEPS_AT_ONCE = 8  # steps of one trajectory that share a forward and a backward pass


def trajectory_sensitivity(
    model: Network, plan: CachePlan, x_1CHW: Tensor, asked: Asked, sample: int, probes: int, cases: CacheCases = REPEATED
) -> Tensor:
    """Branch sensitivities along one trajectory at full compute, [T, L, 2] float64 on the CPU; row 0 is zero.

    Args:
        model: the teacher.
        plan: the full plan, which tells sampler and guidance.
        x_1CHW: initial noise.
        asked: its conditions.
        sample: index of the trajectory, which keys its probes, and which step is forecast from which.
        probes: probes for each step.
        cases: what the cache holds.
    """
    given = given_of(model.conditions, asked)
    x_TCHW = torch.cat([state.x for state in sample_steps(model, plan, x_1CHW, asked)])
    t_T = torch.tensor([step.t for step in plan.sampler.steps], device=x_TCHW.device)
    cases = dataclasses.replace(cases, kv_order=0)  # keys and values are not asked for
    rows = [torch.zeros(1, plan.model.depth, len(plan.model.block.names))]
    for steps in torch.arange(1, len(t_T)).split(STEPS_AT_ONCE):
        v = probes_for(model, sample, steps.tolist(), probes).to(x_TCHW)
        reads = [cases.reads(sample, step) for step in steps.tolist()]
        full = torch.tensor([source for read in reads for source in read.sources])
        weights = [read.weights for read in reads], [read.kv_weights for read in reads]
        before = x_TCHW[full], t_T[full], given.part(torch.zeros_like(full))
        now = x_TCHW[steps], t_T[steps], given.part(torch.zeros_like(steps))
        cached = forecast_caches(model, plan.guidance, *before, *weights).branches
        rows.append(branch_sensitivity(model, plan.guidance, cached, *now, v).cpu())
    return torch.cat(rows).double()


class Distilled(NamedTuple):
    """What training leaves to plan with.

    Args:
        task: the teacher, and how it is sampled.
        teacher_spec: where the teacher was loaded from.
        objectives: what was trained.
        companions: those of them that plans may name.
        policy: what turns scores into a plan.
        sensitivity_samples: trajectories over which sensitivities are averaged.
        sensitivity_probes: random probes for each step of these.
        purpose: what the run says that it is for.
    """

    task: Task
    teacher_spec: TeacherSpec
    objectives: Sequence[Objective]
    companions: Companions
    policy: Policy
    sensitivity_samples: int
    sensitivity_probes: int
    purpose: str


class PlanningJob:
    """Everything that follows the training of a distiller; every rank of a distributed run calls `run`.

    Args:
        distilled: what was trained, and what for.
        trainer: the trainer, at the end of its fit.
    """

    def __init__(self, distilled: Distilled, trainer: Trainer) -> None:
        self.distilled, self.task, self.trainer = distilled, distilled.task, trainer
        self.device = self.trainer.strategy.root_device  # Lightning has moved the module to the CPU by now
        self.teacher, self.signature = self.task.teacher.to(self.device), self.task.signature
        self.companions = distilled.companions.to(self.device)
        self.folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # asks all ranks

    def run(self) -> None:
        """Measure on all ranks; plan on all of them if the policy can, else on rank 0; write on rank 0."""
        scores, first = self.scores(), self.trainer.is_global_zero
        if first:
            (self.folder / FRONT).mkdir(parents=True, exist_ok=True)
            scores.save(self.folder / "scores.safetensors")
            write_figures(scores, self.folder / "figures", self.signature.block.names)
            if self.companions.selector is not None:
                self.companions.selector.save(self.folder / CONTENT)
            if self.companions.corrector is not None:
                self.companions.corrector.save(self.folder / CORRECTOR)
        choice = self._choose(scores) if first or self.distilled.policy.on_all_ranks else None
        if first and choice is not None:
            self._write(choice)

    def scores(self) -> Scores:
        """What the objectives learned, and sensitivities over training trajectories."""
        objectives, signature, sampler = self.distilled.objectives, self.signature, self.task.sampler
        for objective in objectives:
            objective.finish(self.trainer)
        learned = {objective.learns: objective.cpu().scores().numpy() for objective in objectives if objective.learns}
        everything_TLN = np.ones((len(sampler), signature.depth, signature.image_tokens))
        return Scores(
            importance_TLN=learned.get("importance_TLN", everything_TLN),
            sensitivity_TL2=self._sensitivity().numpy(),
            teacher=signature.teacher,
            sampler=sampler_digest(sampler),
            router_TL2=learned.get("router_TL2"),
            selector="" if self.companions.selector is None else self.companions.selector.digest,
            cases=self.task.cases,
        )

    def _sensitivity(self) -> Tensor:
        """Mean over trajectories, [T, L, 2]. Ranks add zeros to what another computed: their number changes no sum."""
        task, world = self.task, self.trainer.world_size
        plan = full_plan(self.signature, task.sampler, task.guidance)
        x_SCHW, given_S, _ = self._endpoints("train_endpoints", self.distilled.sensitivity_samples)
        total_STL2 = torch.zeros(
            len(x_SCHW), plan.num_steps, self.signature.depth, len(self.signature.block.names), dtype=torch.float64
        )
        mine = range(self.trainer.global_rank, len(x_SCHW), world)
        for s in tqdm(mine, "sensitivity", disable=not self.trainer.is_global_zero, unit="trajectory"):
            x, y = x_SCHW[s : s + 1], given_S.part(slice(s, s + 1))
            total_STL2[s] = trajectory_sensitivity(self.teacher, plan, x, y, s, self.distilled.sensitivity_probes, task.cases)
        if world > 1:
            total_STL2 = self.trainer.strategy.reduce(total_STL2.to(self.device), reduce_op="sum").cpu()
        return total_STL2.mean(0).float()

    def _endpoints(self, name: str, count: int | None = None) -> tuple[Tensor, Given, Tensor]:
        """Noise, conditions and final latents of the first trajectories of the data module."""
        noise, given, latents = getattr(self.trainer.datamodule, name)()  # type: ignore[attr-defined]
        return noise[:count].to(self.device), given.part(slice(count)).to(self.device), latents[:count].to(self.device)

    def _choose(self, scores: Scores) -> PlanChoice:
        task = self.task
        x_T, given, x_0 = self._endpoints("heldout")
        evaluate = RolloutEvaluator(self.teacher, x_T, given, x_0, self.companions)
        full = full_plan(self.signature, task.sampler, task.guidance)
        calibrate = functools.partial(run_calibration, self.teacher, full, self.folder, keep=self.trainer.is_global_zero)
        context = PlanningContext(
            self.signature,
            self.teacher.schedule,
            task.sampler,
            task.guidance,
            scores,
            task.sampler,
            evaluate,
            calibrate=functools.cache(calibrate),
            model=self.teacher,
            ranks=self._ranks(),
            companions=self.companions,
            folder=self.folder / FRONT,
        )
        return self.distilled.policy.plan(context)

    def _ranks(self) -> Ranks:
        """The processes of this run, if the policy plans on all of them."""
        trainer = self.trainer
        if not self.distilled.policy.on_all_ranks or trainer.world_size == 1:
            return ALONE

        def total(values: Tensor) -> Tensor:
            return trainer.strategy.reduce(values.to(self.device), reduce_op="sum")

        return Ranks(trainer.global_rank, trainer.world_size, total)

    def _write(self, choice: PlanChoice) -> None:
        choice.plan.save(self.folder / "plan.json")
        if choice.front:
            write_front(choice.front, self.folder)
        write_candidates(choice.candidates, self.folder / "candidates.csv")
        name = self.folder.parent.name if self.folder.name.startswith("version_") else self.folder.name
        spec, purpose = self.distilled.teacher_spec, self.distilled.purpose
        content, corrector = self.companions.selector is not None, self.companions.corrector is not None
        write_run(self.folder, name, spec, self.signature.teacher, content=content, purpose=purpose, corrector=corrector)
        print(finalists_table(choice.candidates))
        print(f"plan {choice.plan.summary} written to {self.folder / 'plan.json'}")


def write_figures(scores: Scores, folder: Path, branches: Sequence[str]) -> None:
    """Write `sensitivity.png`, and of what was learned `importance.png` and `router.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    sensitivity_figure(scores, branches).savefig(folder / "sensitivity.png", dpi=120)
    if scores.importance_TLN.min() < 1.0:
        importance_figure(scores).savefig(folder / "importance.png", dpi=120)
    if scores.router_TL2 is not None:
        router_figure(scores.router_TL2, branches).savefig(folder / "router.png", dpi=120)
