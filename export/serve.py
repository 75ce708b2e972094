"""Serve an artefact over HTTP with LitServe, and a page to try it in a browser.

    python export/serve.py artefacts/digits
    curl -d '{"label": 3, "seed": 7}' http://127.0.0.1:8000/predict --output three.png

POST /predict gives a PNG or NPY with the receipt in the header x-receipt, or JSON with all of them; POST /events the same as
server-sent events, with every step; /health and /metrics tell what runs, and what ran.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export.command import EXIT_ERROR, positive, run

try:
    from export.serving.app import Served, serve
except ModuleNotFoundError as missing:
    if missing.name != "litserve":
        raise
    print("error: serving needs LitServe, which is not installed: `pip install -e '.[serve]'`.", file=sys.stderr)
    raise SystemExit(EXIT_ERROR) from missing

HOSTS = ("127.0.0.1", "0.0.0.0", "::")  # LitServe knows no others


def main() -> None:
    """Command line."""
    args = _arguments()
    runtime = {"provider": args.provider, "device": args.device, "threads": args.threads, "max_bytes": args.max_bytes}
    serve(
        Served(
            args.artefact,
            args.host,
            args.port,
            args.max_batch,
            args.batch_timeout / 1e3,
            args.queue,
            args.timeout,
            args.max_body,
            args.conditions,
            runtime,
        )
    )


def _port(text: str) -> int:
    if not 1024 <= (value := int(text)) <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is not between 1024 and 65535")
    return value


def _milliseconds(text: str) -> float:
    if not 0 <= (value := float(text)) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 10000")
    return value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path, help="artefact folder, as written by export/to_onnx.py")
    parser.add_argument("--host", choices=HOSTS, default=HOSTS[0], help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=_port, default=8000)
    parser.add_argument("--max-batch", type=positive, default=8, help="rows of several requests computed together, at most")
    parser.add_argument("--batch-timeout", type=_milliseconds, default=5.0, help="ms that the first row of a batch waits for others")
    parser.add_argument("--queue", type=positive, default=64, help="requests that may wait or run; others are told to try again")
    parser.add_argument("--timeout", type=positive, default=600, help="seconds that a request may wait before it runs")
    parser.add_argument("--max-body", type=positive, help="bytes of a request (default: what the artefact's conditions need)")
    parser.add_argument("--max-bytes", type=positive, help="bytes that the buffers of a batch may take: it is split further")
    parser.add_argument("--conditions", type=Path, help="a .npz file of rows that requests and the page may name by number")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU, with --provider cuda")
    parser.add_argument("--threads", type=positive, help="threads on the CPU (default: as ONNX Runtime chooses)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
