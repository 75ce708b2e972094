"""What belongs to the process that made it: ONNX Runtime's threads and locks do not survive a copy or a fork."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from export.runtime.cuda_provider import RuntimeUnavailableError


class OfOneProcess:
    """A sampler of an artefact, in the process that made it.

    Args:
        path: the artefact's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._process = path, os.getpid()

    def __reduce__(self) -> NoReturn:
        """Neither `copy` nor `pickle` can copy it.

        Raises:
            RuntimeUnavailableError: always, with what to do.
        """
        raise RuntimeUnavailableError(
            "a CachedSampler cannot be copied or pickled, since its ONNX Runtime sessions belong to one process: hand on the path of "
            f'the artefact, and make a sampler where it is needed: CachedSampler("{self.path}").'
        )

    def _require_own_process(self) -> None:
        """Before any lock is asked for: one that was held at the time of a fork stays held for ever."""
        if os.getpid() != self._process:
            raise RuntimeUnavailableError(
                f"this CachedSampler was made in process {self._process} and is used after a fork, in process {os.getpid()}: the "
                "threads and locks of ONNX Runtime do not survive that. Make the sampler in the process that uses it: "
                f'CachedSampler("{self.path}").'
            )
