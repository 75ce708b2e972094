"""An acceptance run as Markdown, for export/BENCHMARKS.md: what held, and the figures of the clock. Standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.bench.acceptance.journal import LIMIT, Line, Record
from tc_lightning.errors import TokenCacheError

BEGIN, END = "<!-- acceptance: begin -->", "<!-- acceptance: end -->"
COLUMNS = ("ms/image", "TFLOP/s", "MACs", "clock", "efficiency", "cache MB")
FORMS = {"MACs": "{:.2f}x", "clock": "{:.2f}x", "efficiency": "{:.3f}"}
LONG = 160


def markdown(record: Record) -> str:
    """The tables."""
    asked = record.asked
    lines = [
        f"    python export/acceptance.py --provider {asked['provider']} --minutes {asked['minutes']:g}",
        "",
        _versions(record),
        "",
    ]
    lines += ["| stage, part | | s | figures, or why not |", "|---|---|---|---|"]
    for number in asked["stages"]:
        outcome = record.outcome(number)
        lines += [_row(line, line.part) for line in record.parts(number)]
        lines.append(f"| **{number}** | not got to | | |" if outcome is None else _row(outcome, ""))
    for line in record.lines:
        if line.name == "speed" and "rows" in line.figures:
            lines += ["", *_clock(line)]
    return "\n".join(lines) + "\n"


def insert(path: Path, text: str) -> None:
    """Put the tables between the two marks of a file, in place of those that are there.

    Raises:
        TokenCacheError: if the file has no such marks.
    """
    content = path.read_text(encoding="utf-8")
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise TokenCacheError(f"{path} has no lines {BEGIN} and {END}, between which the tables go: add them where they should stand.")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def _versions(record: Record) -> str:
    """Device and versions, as far as a stage has told of them."""
    found = {name: value for line in reversed(record.lines) for name, value in line.figures.items()}
    wheels = found.get("wheels", {})
    shown = [f"{name} {wheels[name]}" for name in ("torch", "onnxruntime", "onnxruntime-gpu") if name in wheels]
    system = f"Python {record.asked['host']['python']}, {record.asked['host']['cores']} cores"
    return "; ".join([*([found["device"]] if "device" in found else []), *found.get("gpus", []), *shown, system]) + "."


def _row(line: Line, part: str) -> str:
    name = f"{line.stage} {line.name}, {part}" if part else f"**{line.stage} {line.name}**"
    told = _figures(line.figures) if line.verdict in ("held", "figures") else line.reason
    return f"| {name} | {line.verdict} | {line.seconds:.1f} | {_cell(told)} |"


def _figures(figures: dict[str, Any]) -> str:
    """The numbers among a part's figures, with their limits."""
    limits = {name: f" (limit {figures[name + LIMIT]:.3g})" for name in figures if name + LIMIT in figures}
    numbers = {name: value for name, value in figures.items() if isinstance(value, float) and not name.endswith(LIMIT)}
    return ", ".join(f"{name} {value:.3g}{limits.get(name, '')}" for name, value in numbers.items())


def _cell(text: str) -> str:
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= LONG else f"{flat[:LONG]}..."


def _clock(line: Line) -> list[str]:
    """The table of one measurement."""
    rows: dict[str, dict[str, float]] = line.figures["rows"]
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())] or list(next(iter(rows.values())))
    table = [f"| {line.part} | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for name, row in rows.items():
        cells = [FORMS.get(column, "{:.4g}").format(row[column]) if column in row else "" for column in columns]
        table.append(f"| {name} | {' | '.join(cells)} |")
    product = line.figures.get("product TFLOP/s")
    return [*table, *(["", f"A large product reaches {product:.4g} TFLOP/s."] if product else [])]
