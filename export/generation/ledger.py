"""The folder of shards: which of them are whole, and that one run at a time writes there.

`.generated.jsonl` says in its first line what run this is, and in the others what each finished shard must be. It and the lock begin
with a dot, which readers of data sets pass over.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from export.generation.job import Job, name_of
from export.runtime.manifest import sha256_of
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.atomic import write_atomically

LEDGER, LOCK = ".generated.jsonl", ".lock"
_IN_WORDS = {"artefact_digest": "the artefact's files", "plan_digest": "the plan", "conditions_digest": "the file of conditions"}


class Ledger:
    """The folder of a run's shards, locked; a context.

    Args:
        job: what is made.

    Raises:
        TokenCacheError: if the folder cannot be used: another run's, foreign files in it, or another process at work.
    """

    def __init__(self, job: Job) -> None:
        self._job, self.folder = job, Path(job.out)
        _require_place(self.folder.resolve(), Path(job.artefact).resolve())
        self.folder.mkdir(exist_ok=True)
        self._lock = (self.folder / LOCK).open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            said = self._read()
            self._require_nothing_foreign(said)
            self.remove_partial()
            self.whole = {line["shard"]: line for line in said[1:] if self._is_whole(line)}
            self._write()
        except BlockingIOError as error:
            self._lock.close()
            raise TokenCacheError(
                f"another process is making images in {self.folder}: let it finish, or choose another folder."
            ) from error
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Ledger:
        """The ledger itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove what is half-written, and let others in."""
        self.remove_partial()
        self._lock.close()

    @property
    def missing(self) -> list[int]:
        """Shards that are not there, or not whole."""
        return [shard for shard in range(self._job.shards) if shard not in self.whole]

    @property
    def images(self) -> int:
        """Images in whole shards."""
        return sum(line["rows"] for line in self.whole.values())

    def record(self, line: dict[str, Any]) -> None:
        """Keep a line of a shard that was written.

        Raises:
            TokenCacheError: if it says that the shard could not be made, or the shard is not here.
        """
        if "error" in line:
            raise TokenCacheError(line["error"])
        path = self.folder / name_of(line["shard"])
        if not path.is_file() or path.stat().st_size != line["bytes"]:
            raise TokenCacheError(
                f"a worker has written {path}, and it is not here: on a cluster `--out` must be a folder that all machines share."
            )
        self.whole[line["shard"]] = line
        with (self.folder / LEDGER).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove_partial(self) -> None:
        """Remove what processes that were killed left half-written."""
        for path in self.folder.glob(".images-*.parquet.*.tmp"):
            path.unlink(missing_ok=True)

    def _read(self) -> list[dict[str, Any]]:
        """The lines of the ledger: the run's identity, and shards as far as they can be read; the last line may be torn."""
        path = self.folder / LEDGER
        if not path.exists():
            return []
        lines = []
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        if not lines or not isinstance(lines[0], dict) or "format" not in lines[0]:
            raise TokenCacheError(f"{path} is damaged: it does not say which run made the shards beside it. Choose another folder.")
        if len(lines) == 1 and not any(self.folder.glob("*.parquet")):
            return []  # of a run that was stopped before its first shard
        if differing := [name for name in {**lines[0], **self._job.identity} if lines[0].get(name) != self._job.identity.get(name)]:
            told = [_difference(name, lines[0].get(name), self._job.identity.get(name)) for name in sorted(differing)]
            raise TokenCacheError(
                f"{self.folder} holds images of another run; different are {', '.join(told)}: ask for the same, or choose another "
                "folder."
            )
        return lines

    def _require_nothing_foreign(self, said: list[dict[str, Any]]) -> None:
        seen = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        if not said and seen:
            raise TokenCacheError(
                f"{self.folder} is not empty, and {seen[0]} in it was not made by this command: choose another folder."
            )
        own = {name_of(shard) for shard in range(self._job.shards)}
        if foreign := [name for name in seen if name.endswith(".parquet") and name not in own]:
            raise TokenCacheError(
                f"{self.folder} holds {foreign[0]}, which is none of the {self._job.shards} shards of {self._job.images} images, and "
                "would be read as one: ask for as many images as before or more, or choose another folder."
            )

    def _is_whole(self, line: Any) -> bool:
        """Whether a shard is what its line says, to the last byte, and has the images that it is to have."""
        try:
            path, rows = self.folder / name_of(line["shard"]), len(self._job.indices(line["shard"]))
            same = rows == line["rows"] and path.stat().st_size == line["bytes"]
            return same and line["failed"] >= 0 and sha256_of(path) == line["sha256"]
        except (OSError, KeyError, TypeError, ValueError):
            return False

    def _write(self) -> None:
        lines = [self._job.identity, *(self.whole[shard] for shard in sorted(self.whole))]
        write_atomically(self.folder / LEDGER, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _difference(name: str, before: Any, now: Any) -> str:
    return _IN_WORDS.get(name, f"{name} ({before} before, {now} now)")


def _require_place(folder: Path, artefact: Path) -> None:
    if not folder.parent.is_dir() or (folder.exists() and not folder.is_dir()):
        raise TokenCacheError(
            f"cannot write images into {folder}: it is no folder, or the one that it is to be made in does not exist."
        )
    if artefact in (folder, *folder.parents):
        raise TokenCacheError(f"cannot write images into {folder}: nothing may be added to an artefact. Name a folder outside it.")
