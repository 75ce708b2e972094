"""Seconds of a batch from what `export/benchmark.py --json` measured at several sizes: a line, `fixed + rows * each`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tc_lightning.errors import TokenCacheError


def measured_line(path: Path, row: str) -> tuple[float, float]:
    """Fixed seconds of a batch and those of each of its rows: least squares over the sizes, neither of them below 0.

    Args:
        path: the JSON.
        row: name of the row to take, `ONNX Runtime, full` or that of a plan.

    Raises:
        TokenCacheError: if the file is no such JSON, is of several models, precisions or providers, or has no two sizes of this row, or
            larger batches did not take longer.
    """
    points, subjects, names = list[tuple[int, float]](), set[tuple[str, ...]](), set[str]()
    for report in _reports(path):
        subjects.add((report["model"], report["precision"], report["provider"]))
        names |= {line["name"] for line in report["rows"]}
        points += [(report["batch"], 1e-3 * line["ms_per_image"] * report["batch"]) for line in report["rows"] if line["name"] == row]
    if len(subjects) > 1:
        raise TokenCacheError(f"{path} is of {len(subjects)} models, precisions or providers: measure one alone, at several --batch.")
    if not points:
        raise TokenCacheError(f"{path} has no row {row!r}: choose one of {', '.join(sorted(names)) or 'none'} with --row.")
    return _line(path, points)


def _reports(path: Path) -> list[dict[str, Any]]:
    try:
        reports = json.loads(path.read_text(encoding="utf-8"))
        for report in reports:
            numbers = [report["batch"], *(line["ms_per_image"] for line in report["rows"])]
            if not all(isinstance(number, int | float) and number > 0 for number in numbers):
                raise ValueError("a size or time is not above 0")
            _ = [report[name] for name in ("model", "precision", "provider")] + [line["name"] for line in report["rows"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TokenCacheError(f"{path} is not what `export/benchmark.py --json` writes ({error!r}): measure again.") from error
    return reports


def _line(path: Path, points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    rows, seconds = np.array(points, dtype=np.float64).T
    if len(set(rows)) < 2:
        raise TokenCacheError(f"{path} has batches of one size only: measure at several, with --batch 1 4 16.")
    each, fixed = np.polyfit(rows, seconds, 1)
    if fixed < 0:
        fixed, each = 0.0, rows @ seconds / (rows @ rows)
    if each <= 0:
        raise TokenCacheError(f"in {path} larger batches took no longer than smaller ones: measure on a quiet machine, or larger ones.")
    return float(fixed), float(each)
