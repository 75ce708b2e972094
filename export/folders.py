"""Folders that appear under their final name whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when all went well, and vanishes if not; the old one stays until then.

    A reader never sees half of a folder. Folders that a killed process left half-written are removed first.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_up(out)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}-", suffix=".partial", dir=out.parent))
    try:
        yield folder
        _exchange(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _clear_up(out: Path) -> None:
    """After a process that was killed: bring the old folder back, if it was just being replaced, and remove what is half-written."""
    old = out.with_name(f".{out.name}.old.partial")
    if old.exists() and not out.exists():
        old.rename(out)
    abandoned = [path for path in out.parent.glob(f".{out.name}.*.partial") if _is_abandoned(path, out)]
    for stale in [old, *abandoned]:
        shutil.rmtree(stale, ignore_errors=True)


def _is_abandoned(folder: Path, out: Path) -> bool:
    """Whether a half-written folder is one of `out` whose process is gone: its number is in the name."""
    process, _, rest = folder.name.removeprefix(f".{out.name}.").partition("-")
    if not process.isdigit() or "." in rest.removesuffix(".partial"):
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _exchange(folder: Path, out: Path) -> None:
    """Put the finished folder in place of `out`; a failure brings the old one back."""
    os.chmod(folder, 0o755)  # mkdtemp makes it private
    if out.exists():
        old = out.with_name(f".{out.name}.old.partial")
        out.rename(old)
        try:
            folder.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(out)
