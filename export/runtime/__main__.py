"""Says what an artefact is, once all its files have proved whole; or runs it.

python -m export.runtime artefacts/digits
python -m export.runtime artefacts/digits --labels 1 2 --seed 7 --out latents.npy --receipt receipt.json
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from export.command import run
from export.runtime.contract import read_artefact
from export.runtime.outputs import require_writable
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.atomic import write_atomically
from tc_lightning.plan.rows_file import read_rows
from tc_lightning.plan.signature import PIXELS


def main() -> None:
    """Command line."""
    args = _arguments()
    files = {"--out": args.out, "--images": args.images, "--receipt": args.receipt}
    require_writable(files, args.artefact)
    if args.labels is None and args.conditions is None:
        _tell(read_artefact(args.artefact, ort.__version__), args.artefact)
        return
    sampler = CachedSampler(args.artefact, args.provider, threads=args.threads, device=args.device)
    if args.images is not None and sampler.decoder is None and sampler.manifest["model"]["output"] != PIXELS:
        raise TokenCacheError(f"the artefact {args.artefact} makes latents and has no decoder: leave out --images.")
    _tell(sampler.manifest, args.artefact)
    result = sampler.sample(args.labels, args.seed, args.guidance, **_given(sampler, args))
    write_atomically(args.out, _npy(result.latents))
    if args.images is not None and result.images is not None:
        write_atomically(args.images, _npy(result.images))
    if args.receipt is not None:
        write_atomically(args.receipt, (json.dumps(result.receipt, indent=1) + "\n").encode())
    print(f"wrote {' and '.join(str(path) for path in files.values() if path)} in {result.receipt['ms'] / 1e3:.2f} s of sampling")


def _tell(manifest: dict[str, Any], folder: Path) -> None:
    """What an artefact is, which has been verified."""
    brings = ", ".join(condition["name"] for condition in manifest["model"]["conditions"])
    print(f"{folder}: {len(manifest['files'])} files are whole, and agree with the plan {manifest['plan_digest']}")
    print(f"{manifest['plan_summary']}, {manifest['precision']}; an image is asked for by {brings}")


def _given(sampler: CachedSampler, args: argparse.Namespace) -> dict[str, Any]:
    """Conditions of the images from a file, and its null values, which only a guided run has a use for."""
    if args.conditions is None:
        return {}
    rows = read_rows(args.conditions, sampler.conditions)
    scale = sampler.manifest["guidance"]["scale"] if args.guidance is None else args.guidance
    return {"conditions": rows.examples, "negative": rows.nulls if rows.nulls and scale != 1.0 else None}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artefact", type=Path, help="artefact folder")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--labels", type=int, nargs="+", help="one class for each image")
    asked.add_argument("--conditions", type=Path, help="a .npz file with a row of each condition for each image, and null.NAME rows")
    parser.add_argument("--out", type=Path, help="latents, [images, C, H, W] float32 as .npy (default: latents.npy)")
    parser.add_argument("--images", type=Path, help="pixels in [-1, 1] as .npy, of a model that makes some")
    parser.add_argument("--receipt", type=Path, help="JSON to write: what ran, where, how long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the plan's)")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU, with --provider cuda")
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: ONNX Runtime's choice)")
    args = parser.parse_args()
    if args.labels is None and args.conditions is None:
        if args.out or args.images or args.receipt:
            parser.error("--out, --images and --receipt are for images: ask for some with --labels or --conditions")
    elif args.out is None:
        args.out = Path("latents.npy")
    return args


if __name__ == "__main__":
    run(main)
