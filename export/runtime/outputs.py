"""Files that a command is to write, looked at before it begins. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tc_lightning.errors import TokenCacheError


def require_writable(files: Mapping[str, Path | None], artefact: Path) -> None:
    """Refuse before sampling what could not be written after it.

    Args:
        files: the files, by the options that name them; None is not to be written.
        artefact: the folder that nothing may be added to.

    Raises:
        TokenCacheError: naming the first that cannot be written, or two options that name the same.
    """
    named: dict[Path, str] = {}
    for option, file in files.items():
        if file is None:
            continue
        path = file.resolve()
        if not path.parent.is_dir():
            raise TokenCacheError(f"cannot write {path}: the folder {path.parent} does not exist.")
        if path.is_dir():
            raise TokenCacheError(f"cannot write {path}: it is a folder. Name a file in it.")
        if path.parent == artefact.resolve():
            raise TokenCacheError(f"cannot write {path}: nothing may be added to an artefact. Name a file outside it.")
        if (other := named.setdefault(path, option)) != option:
            raise TokenCacheError(f"{other} and {option} are both {path}: name two files.")
