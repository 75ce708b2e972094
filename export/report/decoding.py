"""The decoder of a run's pipeline, for a report: written once, used for all plans."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from export.compiler.decoder import open_decoder, write_decoder
from export.runtime.decoder import Decoder
from export.runtime.layout import DECODER
from tc_lightning.models.checkpoints.pipeline import find_vae
from tc_lightning.runs.loaded import LoadedRun


@contextlib.contextmanager
def decoder_of(loaded: LoadedRun, provider: str, wanted: bool = True) -> Iterator[Decoder | None]:
    """The decoder of the teacher's pipeline; None where the teacher is no whole pipeline, or none is wanted.

    Args:
        loaded: the run.
        provider: where it is to run.
        wanted: whether pixels are.

    Raises:
        TokenCacheError: if the VAE cannot be read, or disagrees with torch.
    """
    vae = find_vae(loaded.run.teacher) if wanted else None
    if vae is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="tc-decoder-") as workshop:
        said = write_decoder(vae, loaded.plan.model.latent, Path(workshop), provider)
        session = open_decoder(Path(workshop), provider)
        yield Decoder({DECODER: said}, lambda _: session)
