"""Training a corrector: what the forecasts of skipped steps lack, along trajectories at full compute, and along the student's own.

For each batch a plan is drawn, with gaps and an order as plans have them (`tc_lightning.learn.objectives.drawn_plans`). At some of its
corrected steps the forecast of the residual of all blocks, from full compute at the steps that the plan reads, is corrected, and held
against the residual itself. The loss of a step is the squared error that is left, over that of the forecast alone: errors vary by
orders of magnitude along a run, and so every step says what share of its error the corrector takes away. Part of it is measured on
the tokens, part on the guided output that the readout makes of them, which is all that a corrected step leaves. The teacher is frozen.

Shape suffixes: B images, C H W latent, T steps, S of them that are learned from, G halves of guidance, N tokens, D width, R terms.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tc_lightning.cache.semantics import forecast
from tc_lightning.cache.soft_network import enter, guided_eps
from tc_lightning.diffusion.update import advance, coefficients
from tc_lightning.errors import RunError, TokenCacheError
from tc_lightning.learn.objectives.base import Batch, Loss, Objective, Task
from tc_lightning.learn.objectives.drawn_plans import UNTRAINED, Grid, drawn_plan, table_of
from tc_lightning.learn.objectives.superposition import FLOOR
from tc_lightning.measure.scores import sampler_digest
from tc_lightning.models.companions import Companions
from tc_lightning.models.conditions import Given
from tc_lightning.models.corrector import Corrector, ResidualCorrector, correction_clocks
from tc_lightning.models.network import compute_through
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.forecasts import MAX_ORDER
from tc_lightning.plan.sampler_table import SamplerTable
from tc_lightning.rollout.sampling import sample_steps

LATENTS_AT_ONCE = 32  # latents that go through the teacher together
KEPT_BYTES = 1 << 30  # residuals of recorded trajectories that are kept from one epoch to the next


class FullRun(NamedTuple):
    """Latents before every step [B, T, C, H, W], and the residual of all blocks at full compute there [T, G, B, N, D]."""

    latents_BTCHW: Tensor
    residual_TGBND: Tensor

    def image(self, b: int) -> FullRun:
        """One image's, in memory of its own."""
        return FullRun(self.latents_BTCHW[b : b + 1].clone(), self.residual_TGBND[:, :, b : b + 1].clone())


class Left(NamedTuple):
    """Squared errors of each step that is learned from, mean over images, [S]: what is left of them, and those of the forecast alone;
    on tokens, then on the guided output."""

    residual_S: Tensor
    forecast_S: Tensor
    output_S: Tensor
    output_forecast_S: Tensor

    @property
    def shares(self) -> tuple[Tensor, Tensor]:
        """Share of the forecast's squared error that is left, mean over steps: on tokens, and on the output."""
        on_tokens = (self.residual_S / self.forecast_S.clamp(min=FLOOR)).mean()
        return on_tokens, (self.output_S / self.output_forecast_S.clamp(min=FLOOR)).mean()


