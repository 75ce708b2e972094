"""Make many images with an artefact, in shards: on every core or GPU of this machine, or of a Ray cluster.

    python export/generate.py artefacts/digits --images 50000 --out images
    python export/generate.py artefacts/dit --images 50000 --out images --provider cuda --address auto --npz images.npz
    python export/generate.py artefacts/pixart --images 1000 --out images --conditions conditions.npz

Image i depends on the seed, i, its conditions and the guidance scale alone, not on how many workers make it. Started again, the same
command goes on where it was: shards that are whole are kept. Read them with `datasets.load_dataset("parquet", data_dir="images")`.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from tqdm import tqdm

from export.command import positive, run
from export.generation.engine import lines_of, require_workers
from export.generation.job import IMAGE, LATENT, Job, completed
from export.generation.labels import BALANCED, DRAWN
from export.generation.ledger import Ledger
from export.generation.npz import require_npz, write_npz
from tc_lightning.errors import TokenCacheError


def main() -> None:
    """Command line."""
    args = _arguments()
    require_workers(args.workers, args.provider, args.address)
    job = completed(_job(args))
    if args.npz is not None:
        require_npz(job, args.npz)
    with Ledger(job) as ledger:
        if ledger.images:
            print(f"{ledger.images} images are there already; {len(ledger.missing)} shards of {job.shards} are to be made")
        if ledger.missing:
            _make(job, ledger, args.workers, args.address)
        failed = sum(line["failed"] for line in ledger.whole.values())
        print(
            f"{job.images} images in {job.shards} shards in {args.out}" + (f"; {failed} have no image (column failed)" * bool(failed))
        )
        if args.npz is not None:
            with tqdm(total=job.images, desc=args.npz.name, unit="image") as bar:
                write_npz(job, args.npz, bar.update)
            print(f"wrote {args.npz}")


def _make(job: Job, ledger: Ledger, workers: int | None, address: str | None) -> None:
    with (
        tqdm(total=job.images, initial=ledger.images, desc="generating", unit="image") as bar,
        contextlib.closing(lines_of(job, ledger.missing, workers, address)) as lines,
    ):
        for line in lines:
            ledger.record(line)
            bar.update(line["rows"])
    if ledger.missing:
        raise TokenCacheError(
            f"{len(ledger.missing)} shards were not made, the first is {ledger.missing[0]}: run the same command again."
        )


def _job(args: argparse.Namespace) -> Job:
    """What was asked for; folders as they are named on every machine."""
    labels = tuple(int(label) if label.lstrip("-").isdigit() else label for label in args.labels)
    return Job(
        artefact=str(args.artefact.absolute()),
        out=str(args.out.absolute()),
        images=args.images,
        shard=args.shard,
        batch=min(args.batch, args.shard),
        seed=args.seed,
        labels=labels,
        conditions=None if args.conditions is None else str(args.conditions.absolute()),
        guidance=args.guidance,
        full=args.full,
        keep=tuple(name for name in (IMAGE, LATENT) if name in (args.keep or ())),
        provider=args.provider,
    )


def seed(text: str) -> int:
    """Argument type: a seed."""
    if not 0 <= (value := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2**63 - 1")
    return value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path, help="artefact folder, as written by export/to_onnx.py")
    parser.add_argument("--images", type=positive, required=True, help="how many there are to be, those of earlier calls counted")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the Parquet shards; one that all machines of a cluster share"
    )
    parser.add_argument(
        "--npz", type=Path, help="write all images to this file as well, arr_0 [N, H, W, 3] uint8, for evaluators of FID"
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        default=[BALANCED],
        help=f"`{BALANCED}`: the classes in turn; `{DRAWN}`: at random; or classes to take in turn",
    )
    parser.add_argument("--conditions", type=Path, help="a .npz file with rows of each condition, taken in turn, and null.NAME rows")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the plan's)")
    parser.add_argument("--full", action="store_true", help="compute everything at every step: the run that the plan is compared with")
    parser.add_argument(
        "--keep", nargs="+", choices=(IMAGE, LATENT), help="what to store (default: images, or latents without a decoder)"
    )
    parser.add_argument(
        "--shard", type=positive, default=500, help="images in a shard: what is lost at most, a worker, if it is stopped"
    )
    parser.add_argument("--batch", type=positive, default=16, help="images computed at a time")
    parser.add_argument("--workers", type=positive, help="processes (default: one a core, or one a GPU)")
    parser.add_argument("--address", help="a Ray cluster that runs, `auto` or HOST:PORT (default: this machine alone)")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
