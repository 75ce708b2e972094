"""Stage 3: CUDA graphs are captured once and replayed, give what plain runs give, and nothing happens between steps.

The rehearsal runs the same requests without any graph, and looks at the same profile.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np

from export.bench.acceptance.gauges import cuda_calls, memory_now, profiled, queue_of
from export.bench.acceptance.reporter import Findings, NotHere, Reporter
from export.bench.acceptance.sizes import sizes_for
from export.bench.acceptance.subjects import digits, write_artefact
from export.compiler.parity import TOLERANCE, relative_l2
from export.runtime.buffers import MOST_GRAPHS
from export.runtime.layout import graphed, lay_out
from export.runtime.sampler import CachedSampler
from export.runtime.sessions import PROVIDERS

LABELS = [3, 1, 4, 1, 5, 9]
BETWEEN = re.compile(r"Synchronize|Alloc|Malloc|Free|Memcpy|Memset")  # what must not happen between steps
LAUNCH = re.compile(r"GraphLaunch")
CAPTURED, REPLAYED, PLAIN = "captured", "replayed", "plain"
FLAT_MB = 1.0


def run(report: Reporter, provider: str, scratch: Path) -> None:
    """See the module."""
    sizes = sizes_for(provider)
    folder = write_artefact(*digits(sizes), scratch / "artefact", sizes.small_precision, provider)
    sampler = CachedSampler(folder, provider)
    with report.part("counters") as found:
        counters(found, sampler)
    with report.part("equal to plain runs") as found:
        plain = CachedSampler(folder, provider, cuda_graphs=False).sample(LABELS, seed=1)
        found.require(plain.receipt["cuda_graphs"][PLAIN] == len(sampler.manifest["schedule"]), "cuda_graphs=False used graphs")
        latents = sampler.sample(LABELS, seed=1).latents
        found.figures["bits equal"] = np.array_equal(latents, plain.latents)
        found.at_most("difference", relative_l2(latents, plain.latents), TOLERANCE[sizes.small_precision])
    with report.part("profile") as found:
        profile_of(found, CachedSampler(folder, provider, profile=scratch / "profile"))
    with report.part("calls of CUDA between steps") as found:
        between_steps(found, cuda_calls(lambda: sampler.sample(LABELS, seed=1), scratch / "trace.json"))
    with report.part("memory between steps") as found:
        held: list[float] = []
        gauge = "device" if provider == "cuda" else "host"
        sampler.sample(LABELS, on_step=lambda *_: held.append(memory_now(provider)[gauge]))
        found.figures["megabytes"] = [held[0], held[-1]]
        if provider == "cpu":
            raise NotHere("on the CPU scratch memory comes and goes with the request")
        found.at_most("megabytes taken between steps", max(held) - held[0], FLAT_MB)
    with report.part("queue") as found:
        found.figures |= queue_of(sampler, LABELS)._asdict()


def counters(found: Findings, sampler: CachedSampler) -> None:
    """What receipts say of graphs: the first request captures each of them once, the next replays every step."""
    counts = [sampler.sample(LABELS, seed=1).receipt["cuda_graphs"] for _ in range(2)]
    steps = len(sampler.manifest["schedule"])
    different = len(graphed(lay_out(sampler.manifest, len(LABELS), 1).runs, MOST_GRAPHS))
    expected: list[dict[str, int | str | None]]
    if sampler.provider == "cuda":
        expected = [{CAPTURED: different, REPLAYED: steps - different, PLAIN: 0, "off": None}]
        expected += [{CAPTURED: 0, REPLAYED: steps, PLAIN: 0, "off": None}]
    else:
        expected = [{CAPTURED: 0, REPLAYED: 0, PLAIN: steps, "off": "the provider is the CPU"}] * 2
    found.figures |= {"first": counts[0], "second": counts[1], "different runs": different}
    found.require(counts == expected, f"the counters should be {expected}")


def profile_of(found: Findings, sampler: CachedSampler) -> None:
    """Every node on the provider, no copies among them, and the host's time between and within runs."""
    for _ in range(2):
        sampler.sample(LABELS, seed=1)
    profile = profiled(sampler)
    copies = sorted(operator for operator in profile.operators if "Memcpy" in operator)
    found.require(not copies, f"the graphs hold copies: {copies}")
    found.require(profile.providers == {PROVIDERS[sampler.provider]}, f"nodes ran on {sorted(profile.providers)}")
    last = len(sampler.manifest["schedule"])  # the runs of the second request, but for conditioning
    gaps, runs = sorted(profile.gaps_us[-last + 1 :]), sorted(profile.runs_us[-last:])
    found.figures |= {"host us between steps": gaps[len(gaps) // 2], "longest": gaps[-1], "host us of a step": runs[len(runs) // 2]}


def between_steps(found: Findings, calls: list[str]) -> None:
    """Between the first replay and the last, nobody waits for the device, takes memory of it, or copies anything.

    Raises:
        NotHere: if no replay was seen.
    """
    launches = [place for place, name in enumerate(calls) if LAUNCH.search(name)]
    if not launches:
        raise NotHere("the profiler saw no CUDA graph being launched")
    inner = Counter(calls[launches[0] : launches[-1]])
    found.figures |= {"launches": len(launches), "calls": dict(inner)}
    wrong = {name: count for name, count in inner.items() if BETWEEN.search(name)}
    found.require(not wrong, f"between steps there are {wrong}")
