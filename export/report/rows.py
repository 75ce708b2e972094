"""A measured plan as a row of figures, in plain JSON values but for the arrays that comparisons and pictures need."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.compiler.fidelity import PIXEL_IMAGES, pixel_fidelity
from export.report.contenders import Contender
from export.report.judge import Judge
from export.report.measure import ContenderArtefact, Made
from export.report.quality import InceptionFID, frechet_distance, teacher_features, visible
from export.runtime.decoder import Decoder
from tc_lightning.measure.psnr import data_range, psnr, squared_errors
from tc_lightning.measure.ssim import ssim
from tc_lightning.models.network import Network
from tc_lightning.plan.conditions import class_label
from tc_lightning.rollout.targets import Targets

TARGET_NAMES = {"ode": "converged ODE", "reference": "reference run"}


@dataclasses.dataclass(frozen=True, eq=False)
class ReportRow:
    """All that was measured of one plan.

    Args:
        subject: the plan.
        latents: what it made, [B, C, H, W].
        seen: what is seen of the first images: decoded pixels where there is a decoder, else `visible` latents.
        errors: mean squared error of each image's final latents against each target, [B].
        figures: the row of the report, plain JSON values.
    """

    subject: Contender
    latents: np.ndarray
    seen: np.ndarray
    errors: dict[str, np.ndarray]
    figures: dict[str, Any]

    @property
    def name(self) -> str:
        """The subject's name."""
        return self.subject.name

    @property
    def ms(self) -> float:
        """Milliseconds an image."""
        return float(self.figures["ms_per_image"])

    def mse(self, target: str) -> float:
        """Mean over images of the squared error against a target."""
        return float(self.errors[target].mean())


class Ruler:
    """Measures what was made against the targets.

    Args:
        model: the teacher, on any device, whose features the Frechet distance uses.
        targets: images of the reference run and of the converged ODE.
        judge: a classifier of real images, where there is one.
        inception: Inception weights, where the user has them.
        decoder: makes pixels of latents, where there is one.

    Raises:
        TokenCacheError: if the Inception weights cannot be used.
    """

    def __init__(
        self, model: Network, targets: Targets, judge: Judge | None, inception: Path | None, decoder: Decoder | None = None
    ) -> None:
        self.model, self.targets, self.judge, self.decoder = model, targets, judge, decoder
        self.reference = targets.reference.numpy()
        self.reference_seen = self._seen(self.reference)
        self.span = data_range(self.reference)
        self.features = teacher_features(model, self.reference, targets.given)
        self.fid = None if inception is None else InceptionFID(inception, self.reference)

    def row(self, exported: ContenderArtefact, made: Made, reference_ms: float) -> ReportRow:
        """Figures of one plan."""
        errors = {name: squared_errors(made.latents, getattr(self.targets, name).numpy()) for name in TARGET_NAMES}
        subject, seen = exported.subject, self._seen(made.latents)
        figures = {
            "name": subject.name,
            "group": subject.group,
            "method": subject.method,
            "plan": subject.plan.summary,
            "plan_digest": subject.plan.digest,
            "provenance": dict(subject.plan.provenance),
            "steps": subject.plan.num_steps,
            "full_steps": len(subject.plan.full_steps),
            "sampler": f"{subject.plan.sampler.name} {subject.plan.sampler.spacing}",
            "macs_speedup": subject.speedup,
            "ms_per_image": made.ms,
            "ms_spread": [min(made.ms_per_image), max(made.ms_per_image)],
            "wall_speedup": reference_ms / made.ms,
            "export_rel_l2": exported.rel_l2,
            "cache_bytes_per_image": exported.cache_bytes,
            **{f"mse_{name}": spread(values) for name, values in errors.items()},
            **self._closeness(made.latents),
            **self._pixels(seen),
        }
        return ReportRow(subject, made.latents, seen, errors, figures)

    def _seen(self, latents: np.ndarray) -> np.ndarray:
        """What is seen of the first images."""
        return visible(latents[:PIXEL_IMAGES]) if self.decoder is None else self.decoder(latents[:PIXEL_IMAGES])

    def _pixels(self, seen: np.ndarray) -> dict[str, float | None]:
        """Figures in decoded pixels, of the first images, against those of the reference run; None of each without a decoder."""
        if self.decoder is None:
            return {"psnr_pixels_db": None, "ssim_pixels": None}
        found = pixel_fidelity(seen, self.reference_seen)
        return {"psnr_pixels_db": found.psnr_db, "ssim_pixels": found.ssim}

    def _accuracy(self, latents: np.ndarray) -> float | None:
        """Share of the images that the judge takes for what they were asked to be."""
        if self.judge is None:
            return None
        return self.judge.accuracy(latents, self.targets.given[class_label(self.model.conditions).name].numpy())

    def _closeness(self, latents: np.ndarray) -> dict[str, Any]:
        """Figures of the images against those of the reference run: PSNR of what was made, SSIM of what is seen of it."""
        seen, expected = visible(latents), visible(self.reference)
        similarity = ssim(seen, expected, self.span)
        features = teacher_features(self.model, latents, self.targets.given)
        return {
            "psnr_db": psnr(latents, self.reference),
            "ssim": None if similarity is None else float(similarity.mean()),
            "frechet_teacher_features": frechet_distance(features, self.features),
            "classifier_accuracy": self._accuracy(latents),
            "fid_inception": None if self.fid is None else self.fid(latents),
        }


def spread(values_B: np.ndarray) -> dict[str, float]:
    """Mean over images, its standard error, and the worst image."""
    error = float(values_B.std(ddof=1)) / math.sqrt(len(values_B)) if len(values_B) > 1 else math.nan
    return {"mean": float(values_B.mean()), "stderr": error, "worst": float(values_B.max())}


def by_group(rows: Sequence[ReportRow], *groups: str) -> list[ReportRow]:
    """The rows of some groups."""
    return [row for row in rows if row.subject.group in groups]
