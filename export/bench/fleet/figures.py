"""What a simulated server did: utilisation, latency, rows refused, batches that formed. Shape suffixes: R rows, S served ones."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from export.bench.fleet.load import Kind, poisson
from export.bench.fleet.server import Served, Server, serve_rows
from tc_lightning.errors import TokenCacheError

SETTLING = 0.1  # share of the time that is not looked at: the server starts empty
FEWEST, MOST = 100, 10_000_000
COLUMNS = ("rows a second", "largest batch", "busy", "done a second", "p50 s", "p95 s", "refused", "rows a batch", "alone", "full")


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of the time between a tenth of all arrivals and the last one.

    Args:
        utilisation: share of the time in which the server was busy.
        throughput: rows done a second.
        p50_s: median seconds from arrival to the end of the batch, of rows that came in that time and were served.
        p95_s: of 95 % of them at most.
        refused: share of the rows that came in that time.
        batches: how many of each size started in that time.
    """

    utilisation: float
    throughput: float
    p50_s: float
    p95_s: float
    refused: float
    batches: dict[int, int]

    @property
    def rows_a_batch(self) -> float:
        """Their mean."""
        return sum(size * count for size, count in self.batches.items()) / sum(self.batches.values())

    def batches_of(self, size: int) -> float:
        """Share of the batches that had so many rows."""
        return self.batches.get(size, 0) / sum(self.batches.values())


def figures_of(served: Served, arrivals_R: np.ndarray) -> Figures:
    """Figures of a run.

    Raises:
        TokenCacheError: if no row was served, or no batch started, in the time that is looked at.
    """
    since_s, until_s = SETTLING * arrivals_R[-1], arrivals_R[-1]
    rows_S = np.array([row for batch in served.batches for row in batch.rows], dtype=np.int64)
    ends_S = np.repeat([batch.end_s for batch in served.batches], [len(batch.rows) for batch in served.batches])
    seen_S = arrivals_R[rows_S] >= since_s
    sizes = Counter(len(batch.rows) for batch in served.batches if since_s <= batch.start_s <= until_s)
    if not seen_S.any() or not sizes:
        raise TokenCacheError(f"of {len(arrivals_R)} rows too few were served to tell: let more rows come.")
    latency_S = (ends_S - arrivals_R[rows_S])[seen_S]
    busy_s = sum(max(0.0, min(batch.end_s, until_s) - max(batch.start_s, since_s)) for batch in served.batches)
    came = int((arrivals_R >= since_s).sum())
    return Figures(
        utilisation=float(busy_s / (until_s - since_s)),
        throughput=float(((since_s < ends_S) & (ends_S <= until_s)).sum() / (until_s - since_s)),
        p50_s=float(np.quantile(latency_S, 0.5)),
        p95_s=float(np.quantile(latency_S, 0.95)),
        refused=int((arrivals_R[served.refused] >= since_s).sum()) / came,
        batches=dict(sorted(sizes.items())),
    )


def simulated(server: Server, kinds: Sequence[Kind], rate: float, rows: int, seed: int) -> Figures:
    """Figures of a server that so many rows of a mixture ask at a rate.

    Raises:
        TokenCacheError: if there are too few rows to tell, or a figure of the load is not possible.
    """
    if not FEWEST <= rows <= MOST:
        raise TokenCacheError(f"{rows} rows are too few to tell, or too many to wait for: give {FEWEST} to {MOST:,}.")
    arrivals_R, kinds_R = poisson(rate, kinds, rows, seed)
    served = serve_rows(server, arrivals_R.tolist(), kinds_R.tolist(), [kind.work for kind in kinds])
    return figures_of(served, arrivals_R)


def queue_table(servers: Sequence[Server], kinds: Sequence[Kind], rates: Sequence[float], rows: int, seed: int) -> str:
    """Each server at each rate, in Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for rate in rates:
        for server in servers:
            found = simulated(server, kinds, rate, rows, seed)
            lines.append(
                (
                    f"{rate:.3g}",
                    str(server.max_batch),
                    f"{found.utilisation:.0%}",
                    f"{found.throughput:.3g}",
                    f"{found.p50_s:.3g}",
                    f"{found.p95_s:.3g}",
                    f"{found.refused:.1%}",
                    f"{found.rows_a_batch:.1f}",
                    f"{found.batches_of(1):.0%}",
                    f"{found.batches_of(server.max_batch):.0%}",
                )
            )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
