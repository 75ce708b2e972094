"""Encode prompts once, with the text encoders of a pipeline's folder, to a file of conditions.

    python export/encode.py PIPELINE --prompts prompts.txt --out conditions.npz

Each line of prompts.txt is a prompt; empty lines are passed over. The file holds a row of every condition for each prompt, in their
order, and as null.NAME one row of the negative prompt, which guidance leads away from: the empty one, or --negative's. Needs
transformers: `pip install -e '.[text]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from export.command import positive, run
from export.encoding.encoders import Work
from export.encoding.pipelines import PROMPTED, Encoded, Source, encode
from export.grid import replacing
from export.torch_device import torch_device
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.checkpoints.diffusers_config import read_config
from tc_lightning.models.checkpoints.pipeline import INDEX
from tc_lightning.plan.nulls import PREFIX

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN = 60  # characters of a prompt in a message


def main() -> None:
    """Command line."""
    args = _arguments()
    _check_output(args.out)
    prompts = read_prompts(args.prompts)
    if not (args.pipeline / INDEX).is_file():
        raise TokenCacheError(f"{args.pipeline} holds no {INDEX}: the folder of a whole pipeline of diffusers was expected.")
    source = Source(args.pipeline, read_config(args.pipeline / INDEX), args.tokens, args.no_t5)
    device = torch_device(args.provider, args.device)
    # The negative prompt is one row more, so that each encoder is read once.
    found = encode(source, Work([*prompts, args.negative], args.batch, PRECISIONS[args.precision], device))
    for place, tokens in sorted(found.cut.items()):
        print(f"cut to {tokens} tokens, as the pipeline does: {_shown([*prompts, args.negative][place])}")
    write(args.out, found)
    sizes = ", ".join(f"{name} {list(rows.shape[1:])}" for name, rows in found.rows.items())
    print(f"wrote {args.out}: {len(prompts)} prompts ({sizes}), and the null value")


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, but for empty ones.

    Raises:
        TokenCacheError: if it cannot be read, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenCacheError(f"cannot read the prompts {path} ({error}): a text file in UTF-8 was expected.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise TokenCacheError(f"{path} holds no prompt: write one in each line.")
    return prompts


def write(path: Path, encoded: Encoded) -> None:
    """Write the conditions of all prompts but the last, and those of the last as null values, where a prompt acts on them."""
    rows = {name: values[:-1] for name, values in encoded.rows.items()}
    nulls = {PREFIX + name: values[-1:] for name, values in encoded.rows.items() if name in PROMPTED}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **rows, **nulls)  # type: ignore[arg-type]


def _check_output(path: Path) -> None:
    """Refuse before encoding what could not be written after it."""
    if path.suffix != ".npz":
        raise TokenCacheError(f"cannot write {path}: name a file that ends in .npz.")
    if not path.parent.is_dir():
        raise TokenCacheError(f"cannot write {path}: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise TokenCacheError(f"cannot write {path}: it is a folder. Name a file in it.")


def _shown(prompt: str) -> str:
    return prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]} ..."


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pipeline", type=Path, help="folder of a pipeline of diffusers (PixArt-alpha, PixArt-Sigma, Stable Diffusion 3)"
    )
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt in each line")
    parser.add_argument("--out", type=Path, default=Path("conditions.npz"), help=".npz to write")
    parser.add_argument("--negative", default="", help="prompt that guidance leads away from (default: the empty one)")
    parser.add_argument("--tokens", type=positive, help="tokens of a prompt for T5 (default: the pipeline's 120, 300 or 256)")
    parser.add_argument("--no-t5", action="store_true", help="of Stable Diffusion 3: leave T5 out, zeros in its place")
    parser.add_argument("--batch", type=positive, default=8, help="prompts at a time")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the encoders")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU, with --provider cuda")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
