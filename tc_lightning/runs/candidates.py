"""The candidates that a policy looked at, as a table to read and as candidates.csv."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def finalists_table(rows: list[dict[str, Any]], most: int = 6) -> str:
    """The first candidates as a table to read; all of them are in candidates.csv."""
    shown = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows[:most]]
    table = [list(rows[0]) if rows else [], *shown]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table)


def write_candidates(rows: list[dict[str, Any]], path: Path) -> None:
    """One line for each candidate that the policy looked at; the columns are all keys that occur."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
