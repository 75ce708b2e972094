"""Does a sampler bear long use? Many requests of changing sizes from several threads: memory stays flat, and images the same.

    python export/soak.py artefacts/digits --requests 10000 --threads 2

Exit status: 0 it does, 2 something given is wrong, 3 memory grew by more than 2 % from a tenth of the requests to the end, or an image
was not what it was at first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from tqdm import tqdm

from export.bench.soak import require_flat, soak
from export.command import positive, run
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError


def main() -> None:
    """Command line."""
    args = _arguments()
    if args.requests < 10:
        raise TokenCacheError(f"{args.requests} requests are too few to tell: give 10 or more.")
    sampler = CachedSampler(args.artefact, threads=1, max_batch=args.batch)
    marks = sorted({args.requests // 10, args.requests // 2, args.requests})
    with tqdm(total=args.requests, desc="requests", unit="request", disable=args.json) as bar:
        found = soak(sampler, marks, args.threads, args.most, args.seed, bar.update)
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        print(f"{found.requests} requests, {found.images} images, {args.threads} threads")
        print("\n".join(f"  {megabytes:8.1f} MB resident after {mark}" for mark, megabytes in found.resident_mb.items()))
    require_flat(found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path, help="artefact folder of a class-conditional model")
    parser.add_argument("--requests", type=positive, default=10_000)
    parser.add_argument("--threads", type=positive, default=2, help="threads that make requests at the same time")
    parser.add_argument("--most", type=positive, default=6, help="images in the largest request")
    parser.add_argument("--batch", type=positive, default=4, help="images computed at a time: larger requests are split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else on standard output")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
