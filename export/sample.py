"""Make images with an artefact.

python export/sample.py artefacts/digits --labels 0 1 2 3 --out grid.png --receipt receipt.json --compare
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from export.command import run
from export.grid import difference_pixels, replacing, save_grid, to_pixels
from export.runtime.sampler import CachedSampler, Result
from tc_lightning.errors import TokenCacheError
from tc_lightning.measure.psnr import psnr

GAIN = 10.0  # of the difference row


def main() -> None:
    """Command line."""
    args = _arguments()
    _check_outputs(args)
    sampler = CachedSampler(args.artefact, provider=args.provider, device=args.device)
    cache = sampler.manifest["cache_bytes_per_image"]
    print(f"{sampler.manifest['plan_summary']}, {sampler.manifest['precision']}: {cache / 1e6:.2f} MB of cache an image")
    cached = _sample(sampler, args, full=False)
    rows = {"cached": to_pixels(cached.latents)}
    receipt = cached.receipt
    if args.compare:
        full = _sample(sampler, args, full=True)
        rows |= {"full": to_pixels(full.latents), f"diff x{GAIN:g}": difference_pixels(cached.latents, full.latents, GAIN)}
        receipt |= {"compare": {"psnr_db": psnr(cached.latents, full.latents), "full": full.receipt}}
        print(f"PSNR {receipt['compare']['psnr_db']:.1f} dB, cached against full compute (python export/verify.py measures the speed)")
    save_grid(rows, args.out)
    if args.receipt is not None:
        with replacing(args.receipt) as temporary:
            temporary.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out}" + (f" and {args.receipt}" if args.receipt else ""))


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse before sampling what could not be written after it."""
    paths = [path.resolve() for path in (args.out, args.receipt) if path is not None]
    for path in paths:
        if not path.parent.is_dir():
            raise TokenCacheError(f"cannot write {path}: the folder {path.parent} does not exist.")
        if path.is_dir():
            raise TokenCacheError(f"cannot write {path}: it is a folder. Name a file in it.")
        if path.parent == args.artefact.resolve():
            raise TokenCacheError(f"cannot write {path}: nothing may be added to an artefact. Name a file outside it.")
    if len(set(paths)) < len(paths):
        raise TokenCacheError(f"--out and --receipt are both {paths[0]}: name two files.")


def _sample(sampler: CachedSampler, args: argparse.Namespace, full: bool) -> Result:
    parts = -(-len(args.labels) // sampler.max_batch)
    with tqdm(total=parts * sampler.manifest["full_steps" if full else "steps"], desc="full" if full else "cached", unit="step") as bar:
        return sampler.sample(args.labels, args.seed, args.guidance, full=full, on_step=lambda done, _: bar.update(done - bar.n))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path, help="artefact folder, as written by export/to_onnx.py")
    parser.add_argument("--labels", type=int, nargs="+", required=True, help="one class for each image")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="PNG to write")
    parser.add_argument("--receipt", type=Path, help="JSON to write: what ran, where, how long")
    parser.add_argument("--compare", action="store_true", help="add a full-compute row and the difference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the plan's)")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU, with --provider cuda")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
