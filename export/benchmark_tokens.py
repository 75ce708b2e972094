"""What recomputing some tokens is worth: a quarter of them, at random, beside none, and what keys and values have to do with it.

    python export/benchmark_tokens.py                                          the digits teacher
    python export/benchmark_tokens.py --weights data/photos_dit.safetensors --images 6

Some steps compute everything, the others recompute tokens that are drawn anew for each of them; the rest is forecast. Keys and values
of the others are repeated, or forecast by an order of their own. Mean squared error (median) of final latents against full compute at
every step, by PyTorch and by ONNX Runtime, and its ratio to that of steps that recompute nothing. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from export.command import positive, run
from export.compiler.compile import write_sharing
from export.compiler.weight_files import WeightFiles
from export.runtime.manifest import read_manifest
from export.runtime.programs import lower
from export.runtime.sampler import CachedSampler
from tc_lightning.diffusion.samplers import make_sampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.checkpoints import TeacherSpec, load_teacher
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.forecasts import KV_ORDER, MAX_ORDER
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import Segment, compute, partial, skip
from tc_lightning.rollout.evaluation import BATCH, final_latents
from tc_lightning.rollout.sampling import full_plan, given_for, model_signature, noise_for

SEED = 20260918  # of noise and conditions


class TokenRow(NamedTuple):
    """One line of the table: forecast order of residuals, what the steps between full ones do, and the error per image, [B]."""

    order: int
    what: str
    torch_B: Tensor
    onnx_B: Tensor


class TokenBench:
    """Plans of one teacher that differ in what the steps between full ones do.

    Args:
        model: the teacher.
        images: images that are measured on.
        steps: sampling steps, of DDIM.
        full: of these, the ones that compute everything, evenly spread.
        share: of the image's tokens, those that other steps recompute.

    Raises:
        TokenCacheError: if there are not at least 2 full steps, and fewer than steps.
    """

    def __init__(self, model: Network, images: int, steps: int, full: int, share: float) -> None:
        if not 2 <= full < steps:
            raise TokenCacheError(f"{full} of {steps} steps are to be full: choose 2 to {steps - 1}.")
        self.model, self.signature = model, model_signature(model)
        self.guidance = Guidance(1.5, self.signature.in_channels)
        self.sampler = make_sampler(model.schedule, "ddim", steps)
        self.full = {round(i * (steps - 1) / (full - 1)) for i in range(full)}
        self.keep = max(1, round(share * self.signature.image_tokens))
        self.x, self.given = noise_for(SEED, range(images), model), given_for(SEED, range(images), model)
        self._folder = tempfile.TemporaryDirectory(prefix="tc-tokens-")
        self._weights = WeightFiles(model, "fp32", Path(self._folder.name))

    def rows(self, orders: tuple[int, ...]) -> Iterator[TokenRow]:
        """All lines of the table."""
        end = self._torch(full_plan(self.signature, self.sampler, self.guidance))
        for order in orders:
            for what, plan in self.plans(order).items():
                apart = [(latents - end).square().flatten(1).mean(1) for latents in (self._torch(plan), self._onnx(plan))]
                yield TokenRow(order, what, *apart)

    def plans(self, order: int) -> dict[str, CachePlan]:
        """Those of one forecast order of residuals, by what they do; the first recomputes nothing."""
        depth = self.signature.depth
        found = {"nothing": self._plan((skip(0, depth, order),) * len(self.sampler))}
        for kv_order, word in {0: "repeated", KV_ORDER: f"of order {KV_ORDER}"}.items():
            drawn, names = random.Random(SEED), self.signature.block.names
            kept = [sorted(drawn.sample(range(self.signature.image_tokens), self.keep)) for _ in self.sampler.steps]
            steps = [partial(0, depth, self.signature.kept(tuple(tokens)), order, names, kv_order) for tokens in kept]
            found[f"tokens at random, K/V {word}"] = self._plan(tuple(steps))
        return found

    def _plan(self, between: tuple[Segment, ...]) -> CachePlan:
        everything = compute(0, self.signature.depth)
        steps = tuple((everything if i in self.full else segment,) for i, segment in enumerate(between))
        return CachePlan(self.signature, self.sampler, self.guidance, steps, self.sampler, {"policy": "benchmark"})

    def _torch(self, plan: CachePlan) -> Tensor:
        return final_latents(self.model, plan, self.x, self.given)

    def _onnx(self, plan: CachePlan) -> Tensor:
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            write_sharing(self._weights, plan, lower(plan, "cpu"), Path(folder))
            manifest = read_manifest(Path(folder), check_files=False)
            sampler = CachedSampler(Path(folder), "cpu", torch.get_num_threads(), BATCH, manifest=manifest)
            conditions = {name: value.numpy() for name, value in self.given.items()}
            return torch.from_numpy(sampler.sample(conditions=conditions, seed=SEED, pixels=False).latents)


def table(rows: list[TokenRow]) -> str:
    """Markdown; the ratio is to the line of the same order that recomputes nothing."""
    lines = ["| order | recomputed | PyTorch | ratio | ONNX Runtime | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        nothing = next(other for other in rows if other.order == row.order)
        cells = []
        for own, base in ((row.torch_B, nothing.torch_B), (row.onnx_B, nothing.onnx_B)):
            cells += [f"{float(own.mean()):.2e} ({float(own.median()):.2e})", f"{float(own.mean() / base.mean()):.2f}"]
        lines.append(f"| {row.order} | {row.what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="data/digits_dit.safetensors", help="the teacher")
    parser.add_argument("--images", type=positive, default=16, help="images that are measured on")
    parser.add_argument("--steps", type=positive, default=50, help="sampling steps")
    parser.add_argument("--full", type=positive, default=16, help="of these, the ones that compute everything")
    parser.add_argument("--share", type=float, default=0.25, help="of the tokens, those that are recomputed")
    parser.add_argument("--orders", type=int, nargs="+", default=[*range(MAX_ORDER + 1)], choices=range(MAX_ORDER + 1))
    args = parser.parse_args()
    if not 0.0 < args.share <= 1.0:
        raise TokenCacheError(f"--share is {args.share:g}: give a share above 0, and at most 1.")
    bench = TokenBench(load_teacher(TeacherSpec(args.weights)), args.images, args.steps, args.full, args.share)
    print(table(list(tqdm(bench.rows(tuple(args.orders)), "measuring", 3 * len(args.orders), unit="plan"))))


if __name__ == "__main__":
    run(main)
