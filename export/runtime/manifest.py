"""The manifest of an artefact: what it is, what was measured, and the sha256 of every file. Standard library only.

It is written last, and only if parity held: a folder without a valid manifest is not an artefact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.atomic import write_atomically

FORMAT_VERSION = 7  # 5: how many terms the condition graph writes; 6: conditions, any family; 7: constants of a request
NAME, WEIGHTS, PLAN, NULLS = "manifest.json", "weights.data", "plan.json", "nulls.npz"
SIGNATURE = f"{NAME}.sig"  # beside it, where somebody signed it
AGAIN = "Export it again with `python export/to_onnx.py`."
_KEYS = (
    "format_version",
    "files",
    "needs",
    "plan_digest",
    "plan_summary",
    "teacher",
    "model",
    "network",
    "guidance",
    "steps",
    "full_steps",
    "full_offset",
    "schedule",
    "programs",
    "entries",
    "condition",
    "condition_values",
    "modulations",
    "constants",
    "weights",
    "precision",
    "macs_speedup",
    "cache_bytes_per_image",
)


class ArtefactError(TokenCacheError):
    """An artefact is missing, incomplete, damaged, or of another format version."""


def sha256_of(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def write_manifest(folder: Path, content: dict[str, Any], known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Hash every file of the folder and write the manifest, atomically.

    Args:
        folder: the artefact's.
        content: what the manifest says beside its files.
        known: `listing_of` files that are not to be hashed once more.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != NAME)
    listing = {path.name: (known or {}).get(path.name) or listing_of(path) for path in files}
    complete = {"format_version": FORMAT_VERSION, **content, "files": listing}
    write_atomically(folder / NAME, json.dumps({**complete, "sha256": _self_digest(complete)}, indent=1).encode())


def _self_digest(content: dict[str, Any]) -> str:
    """sha256 of the manifest's own contents, as canonical JSON: the schedule and the figures are not to be edited either."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path, check_files: bool = True) -> dict[str, Any]:
    """Read a manifest and, unless told not to, re-hash every file that it lists.

    What it says is only what it must be if `export.runtime.contract` finds so.

    Raises:
        ArtefactError: if there is no manifest, it is of another version, lists its files wrongly, or a file is missing, truncated or
            changed.
    """
    path = folder / NAME
    if not path.is_file():
        what = "holds no manifest.json: it is not an artefact, or its export did not finish" if folder.is_dir() else "does not exist"
        raise ArtefactError(f"the artefact {folder} {what}. {AGAIN}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is not valid JSON ({error}). {AGAIN}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise ArtefactError(
            f"{path} is of format version {version}, which is newer than this package's {FORMAT_VERSION}: update tc-lightning here."
        )
    if not isinstance(manifest, dict) or type(version) is not int or version != FORMAT_VERSION:
        raise ArtefactError(f"{path} is not of format version {FORMAT_VERSION}. {AGAIN}")
    stated = manifest.pop("sha256", None)
    if stated != _self_digest(manifest):
        raise ArtefactError(f"{path} was edited or damaged: its contents do not match its own sha256. {AGAIN}")
    if missing := [key for key in _KEYS if key not in manifest]:
        raise ArtefactError(f"{path} lacks {', '.join(missing)}. {AGAIN}")
    _check_listing(path, manifest)
    if check_files:
        require_files(folder, manifest)
    return manifest


def require_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Re-hash every file that a manifest lists.

    Raises:
        ArtefactError: if a file is missing, truncated or changed.
    """
    for name, expected in manifest["files"].items():
        _check_file(folder / name, expected)


def _check_listing(path: Path, manifest: dict[str, Any]) -> None:
    """A file that is not listed would not be checked."""
    files, programs = manifest["files"], manifest["programs"]
    if not (isinstance(files, dict) and isinstance(programs, dict)):
        raise ArtefactError(f"{path} is damaged: files and programs must be objects. {AGAIN}")
    graphs = [program.get("graph") if isinstance(program, dict) else None for program in programs.values()]
    if not all(isinstance(graph, str) for graph in graphs):
        raise ArtefactError(f"{path} is damaged: every program must name its graph. {AGAIN}")
    for name in {WEIGHTS, PLAN, "condition.onnx", *(f"{graph}.onnx" for graph in graphs), *files}:
        entry = files.get(name)
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
            raise ArtefactError(f"{path} is damaged: it does not list the size and sha256 of {name}. {AGAIN}")
        if Path(name).name != name or "\0" in name:
            raise ArtefactError(f"{path} is damaged: it lists the file {name!r}, which is no plain name. {AGAIN}")


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise ArtefactError(f"{path} is missing. {AGAIN}")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise ArtefactError(f"{path} has {size} bytes, its manifest says {expected['bytes']}: it is truncated or replaced. {AGAIN}")
    if (digest := sha256_of(path)) != expected["sha256"]:
        raise ArtefactError(f"{path} is damaged: its sha256 is {digest[:12]}, its manifest says {expected['sha256'][:12]}. {AGAIN}")
