"""Runs artefacts of tc-lightning: numpy and onnxruntime, and no torch.

    sampler = CachedSampler("artefacts/digits", provider="cpu")
    result = sampler.sample([0, 1, 2], seed=7)
    result.latents, result.images, result.receipt

In the wheel `tc-lightning-runtime` these names are those of the package `tc_lightning_runtime` itself.
"""

try:
    from export.runtime.sampler import CachedSampler
except ModuleNotFoundError as error:
    if error.name != "onnxruntime":
        raise
    raise ModuleNotFoundError(
        "onnxruntime is not installed, and nothing chooses for you between its two packages, which overwrite each other's files: "
        "`pip install onnxruntime` for the CPU alone, or `pip install onnxruntime-gpu` for CUDA and the CPU.",
        name=error.name,
    ) from error

from export.runtime.buffers import ProgramError
from export.runtime.contract import read_artefact
from export.runtime.cuda_provider import RuntimeUnavailableError
from export.runtime.manifest import ArtefactError
from export.runtime.result import Result
from tc_lightning.errors import PlanError, TokenCacheError
from tc_lightning.plan.rows_file import read_rows

__all__ = [
    "ArtefactError",
    "CachedSampler",
    "PlanError",
    "ProgramError",
    "Result",
    "RuntimeUnavailableError",
    "TokenCacheError",
    "read_artefact",
    "read_rows",
]
