"""Run the Triton server of the nvidia-pytriton package on a model repository that `python export/to_triton.py` wrote.

    python export/triton_server.py model_repository
    python export/triton_server.py model_repository --port 9000 --address 0.0.0.0 --log-verbose=1

It listens on this machine alone unless told otherwise. Options that are not ours are tritonserver's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from export.command import run
from export.serving.triton_server import Ports, serve


def main() -> None:
    """Command line."""
    args, more = _arguments()
    raise SystemExit(serve(args.repository, Ports(args.address, args.port, args.metrics_port, args.grpc_port), more))


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    ports = Ports()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("repository", type=Path, help="model repository")
    parser.add_argument("--address", default=ports.address, help="address to listen on")
    parser.add_argument("--port", type=int, default=ports.http, help="port of HTTP")
    parser.add_argument("--metrics-port", type=int, default=ports.metrics, help="port of metrics")
    parser.add_argument("--grpc-port", type=int, help="port of gRPC (default: none)")
    return parser.parse_known_args()


if __name__ == "__main__":
    run(main)
