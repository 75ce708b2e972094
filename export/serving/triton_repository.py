"""A model repository of Triton: a model of the python backend for each artefact, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from export.folders import replacing_folder
from export.runtime.contract import read_artefact
from export.runtime.manifest import SIGNATURE
from export.serving.triton_config import Settings, config_of, served_name
from tc_lightning.errors import TokenCacheError

MARK = "tc-lightning.json"  # says that a repository is ours, and which models of it are
ARTEFACT, VERSION = "artefact", "1"
MODEL = '''"""Serves the artefact beside this file. Written by `python export/to_triton.py`: change nothing here, write it again."""

import os
import sys

sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # Triton's Python does not read it
try:
    from export.serving.triton_model import TritonPythonModel  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"this model needs {error.name}, which the Python that Triton runs does not find: install numpy and onnxruntime (or, for CUDA, "
        "onnxruntime-gpu), and tc-lightning with `pip install --no-deps -e .` in its checkout, or name the checkout in PYTHONPATH."
    ) from error
'''


def write_repository(artefacts: Sequence[Path], out: Path, settings: Settings, copy: bool = False) -> dict[str, Path]:
    """Write a model repository, in place of an older one of ours.

    Args:
        artefacts: their folders; each is checked, and becomes a model with the name of its folder.
        out: the repository.
        settings: how they are to be served.
        copy: copy artefacts into the repository; else it links to them, and they must stay where they are.

    Returns:
        The artefact of each model by its name.

    Raises:
        TokenCacheError: if there is no artefact, two have one name, one cannot be used, or `out` is not to be replaced.
    """
    named = _named(artefacts)
    _require_ours(out, list(named.values()))
    manifests = {name: read_artefact(path, ort.__version__) for name, path in named.items()}
    with replacing_folder(out) as folder:
        for name, path in named.items():
            version = folder / name / VERSION
            version.mkdir(parents=True)
            (folder / name / "config.pbtxt").write_text(config_of(name, manifests[name], settings), encoding="utf-8")
            (version / "model.py").write_text(MODEL, encoding="utf-8")
            if copy:
                _copy(path, manifests[name]["files"], version / ARTEFACT)
            else:
                (version / ARTEFACT).symlink_to(path.resolve(), target_is_directory=True)
        (folder / MARK).write_text(json.dumps({"models": sorted(named)}, indent=1) + "\n", encoding="utf-8")
    return named


def _named(artefacts: Sequence[Path]) -> dict[str, Path]:
    if not artefacts:
        raise TokenCacheError("no artefact was given: name the folder of one, as written by `python export/to_onnx.py`.")
    named: dict[str, Path] = {}
    for path in artefacts:
        name = served_name(path)
        if name in named:
            raise TokenCacheError(
                f"{named[name]} and {path} would both be the model {name}: rename one of the folders, or link to it under another name."
            )
        named[name] = path
    return named


def _copy(artefact: Path, files: Sequence[str], to: Path) -> None:
    """What the manifest lists, its signature if there is one, and the manifest, which is what makes it an artefact, last."""
    to.mkdir()
    if (artefact / SIGNATURE).is_file():
        shutil.copyfile(artefact / SIGNATURE, to / SIGNATURE)
    for name in (*files, "manifest.json"):
        shutil.copyfile(artefact / name, to / name)


def _require_ours(out: Path, artefacts: Sequence[Path]) -> None:
    """Refuse to replace what was not written here, or to write where an artefact is."""
    for artefact in artefacts:
        place, target = artefact.resolve(), out.resolve()
        if target == place or target in place.parents or place in target.parents:
            raise TokenCacheError(
                f"the repository {out} and the artefact {artefact} lie one in the other: the one is replaced whole, and nothing may be "
                "added to the other. Name another folder with --out."
            )
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MARK).is_file()):
        raise TokenCacheError(
            f"{out} exists and is no model repository that was written here: nothing in it is touched. Name another folder with --out."
        )
    strangers = sorted({path.name for path in out.iterdir()} - _models(out) - {MARK})
    if strangers:
        raise TokenCacheError(
            f"{out} holds {', '.join(strangers)}, which was not written here and would be lost: take it out, or name another folder "
            "with --out."
        )


def _models(out: Path) -> set[str]:
    """The models that a repository of ours says that it has."""
    if not (out / MARK).is_file():
        return set()
    try:
        return set(json.loads((out / MARK).read_text(encoding="utf-8"))["models"])
    except (ValueError, KeyError, TypeError) as error:
        raise TokenCacheError(
            f"{out / MARK} is damaged, so that nothing says what of {out} may be replaced: remove the folder."
        ) from error
