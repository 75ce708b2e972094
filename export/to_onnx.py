"""Export a run's plan and teacher to an ONNX artefact.

    python export/to_onnx.py                                     the newest run under runs/, to artefacts/NAME
    python export/to_onnx.py --run runs/digits/version_3 --precision fp16
    python export/to_onnx.py --vae PIPELINE/vae                  with a decoder, of a teacher that is not a whole pipeline itself
    python export/to_onnx.py --sign key.pem                      signed by the owner of a private key (extra [sign])
    python export/to_onnx.py --explain --figure plan.png         print the programs of the plan, draw them, and export nothing

Exit status: 0 proved and written; 2 an error in what was given; 3 the artefact disagrees with torch, and nothing was written.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from export.command import positive, run
from export.compiler.compile import export_artefact
from export.compiler.explain import conditioning_in_words, explain, plan_figure
from export.runtime.decoder_contract import DATA, memory_bytes
from export.runtime.layout import DECODER
from export.runtime.programs import lower
from export.signature import require_private_key, sign_manifest
from export.torch_device import torch_device
from tc_lightning.models.checkpoints import load_teacher
from tc_lightning.models.checkpoints.pipeline import find_vae, read_vae
from tc_lightning.models.companions import companions_for
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import cache_bytes_per_image, full_step_macs, macs_speedup
from tc_lightning.runs.folder import find_run, read_run

FEW_IMAGES_ABOVE = 5e9  # MACs of a forward beyond which a proof on several images takes minutes on a CPU


def main() -> None:
    """Command line."""
    args = _arguments()
    run_info = read_run(args.run or find_run(Path("runs")))
    plan = CachePlan.load(args.plan or run_info.plan)
    print(f"run {run_info.folder}, teacher {run_info.teacher.weights}")
    if args.explain:
        lowered = lower(plan, args.provider)
        print(explain(plan, lowered, 4 if args.precision == "fp32" else 2))
        if args.figure is not None:
            plan_figure(plan, lowered, args.figure)
            print(f"wrote {args.figure}")
        return
    if args.sign is not None:
        require_private_key(args.sign)
    device = torch_device(args.provider)
    vae = None if args.no_pixels else read_vae(args.vae) if args.vae else find_vae(run_info.teacher)
    model = load_teacher(run_info.teacher).to(device)
    companions = companions_for(plan, *run_info.companions, model.config).to(device)
    out = args.out or Path("artefacts") / (run_info.name + ("" if args.precision == "fp32" else f"-{args.precision}"))
    images = args.images or (1 if full_step_macs(plan.model) > FEW_IMAGES_ABOVE else 4)
    cache = cache_bytes_per_image(plan, 4 if args.precision == "fp32" else 2)
    print(f"plan {plan.summary}: {macs_speedup(plan):.2f}x fewer MACs, cache {cache / 1e6:.2f} MB an image")
    manifest = export_artefact(model, plan, out, args.precision, args.provider, images, companions=companions, vae=vae)
    parity, fidelity = manifest["parity"], manifest["fidelity"]
    print(f"export error  {parity['trajectory_rel_l2']:.1e} relative L2 over whole trajectories, ONNX Runtime against torch")
    print(f"method error  {fidelity['psnr_db']:.1f} dB PSNR, cached against full compute")
    if vae is not None:
        print(_decoder_in_words(manifest, out))
    print(f"speed         {manifest['macs_speedup']:.2f}x in MACs, {fidelity['wall_speedup']:.2f}x on the clock ({args.provider})")
    print(f"conditioning  {conditioning_in_words(manifest)}")
    if args.sign is not None:
        print(f"signed        by the owner of the key {sign_manifest(out, args.sign)}")
    asked = "--labels 0 1 2 3" if len(plan.model.conditions) == 1 and plan.model.conditions[0].classes else "--conditions FILE"
    print(f"wrote {out}\nnext: python export/sample.py {out} {asked} --out grid.png --compare")


def _decoder_in_words(manifest: dict[str, Any], out: Path) -> str:
    """What the decoder's proof found, what it needs, and what the method's error is in pixels."""
    said, pixels = manifest[DECODER], manifest["fidelity"]["pixels"]
    memory = memory_bytes(said, (out / DATA).stat().st_size)
    similarity = "" if pixels["ssim"] is None else f", SSIM {pixels['ssim']:.4f}"
    return (
        f"pixels        {pixels['psnr_db']:.1f} dB PSNR{similarity}, cached against full compute, {pixels['images']} images; decoder "
        f"{said['parity']['rel_l2']:.1e} from torch, {memory / 1e6:.0f} MB for one image at a time"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder, as printed by `lightning fit` (default: the newest under runs/)")
    parser.add_argument("--plan", type=Path, help="plan to export instead of the run's own")
    parser.add_argument("--out", type=Path, help="artefact folder (default: artefacts/NAME OF THE RUN)")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="provider that the proof runs on")
    parser.add_argument("--images", type=positive, help="images in the proof (default: 4, or 1 for a large model)")
    decoder = parser.add_mutually_exclusive_group()
    decoder.add_argument("--vae", type=Path, help="folder of the AutoencoderKL that decodes the latents (default: the pipeline's own)")
    decoder.add_argument("--no-pixels", action="store_true", help="of a pipeline: leave its decoder out")
    parser.add_argument("--sign", type=Path, help="private key, PEM, to sign the manifest with: it says whose the artefact is")
    parser.add_argument("--explain", action="store_true", help="print the plan's programs and exit")
    parser.add_argument("--figure", type=Path, help="with --explain: draw the plan and its programs to this PNG file")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
