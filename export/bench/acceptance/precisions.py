"""Stage 2: the digits teacher, exported and proved in each precision as a user would, and what its requests promise."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from export.bench.acceptance.reporter import Findings, NotHere, Reporter
from export.bench.acceptance.sizes import PRECISIONS, sizes_for
from export.bench.acceptance.subjects import digits
from export.compiler.compile import export_artefact
from export.compiler.parity import TOLERANCE, relative_l2
from export.runtime.manifest import read_manifest, write_manifest
from export.runtime.sampler import CachedSampler
from export.runtime.sessions import PROVIDERS, WEIGHTS
from tc_lightning.errors import TokenCacheError

NANS = {"fp32": b"\x00\x00\xc0\x7f", "fp16": b"\x00\x7e", "bf16": b"\xc0\x7f"}  # quiet ones, little-endian
POISONED = "final_layer.linear.bias"
LABELS = [3, 1, 4, 1, 5]
OVERFLOWING = 1e39  # a guidance scale that is infinite in fp32, in which it is multiplied


def run(report: Reporter, provider: str, scratch: Path) -> None:
    """See the module."""
    sizes = sizes_for(provider)
    model, plan = digits(sizes)
    for precision in PRECISIONS:
        path = scratch / precision
        with report.part(f"{precision}, parity") as found:
            if provider == "cpu" and precision == "bf16":
                raise NotHere("the CPU has no kernels for bf16")
            manifest = export_artefact(model, plan, path, precision, provider, sizes.images)
            found.figures |= {"plan": plan.summary, "programs": len(manifest["programs"])}
            worst = max(check["rel_l2"] for check in manifest["parity"]["programs"])
            found.at_most("trajectory", manifest["parity"]["trajectory_rel_l2"], TOLERANCE[precision])
            found.at_most("worst output of a program", worst, TOLERANCE[precision])
        if not path.exists():
            continue
        with report.part(f"{precision}, requests") as found:
            requests(found, CachedSampler(path, provider), TOLERANCE[precision])
        with report.part(f"{precision}, NaN") as found:
            poison(path, scratch / f"{precision}-poisoned", precision)
            trips(found, CachedSampler(path, provider), CachedSampler(scratch / f"{precision}-poisoned", provider))


def requests(found: Findings, sampler: CachedSampler, limit: float) -> None:
    """Where nodes run, and what an image depends on: its seed, its index and its label, and nothing else."""
    elsewhere = {
        name: nodes
        for name, nodes in sampler.sample(LABELS, seed=1).receipt["nodes_per_provider"].items()
        if set(nodes) != {PROVIDERS[sampler.provider]}
    }
    found.require(not elsewhere, f"nodes ran elsewhere than on {PROVIDERS[sampler.provider]}: {elsewhere}")
    first, second = sampler.sample(LABELS, seed=1).latents, sampler.sample(LABELS, seed=2).latents
    again = sampler.sample(LABELS, seed=1).latents
    found.require(np.array_equal(first, again), "a request gives other bits after another request than before it")
    found.figures["difference of two seeds"] = relative_l2(second, first)
    found.require(found.figures["difference of two seeds"] > 0.1, "two seeds give the same images")
    alone = np.concatenate([sampler.sample([label], seed=1, first_index=i).latents for i, label in enumerate(LABELS)])
    found.at_most("batch against single images", max(map(relative_l2, first, alone)), limit)


def poison(artefact: Path, folder: Path, precision: str) -> None:
    """A copy of an artefact with one NaN among its weights, which its manifest vouches for."""
    shutil.copytree(artefact, folder)
    manifest = read_manifest(folder)
    _, _, offset, _ = manifest["weights"][POISONED]
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(offset)
        file.write(NANS[precision])
    write_manifest(folder, manifest)


def trips(found: Findings, sampler: CachedSampler, poisoned: CachedSampler) -> None:
    """NaN weights are noticed at the first step, an overflow when it comes, and neither harms the next request."""
    before = sampler.sample(LABELS, seed=1).latents
    found.require("step 0" in _error(poisoned, None), "a NaN among the weights was not noticed at step 0")
    said = _error(sampler, OVERFLOWING)
    found.figures["overflow"] = said
    found.require("NaN or infinite at step" in said, "an overflow was not noticed")
    found.require(np.array_equal(before, sampler.sample(LABELS, seed=1).latents), "the request after one that failed is another")


def _error(sampler: CachedSampler, guidance: float | None) -> str:
    """What a request says that must fail; empty if it does not."""
    try:
        sampler.sample(LABELS, guidance=guidance)
    except TokenCacheError as error:
        return str(error)
    return ""
