"""Does this machine do what the README says? One command finds out, stage by stage, and keeps to the time that it is given.

    python export/acceptance.py --provider cuda --minutes 8 --out acceptance     on a GPU
    python export/acceptance.py --provider cpu --out rehearsal                   a rehearsal on small shapes, in a minute or two
    python export/acceptance.py --provider cuda --stages 1 3 --out acceptance    some stages alone
    python export/acceptance.py --out acceptance --render                        the tables of a run, as Markdown
    python export/acceptance.py --out acceptance --render export/BENCHMARKS.md   the same, put between the marks of a file

Every stage is a process of its own with a time limit, so that one that crashes or hangs takes no other with it. What it finds is in
OUT/acceptance.jsonl, a line at a time, as soon as it is known; what it printed is in OUT/NUMBER_NAME.log. Nothing is downloaded.

Exit status: 0 all held; 2 something given is wrong; 3 something fell short, or could not be tried; 4 time ran out first.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from export.bench.acceptance.benchmark_table import insert, markdown
from export.bench.acceptance.driver import Driver
from export.bench.acceptance.journal import Journal
from export.bench.acceptance.outcome import exit_code, summary
from export.bench.acceptance.stages import STAGES
from export.bench.acceptance.worker import PLANTS
from export.command import run

PRINTED = "-"


def main() -> None:
    """Command line."""
    args = _arguments()
    if args.render is None:
        stages = [stage for stage in STAGES if stage.number in args.stages]
        Driver(args.out, args.provider, args.minutes, stages, dict(args.plant)).run()
    record = Journal(args.out).read()
    if args.render is None:
        print(f"\n{summary(record)}\nwrote {Journal(args.out).path}")
        sys.exit(exit_code(record))
    if args.render == PRINTED:
        print(markdown(record), end="")
    else:
        insert(Path(args.render), markdown(record))
        print(f"wrote {args.render}")


def _minutes(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time: give minutes above 0")
    return value


def _plant(text: str) -> tuple[int, str]:
    number, _, kind = text.partition("=")
    if kind not in PLANTS:
        raise argparse.ArgumentTypeError(f"{text} is not STAGE=KIND, with one of {', '.join(PLANTS)}")
    return int(number), kind


def _arguments() -> argparse.Namespace:
    numbers = [stage.number for stage in STAGES]
    listing = "\n".join(f"  {stage.number} {stage.name:<14}{stage.title}" for stage in STAGES)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"stages:\n{listing}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="cpu is a rehearsal on small shapes")
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="for all stages together; each gets its share of what is left")
    parser.add_argument("--out", type=Path, default=Path("acceptance"), help="folder of the record; one that is there is begun anew")
    parser.add_argument("--stages", type=int, nargs="+", choices=numbers, default=numbers, metavar="STAGE", help="numbers, see below")
    parser.add_argument(
        "--render",
        nargs="?",
        const=PRINTED,
        metavar="FILE",
        help="run nothing: print the record in --out as Markdown, or put it in FILE",
    )
    # For the tests: STAGE=raise, hang or kill makes a stage fail so, and the others must not notice.
    parser.add_argument("--plant", type=_plant, nargs="+", default=[], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
