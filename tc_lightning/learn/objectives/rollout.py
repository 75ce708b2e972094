"""Training on the student's own trajectory from noise (HarmoniCa, arXiv 2410.01723): what it reuses is what it left itself.

Shape suffixes: B images, C H W latent, L blocks, 2 branches.
"""

from __future__ import annotations

import dataclasses
from typing import TypedDict

import torch
from torch import Tensor

from tc_lightning.cache.soft import BranchCache
from tc_lightning.cache.soft_network import full_eps, mixed_branches_eps
from tc_lightning.diffusion.update import advance, coefficients
from tc_lightning.errors import RunError
from tc_lightning.learn.objectives.base import Batch, Loss, Task
from tc_lightning.learn.objectives.routers import THRESHOLD, RouterObjective
from tc_lightning.models.conditions import Given
from tc_lightning.models.predictor import INITIAL_IMPORTANCE, RouterTable


class RolloutBatch(TypedDict):
    """One sampling step of rollouts; batches follow the trajectory, from step 1 to the last one."""

    noise: Tensor  # [B, C, H, W] where the rollouts start
    label: Tensor  # [B]
    step: Tensor  # [B] 1 to T - 1, the same for all
    index: Tensor  # [B] which noise


@dataclasses.dataclass(frozen=True)
class Student:
    """Where a student is: rollouts, the step to be taken next, latents and past m of the solver, and what it left in its cache."""

    index: Tensor
    step: int
    x: Tensor
    past: tuple[Tensor, ...]
    caches: list[BranchCache]


class RouterRollout(RouterObjective):
    """Step-wise denoising training (SDT): one optimiser step for each denoising step, error weighted by step (IEPO).

    At step i the student reuses what it left in its own cache, and its eps is compared with that of full compute from the student's
    own latents: lambda_i MSE + beta mean(r). Then it goes on from its own eps. Gradients stay within the step.

    With a `threshold` the student is its plan: branches with w above it are computed, the others reused, with straight-through
    gradients (`--ste-threshold 0.1` in the paper's release), and `target_share` is of branches computed. Without one each branch
    is a superposition, as the paper's text has it; then half a refresh at every step looks as good as a whole one at every second,
    which no plan can do (digits teacher, 1.5x fewer MACs: error 2e-4 with the threshold, 1e-2 without, 1e-3 at random).

    The student's state lives between batches, and follows from noise and weights: where it is missing, as after a resume, the
    steps before are run again.

    Args:
        target_share: see `RouterObjective`.
        beta: see `RouterObjective`.
        weighting: see `RouterObjective`.
        samples: see `RouterObjective`.
        threshold: w above which a branch is computed; None superposes.

    Raises:
        RunError: if an argument is out of range.
    """

    batches = "rollouts"

    def __init__(
        self,
        target_share: float = 0.5,
        beta: float | None = None,
        weighting: str = "effect",
        samples: int = 2,
        threshold: float | None = THRESHOLD,
    ) -> None:
        super().__init__(target_share, beta, weighting, samples)
        if threshold is not None and not 0.0 < threshold < 1.0:
            raise RunError(f"router: threshold is {threshold:g}; it must lie between 0 and 1, or be null.")
        self.threshold = threshold
        self._student: Student | None = None

    def make_predictor(self, task: Task) -> RouterTable:
        """A table alone, since a batch is of one step; it starts about the threshold."""
        depth, start = task.signature.depth, INITIAL_IMPORTANCE if self.threshold is None else self.threshold
        return RouterTable(len(task.sampler), depth, start, len(task.signature.block.names))

    def loss(self, batch: Batch, batch_idx: int) -> Loss:
        """Weighted error of one denoising step plus the cost of computing; moves the student on."""
        if "noise" not in batch.content:
            raise RunError("a rollout starts from noise: use data.rollouts.RolloutDataModule with RouterRollout.")
        step, given = int(batch.step[0]), batch.given
        student = self._before(step, batch)
        w_TL2 = self._taken()
        eps, caches = self._eps(student, given, w_TL2[step])
        with torch.no_grad():
            target, _ = full_eps(self.task.teacher, self.task.guidance, student.x, self._time(student), given)
            self._student = self._moved(student, eps, caches)
        return self.priced(self.weight_T[step] * (eps - target).square().flatten(1).mean(1), w_TL2)

    def _before(self, step: int, batch: Batch) -> Student:
        """The student before a step."""
        student, index_B = self._student, batch.content["index"]
        if student is None or student.step != step or not torch.equal(student.index, index_B):
            student = self._replay(step, batch)
        return student

    @torch.no_grad()
    def _replay(self, step: int, batch: Batch) -> Student:
        """Run the rollouts from noise to before a step: step 0 in full, the others with the present weights."""
        x, given = batch.content["noise"], batch.given
        first = Student(batch.content["index"], 0, x, (), [])
        eps, caches = full_eps(self.task.teacher, self.task.guidance, x, self._time(first), given)
        student = self._moved(first, eps, caches.branches)
        w_TL2 = self._taken()
        while student.step < step:
            student = self._moved(student, *self._eps(student, given, w_TL2[student.step]))
        return student

    def _taken(self) -> Tensor:
        """The weights of all steps as the student takes them."""
        w_TL2 = self.predictor()
        if self.threshold is None:
            return w_TL2
        return (w_TL2 > self.threshold).to(w_TL2) + (w_TL2 - w_TL2.detach())

    def _time(self, student: Student) -> Tensor:
        return torch.full((len(student.x),), self.task.sampler.steps[student.step].t, device=student.x.device)

    def _eps(self, student: Student, given: Given, w_L2: Tensor) -> tuple[Tensor, list[BranchCache]]:
        """Guided eps of the student's step, and what it leaves."""
        w_BL2 = w_L2.expand(given.images, -1, -1)
        args = student.caches, student.x, self._time(student), given, w_BL2
        return mixed_branches_eps(self.task.teacher, self.task.guidance, *args)

    def _moved(self, student: Student, eps: Tensor, caches: list[BranchCache]) -> Student:
        sampler = self.task.sampler
        x, m = advance(student.x, eps.detach(), student.past, coefficients(sampler.steps[student.step]))
        kept = [{name: update.detach() for name, update in cache.items()} for cache in caches]
        return Student(student.index, student.step + 1, x, (m, *student.past)[: sampler.history], kept)
