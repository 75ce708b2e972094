"""Write a model repository for Triton Inference Server: a model of its python backend for each artefact.

    python export/to_triton.py artefacts/digits --out model_repository
    python export/to_triton.py artefacts/a artefacts/b --out model_repository --provider cuda --copy

Needs numpy and onnxruntime alone, as the server's Python does. `python export/triton_server.py model_repository` runs the server of
the nvidia-pytriton package; NVIDIA's container takes the same folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from export.command import positive, run
from export.serving.triton_config import CPU, PROVIDERS, Settings
from export.serving.triton_repository import write_repository


def main() -> None:
    """Command line."""
    args = _arguments()
    settings = Settings(args.provider, args.max_batch, not args.no_batching, args.delay_ms, args.queue, args.threads)
    named = write_repository(args.artefacts, args.out, settings, args.copy)
    for name, path in named.items():
        print(f"model {name}: {'a copy of' if args.copy else 'links to'} {path}")
    print(f"wrote {args.out}\nnext: python export/triton_server.py {args.out}")


def _arguments() -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefacts", type=Path, nargs="+", metavar="ARTEFACT", help="artefact folder, whose name is the model's")
    parser.add_argument("--out", type=Path, default=Path("model_repository"), help="repository; an older one of ours is replaced")
    parser.add_argument("--copy", action="store_true", help="copy artefacts into it, instead of linking to them")
    parser.add_argument(
        "--provider",
        choices=PROVIDERS,
        default=CPU,
        help="either: CUDA where Triton has a GPU, else the CPU. With cuda and no GPU the model is not ready",
    )
    parser.add_argument("--max-batch", type=positive, default=defaults.max_batch, help="rows computed at a time")
    parser.add_argument("--no-batching", action="store_true", help="never compute rows of several requests together")
    parser.add_argument("--delay-ms", type=float, default=defaults.delay_ms, help="how long a request waits for others to join")
    parser.add_argument("--queue", type=positive, default=defaults.queue, help="requests that may wait; more are refused at once")
    parser.add_argument("--threads", type=positive, help="threads of an instance on the CPU (default: ONNX Runtime's choice)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
