"""The comparison in numbers: errors of all variants, and differences of pairs of them on the same images and training seeds.

Two things vary that the answer should not depend on: the training seed (and the draws of random choices with it), and the images.
Each difference has a standard error for either, and for both together.

Shape suffixes: S training seeds, B images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

# (question, the variant that should be better, the one that it is compared with)
QUESTIONS = (
    ("v1: learned tokens against random ones", "v1", "random"),
    ("v1: against random ones, one set for all steps", "v1, one set for all steps", "random, one set for all steps"),
    ("v1: a set for each step against one for all", "v1", "v1, one set for all steps"),
    ("v2: learned tokens against random ones", "v2", "random for each image"),
    ("v2: against random ones, a set for each block", "v2 by block, even split", "random by block, even split"),
    ("v2: looking at the image against its mean", "v2", "v2, mean of images"),
    ("v2 against v1", "v2", "v1"),
    ("v1: its split over blocks against an even one", "v1 by block, own split", "v1 by block, even split"),
    ("v2: its split over blocks against an even one", "v2 by block, own split", "v2 by block, even split"),
    ("v2: its split against an even one but for the last block", "v2 by block, own split", "v2 by block, even but for the last"),
    ("v2: its split, with random tokens", "random by block, v2's split", "random by block, even split"),
    ("sensitivities: edges against random edges", "sensitive edges", "random edges"),
    ("sensitivities: window against random windows", "sensitive window", "random window"),
    ("sensitivities: blocks against random blocks", "sensitive blocks", "random blocks"),
    ("sensitivities: blocks against evenly spaced ones", "sensitive blocks", "evenly spaced blocks"),
    ("v1's importance of blocks against random blocks", "v1's blocks", "random blocks"),
    ("sensitivities against v1's importance of blocks", "sensitive blocks", "v1's blocks"),
)
SURE = 2.0  # standard errors from which on a difference counts


# By name of the variant: group, speedup, speedup_with_predictor (in MACs), and mse, the error of each image.
SeedErrors = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class VariantRow:
    """One variant: its cost, and mean and standard deviation over training seeds of its mean squared error."""

    group: str
    name: str
    speedup: float
    speedup_with_predictor: float
    mse: float
    std: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """Two variants on the same images and seeds: mean difference of their errors, negative if the first is better.

    `ratio` is that of their mean errors; the standard errors are over training seeds and over images; the verdict on the first
    variant is better, worse or undecided.
    """

    question: str
    first: str
    second: str
    ratio: float
    difference: float
    se_seeds: float
    se_images: float
    verdict: str


def all_rows(seeds: Sequence[SeedErrors]) -> list[VariantRow]:
    """A row for each variant, from at least two training seeds."""
    found = []
    for name, row in seeds[0].items():
        mse_S = _errors(seeds, name).mean(1)
        cost = (row["speedup"], row["speedup_with_predictor"])
        found.append(VariantRow(row["group"], name, *cost, float(mse_S.mean()), float(mse_S.std(ddof=1))))
    return found


def all_answers(seeds: Sequence[SeedErrors]) -> list[Answer]:
    """The answers to all questions, from at least two training seeds and images."""
    return [_answer(question, seeds, first, second) for question, first, second in QUESTIONS]


def table(rows: Sequence[VariantRow], answers: Sequence[Answer], seeds: int) -> str:
    """Both as Markdown."""
    lines = ["| variant | MSE against the full run | fewer MACs | with the predictor's |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.name} | {row.mse:.3g} ± {row.std:.1g} | {row.speedup:.2f}x | {row.speedup_with_predictor:.2f}x |")
    lines += ["", f"| question, {seeds} training seeds | ratio | difference | s.e. (seeds, images) | |", "|---|---|---|---|---|"]
    for a in answers:
        errors = f"{a.se_seeds:.1g}, {a.se_images:.1g}"
        lines.append(f"| {a.question} | {a.ratio:.3f} | {a.difference:+.2g} | {errors} | {a.verdict} |")
    return "\n".join(lines)


def _errors(seeds: Sequence[SeedErrors], name: str) -> np.ndarray:
    """[S, B]."""
    return np.array([seed[name]["mse"] for seed in seeds], dtype=np.float64)


def _answer(question: str, seeds: Sequence[SeedErrors], first: str, second: str) -> Answer:
    first_SB, second_SB = _errors(seeds, first), _errors(seeds, second)
    difference_SB = first_SB - second_SB
    difference, se_seeds, se_images = (
        float(difference_SB.mean()),
        _standard_error(difference_SB.mean(1)),
        _standard_error(difference_SB.mean(0)),
    )
    sure = abs(difference) > SURE * np.hypot(se_seeds, se_images)
    verdict = ("better" if difference < 0 else "worse") if sure else "undecided"
    return Answer(question, first, second, float(first_SB.mean() / second_SB.mean()), difference, se_seeds, se_images, verdict)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))
