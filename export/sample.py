"""Make images with an artefact.

python export/sample.py artefacts/digits --labels 0 1 2 3 --out grid.png --receipt receipt.json --compare
python export/sample.py artefacts/pixart --conditions conditions.npz --images out
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export.command import run
from export.grid import difference_pixels, replacing, save_grid, save_images, to_pixels
from export.runtime.outputs import require_writable
from export.runtime.sampler import CachedSampler, Result
from tc_lightning.errors import TokenCacheError
from tc_lightning.measure.psnr import PIXEL_RANGE, psnr, psnr_db, squared_errors
from tc_lightning.plan.given import Arrays
from tc_lightning.plan.rows_file import read_rows

GAIN = 10.0  # of the difference row


def main() -> None:
    """Command line."""
    args = _arguments()
    _check_outputs(args)
    sampler = CachedSampler(args.artefact, provider=args.provider, device=args.device)
    cache = sampler.manifest["cache_bytes_per_image"]
    print(f"{sampler.manifest['plan_summary']}, {sampler.manifest['precision']}: {cache / 1e6:.2f} MB of cache an image")
    cached = _sample(sampler, args, full=False)
    made = {"cached": to_pixels(_seen(cached))}
    rows, receipt = dict(made), cached.receipt
    if args.compare:
        full = _sample(sampler, args, full=True)
        made |= {"full": to_pixels(_seen(full))}
        rows |= made | {f"diff x{GAIN:g}": difference_pixels(_seen(cached), _seen(full), GAIN)}
        receipt |= {
            "compare": _compared(cached, full, sampler.decoder is not None, sampler.manifest["model"]["output"])
            | {"full": full.receipt}
        }
        print(f"{_in_words(receipt['compare'])}, cached against full compute (python export/verify.py measures the speed)")
    save_grid(rows, args.out)
    if args.images is not None:
        save_images(made, args.images)
    if args.receipt is not None:
        with replacing(args.receipt) as temporary:
            temporary.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {' and '.join(str(path) for path in (args.out, args.images, args.receipt) if path)}")


def _seen(result: Result) -> np.ndarray:
    """Pixels where there are any, else latents, of which the first three channels are shown."""
    return result.latents if result.images is None else result.images


def _compared(cached: Result, full: Result, decoded: bool, output: str) -> dict[str, Any]:
    """PSNR of what the model made, and of decoded pixels."""
    found = {"psnr_db": psnr(cached.latents, full.latents, output)}
    if decoded and cached.images is not None and full.images is not None:
        found["psnr_pixels_db"] = psnr_db(squared_errors(cached.images, full.images), PIXEL_RANGE)
    return found


def _in_words(compared: dict[str, Any]) -> str:
    told, pixels = f"PSNR {compared['psnr_db']:.1f} dB", compared.get("psnr_pixels_db")
    return told if pixels is None else f"{told} in latents, {pixels:.1f} dB in pixels"


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse before sampling what could not be written after it."""
    if args.images is not None:
        _check_folder(args.images.resolve(), args.artefact.resolve())
    require_writable({"--out": args.out, "--receipt": args.receipt}, args.artefact)


def _check_folder(folder: Path, artefact: Path) -> None:
    if not folder.parent.is_dir() or (folder.exists() and not folder.is_dir()):
        raise TokenCacheError(
            f"cannot write images into {folder}: it is no folder, or the one that it is to be made in does not exist."
        )
    if artefact in (folder, *folder.parents):
        raise TokenCacheError(f"cannot write images into {folder}: nothing may be added to an artefact. Name a folder outside it.")


def _sample(sampler: CachedSampler, args: argparse.Namespace, full: bool) -> Result:
    rows, negative = _rows(sampler, args)
    images = len(args.labels) if rows is None else len(next(iter(rows.values())))
    steps = -(-images // sampler.max_batch) * sampler.manifest["full_steps" if full else "steps"]
    with tqdm(total=steps, desc="full" if full else "cached", unit="step") as bar:

        def on_step(done: int, _: int) -> None:
            bar.update(done - bar.n)

        return sampler.sample(args.labels, args.seed, args.guidance, full=full, on_step=on_step, conditions=rows, negative=negative)


def _rows(sampler: CachedSampler, args: argparse.Namespace) -> tuple[Arrays | None, Arrays | None]:
    """Conditions of the images from a file, and its null values, which only a guided run has a use for."""
    if args.conditions is None:
        return None, None
    rows = read_rows(args.conditions, sampler.conditions)
    scale = sampler.manifest["guidance"]["scale"] if args.guidance is None else args.guidance
    return rows.examples, rows.nulls if rows.nulls and scale != 1.0 else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path, help="artefact folder, as written by export/to_onnx.py")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--labels", type=int, nargs="+", help="one class for each image")
    asked.add_argument("--conditions", type=Path, help="a .npz file with a row of each condition for each image, and null.NAME rows")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="PNG to write")
    parser.add_argument("--images", type=Path, help="folder for a PNG of each image as well, in the size that it was made")
    parser.add_argument("--receipt", type=Path, help="JSON to write: what ran, where, how long")
    parser.add_argument("--compare", action="store_true", help="add a full-compute row and the difference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the plan's)")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU, with --provider cuda")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