class ForecastCorrection(Objective):
    """Trains a corrector that plans may name.

    Args:
        orders: forecast orders that plans are drawn with.
        longest: distance of two full steps, at most.
        steps: corrected steps of a batch's plan that it learns from, at most.
        output_share: weight of the output's error in the loss; the rest is that of the tokens.
        rollouts_from: optimiser steps along full compute, after which the student's own rollouts take its place; None: never.
        grids: steps of the plans, one of which is drawn for each batch: near to those that plans will have, for the corrector is told
            the times; without any, the recorded ones of the distiller's sampler.

    Raises:
        RunError: if an argument is out of range.
    """

    batches, learns = "trajectories", ""

    def __init__(
        self,
        orders: tuple[int, ...] = (1, 2),
        longest: int = 5,
        steps: int = 8,
        output_share: float = 0.5,
        rollouts_from: int | None = None,
        grids: list[Grid] | None = None,
    ) -> None:
        super().__init__()
        if not orders or not all(1 <= order <= MAX_ORDER for order in orders):
            raise RunError(f"corrector: orders are {list(orders)}; give 1, 2 or both: what is repeated alone does not move.")
        if longest < 2 or steps < 1 or not 0.0 <= output_share <= 1.0 or (rollouts_from is not None and rollouts_from < 0):
            raise RunError("corrector: longest must be 2 or more, steps 1 or more, output_share in 0 to 1, rollouts_from 0 or more.")
        if any(grid.num_steps < 3 for grid in grids or ()):
            raise RunError("corrector: a grid of fewer than 3 steps has none to correct.")
        self.orders, self.longest, self.steps, self.output_share = orders, longest, steps, output_share
        self.rollouts_from, self.grids = rollouts_from, list(grids or ())
        self._kept: dict[tuple[str, int], FullRun] = {}

    def prepare(self, task: Task) -> None:
        """See `Objective`."""
        if len(task.sampler) < 3:
            raise RunError(f"corrector: of {len(task.sampler)} steps none can be corrected: set num_steps to 3 or more.")
        self.task = task
        self.tables = [table_of(task, grid) for grid in self.grids] or [task.sampler]
        self.module = ResidualCorrector(task.teacher.config)
        self.taken: Tensor
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: Batch, batch_idx: int) -> Loss:
        """Share of the forecast's error that is left."""
        if "latents" not in batch.content:
            raise RunError("a corrector learns from whole trajectories: use data.whole_trajectories.WholeTrajectoryDataModule.")
        taken = int(self.taken)
        seed = taken << 20 | int(batch.content["index"][0])
        on_rollouts = self.rollouts_from is not None and taken >= self.rollouts_from
        on_tokens, on_output = self.left(self.drawn(seed), batch, seed, on_rollouts).shares
        total = (1 - self.output_share) * on_tokens + self.output_share * on_output
        return Loss(total, {"corrector_left": on_tokens.detach(), "corrector_output_left": on_output.detach()})

    def before_step(self) -> None:
        """Count optimiser steps, from which plans are drawn."""
        self.taken += 1

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Shares that are left at the corrected steps of a plan that follows from the batch."""
        seed = int(batch.content["index"].sum())
        on_tokens, on_output = self.left(self.drawn(seed), batch, seed).shares
        return {"corrector_left": on_tokens, "corrector_output_left": on_output}

    def drawn(self, seed: int) -> CachePlan:
        """A plan on one of the grids."""
        table = random.Random(seed).choice(self.tables)
        return drawn_plan(self.task, table, self.orders, self.longest, seed)

    def companions(self) -> Companions:
        """See `Objective`."""
        return Companions(corrector=Corrector.of(self.module))

    def left(self, plan: CachePlan, batch: Batch, seed: int, on_rollouts: bool = False) -> Left:
        """Errors at some of the plan's corrected steps, drawn by the seed.

        Args:
            plan: a plan on one of the grids.
            batch: trajectories, of which noise and conditions are taken where the grid is not that of their steps.
            seed: of the draw.
            on_rollouts: run the plan as the student would, and see what its forecasts lack there; else along full compute.
        """
        chosen = self._chosen(plan, seed)
        rolled = self.rolled_out(plan, batch.content["latents"][:, 0], batch.given) if on_rollouts else None
        run = (
            self._full_runs(plan.sampler, batch)
            if rolled is None
            else FullRun(rolled, self.residuals(plan.sampler, rolled, batch.given))
        )
        spans = [next(read for read in plan.flows[i].reads if read.entry.kind == "span") for i in chosen]
        values = [[run.residual_TGBND[source] for source in read.sources] for read in spans]
        forecast_SGBND = torch.stack([forecast(v, read.weights) for v, read in zip(values, spans, strict=True)])
        moved_SGBND = torch.stack([v[0] - v[1] for v in values])
        return self._errors(plan, chosen, run, batch.given, forecast_SGBND, moved_SGBND)

    @torch.no_grad()
    def rolled_out(self, plan: CachePlan, x_BCHW: Tensor, given: Given) -> Tensor | None:
        """Latents before every step of the plan as the student runs it from noise, [B, T, C, H, W]; None if they became NaN."""
        named = Companions(corrector=Corrector(self.module, UNTRAINED))
        with contextlib.suppress(TokenCacheError):
            states = sample_steps(self.task.teacher, plan, x_BCHW, given, companions=named)
            return torch.stack([state.x for state in states], 1)
        return None

    def _errors(
        self,
        plan: CachePlan,
        chosen: Sequence[int],
        run: FullRun,
        given: Given,
        forecast_SGBND: Tensor,
        moved_SGBND: Tensor,
    ) -> Left:
        teacher, guidance, device = self.task.teacher, self.task.guidance, forecast_SGBND.device
        S, G, B = forecast_SGBND.shape[:3]
        t_S = torch.tensor([plan.sampler.steps[i].t for i in chosen], device=device)
        rows = torch.arange(B, device=device).repeat(S)
        x_MCHW = run.latents_BTCHW[:, list(chosen)].transpose(0, 1).flatten(0, 1)
        with torch.no_grad():
            z_MND, _, final = enter(teacher, guidance, x_MCHW, t_S.repeat_interleave(B), given.part(rows))
        flat = [value.transpose(0, 1).flatten(0, 2) for value in (run.residual_TGBND[list(chosen)], forecast_SGBND, moved_SGBND)]
        residual_MND, forecast_MND, moved_MND = flat  # rows: halves, then steps, then images, as `enter` has them
        terms_SRD = self.module.terms(correction_clocks(plan, teacher.schedule)[list(chosen)].to(device))
        terms_MRD = terms_SRD.repeat_interleave(B, 0).repeat(G, 1, 1)
        corrected_MND = forecast_MND + self.module(z_MND, forecast_MND, moved_MND, terms_MRD)
        with torch.no_grad():
            wanted = guided_eps(teacher, guidance, z_MND + residual_MND, final)
            alone = guided_eps(teacher, guidance, z_MND + forecast_MND, final)
        made = guided_eps(teacher, guidance, z_MND + corrected_MND, final)

        def by_step(error: Tensor, halves: int) -> Tensor:
            return error.float().square().flatten(1).mean(1).view(halves, S, B).mean((0, 2))

        return Left(
            by_step(corrected_MND - residual_MND, G),
            by_step(forecast_MND - residual_MND, G),
            by_step(made - wanted, 1),
            by_step(alone - wanted, 1),
        )

    def _chosen(self, plan: CachePlan, seed: int) -> list[int]:
        """Some of the corrected steps, in order."""
        corrected = [i for i, segments in enumerate(plan.steps) if segments[0].corrected]
        drawn = torch.randperm(len(corrected), generator=torch.Generator().manual_seed(seed))[: self.steps]
        return sorted(corrected[j] for j in drawn.tolist())

    def _full_runs(self, sampler: SamplerTable, batch: Batch) -> FullRun:
        """The batch's trajectories on a grid; those that there is room for are computed once."""
        digest, indices, all_BTCHW = sampler_digest(sampler), batch.content["index"].tolist(), batch.content["latents"]
        found = {index: run for index in indices if (run := self._kept.get((digest, index))) is not None}
        missing = [b for b, index in enumerate(indices) if index not in found]
        if missing:
            rows = torch.tensor(missing, device=all_BTCHW.device)
            made = self._full_run(sampler, all_BTCHW[rows], batch.given.part(rows))
            found |= {indices[b]: made.image(j) for j, b in enumerate(missing)}
        for index in (indices[b] for b in missing):
            run = found[index]
            if (len(self._kept) + 1) * (run.latents_BTCHW.nbytes + run.residual_TGBND.nbytes) <= KEPT_BYTES:
                self._kept[digest, index] = run
        latents, residuals = zip(*(found[index] for index in indices), strict=True)
        return FullRun(torch.cat(latents).to(all_BTCHW.device), torch.cat(residuals, 2).to(all_BTCHW.device))

    @torch.no_grad()
    def _full_run(self, sampler: SamplerTable, latents_BTCHW: Tensor, given: Given) -> FullRun:
        """Recorded trajectories, or, on another grid, full compute from their noise."""
        teacher, guidance = self.task.teacher, self.task.guidance
        if sampler == self.task.sampler:
            return FullRun(latents_BTCHW, self.residuals(sampler, latents_BTCHW, given))
        x_BCHW, past, latents, residuals = latents_BTCHW[:, 0], tuple[Tensor, ...](), list[Tensor](), list[Tensor]()
        for row in sampler.steps:
            t_B = torch.full((len(x_BCHW),), row.t, device=x_BCHW.device)
            z_MND, mods, final = enter(teacher, guidance, x_BCHW, t_B, given)
            out_MND = compute_through(list(teacher.blocks), mods, z_MND)
            latents.append(x_BCHW)
            residuals.append((out_MND - z_MND).unflatten(0, (-1, len(x_BCHW))))
            x_BCHW, m = advance(x_BCHW, guided_eps(teacher, guidance, out_MND, final), past, coefficients(row))
            past = (m, *past)[: sampler.history]
        return FullRun(torch.stack(latents, 1), torch.stack(residuals))

    @torch.no_grad()
    def residuals(self, sampler: SamplerTable, latents_BTCHW: Tensor, given: Given) -> Tensor:
        """Residual of all blocks at full compute before each step, [T, G, B, N, D]."""
        teacher, guidance = self.task.teacher, self.task.guidance
        B, T = latents_BTCHW.shape[:2]
        t_T = torch.tensor([row.t for row in sampler.steps], device=latents_BTCHW.device)
        places = torch.arange(T * B, device=latents_BTCHW.device)  # step by step, and of each all images
        parts = []
        for part in places.split(LATENTS_AT_ONCE):
            steps, images = part // B, part % B
            z_MND, mods, _ = enter(teacher, guidance, latents_BTCHW[images, steps], t_T[steps], given.part(images))
            residual_MND = compute_through(list(teacher.blocks), mods, z_MND) - z_MND
            parts.append(residual_MND.unflatten(0, (2 if guidance.doubles_batch else 1, -1)))
        return torch.cat(parts, 1).unflatten(1, (T, B)).transpose(0, 1)
