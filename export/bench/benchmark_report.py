"""What a benchmark found: its rows, and all of it as text. Standard library only."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class BenchmarkRow:
    """One line of the table; None where a figure has no meaning, or was not measured. Memory is above that of an idle interpreter."""

    name: str
    ms_per_image: float
    tflops: float
    macs_speedup: float | None = None
    wall_speedup: float | None = None
    efficiency: float | None = None
    cache_mb: float | None = None
    loaded_mb: float | None = None
    idle_mb: float | None = None
    peak_mb: float | None = None
    export_s: float | None = None
    load_s: float | None = None


def table(report: dict[str, Any]) -> str:
    """A report as text."""
    head = (
        f"\n{report['model']}, {report['tokens']} tokens, batch {report['batch']}, {report['steps']} steps, {report['precision']}, "
        f"{report['device']}; weights {report['weights_mb']:.0f} MB; a large product reaches {report['product_tflops']:.2f} TFLOP/s"
    )
    columns = {
        "ms_per_image": ("ms/image", "{:.0f}"),
        "tflops": ("TFLOP/s", "{:.2f}"),
        "macs_speedup": ("MACs", "{:.2f}x"),
        "wall_speedup": ("clock", "{:.2f}x"),
        "efficiency": ("efficiency", "{:.3f}"),
        "cache_mb": ("cache MB", "{:.1f}"),
        "loaded_mb": ("loaded MB", "{:.0f}"),
        "idle_mb": ("idle MB", "{:.0f}"),
        "peak_mb": ("peak MB", "{:.0f}"),
        "export_s": ("export s", "{:.1f}"),
        "load_s": ("load s", "{:.1f}"),
    }
    lines = [["", *(title for title, _ in columns.values())]]
    for row in report["rows"]:
        cells = [layout.format(row[key]) if row[key] is not None else "" for key, (_, layout) in columns.items()]
        lines.append([row["name"], *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if report["cuda_graphs"] is not None:
        counts = "; ".join(f"{name}: {graphs['replayed']}" for name, graphs in report["cuda_graphs"].items())
        head += f"\nall nodes on the GPU; steps replayed from CUDA graphs: {counts}"
    text = [head, *("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)]
    for name, programs in (report["operators_ms"] or {}).items():
        text.append(f"{name}: where the time of a run of each graph goes (a mean over the programs that share it), ms")
        for program, spent in programs.items():
            most = ", ".join(f"{op} {ms:.2f}" for op, ms in list(spent.items())[:8])
            text.append(f"  {program}: {most}")
    return "\n".join(text)
