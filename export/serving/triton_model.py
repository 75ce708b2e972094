"""The model of Triton's python backend: it owns a sampler, caches and all, and computes the rows of a batch's requests together.

`1/model.py` of a repository imports it, in the process that Triton starts for an instance: there alone is `triton_python_backend_utils`
found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from export.runtime.sampler import CachedSampler
from export.serving.heap import trim
from export.serving.rows import Answer, BadRowError, Row, RowError, answers, checked
from export.serving.triton_config import CUDA, EITHER
from export.serving.triton_metrics import Metrics
from export.serving.triton_repository import ARTEFACT
from export.serving.triton_rows import rows_of, tensors_of
from export.serving.warm_up import warm_up
from tc_lightning.errors import TokenCacheError

BATCHES_A_TRIM = 32


class GivenUpError(TokenCacheError):
    """Nobody waits for an image of this batch any more."""


class TritonPythonModel:
    """What Triton calls: `initialize` once, `execute` with the requests of each batch, `finalize` at the end."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the artefact, and run a batch of every size, so that no request waits for what is done once.

        Raises:
            TritonModelException: in a paragraph, if the artefact or the provider cannot be used: the model is not ready then.
        """
        config = json.loads(args["model_config"])
        told = {name: value["string_value"] for name, value in config["parameters"].items()}
        try:
            self._sampler = _sampler(args, told, config["max_batch_size"])
            warm_up(self._sampler, [int(size) for size in told.get("preferred", "").split(",") if size])
        except TokenCacheError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        place = {"provider": self._sampler.provider, "device": str(self._sampler.device), "plan": told["plan_digest"]}
        self._batches = 0
        self._metrics = Metrics(pb_utils, {"model": args["model_name"], "version": args["model_version"]}, place)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """The response of each request: images, or the error that one of its rows has."""
        asked = [self._asked(request) for request in requests]
        rows = [row for one in asked if isinstance(one, list) for row in one]
        made = iter(self._made(rows, requests))
        self._batches += 1
        if self._batches % BATCHES_A_TRIM == 0:
            trim()
        return [
            one
            if isinstance(one, pb_utils.InferenceResponse)
            else _response([next(made) for _ in one], request.requested_output_names())
            for one, request in zip(asked, requests, strict=True)
        ]

    def finalize(self) -> None:
        """Give back what the sampler holds."""
        self._sampler.release()

    def _asked(self, request: Any) -> Any:
        """The rows of a request, a list of them, checked; or the response that says what is wrong with one."""
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        rows = rows_of(self._sampler.conditions, tensors)
        for number, row in enumerate(rows):
            try:
                checked(self._sampler.manifest, row)
            except TokenCacheError as error:
                return _refusal(number, len(rows), BadRowError(str(error)))
        return rows

    def _made(self, rows: Sequence[Row], requests: Sequence[Any]) -> list[Answer | TokenCacheError]:
        """An answer or an error for each row, and all of it counted."""

        def on_step(*_: object) -> None:
            if all(request.is_cancelled() for request in requests):
                raise GivenUpError("the request was given up.")

        found = answers(self._sampler, rows, on_step)
        good = [one.receipt for one in found if isinstance(one, Answer)]
        self._metrics.count(good, sum(isinstance(one, RowError) for one in found))
        return found


def _sampler(args: Mapping[str, str], told: Mapping[str, str], max_batch: int) -> CachedSampler:
    """The artefact on the provider that was asked for, or an error: never on another."""
    provider = told["provider"]
    if provider == EITHER:
        provider = CUDA if args["model_instance_kind"] == "GPU" else "cpu"
    folder = Path(args["model_repository"]) / args["model_version"] / ARTEFACT
    threads = int(told["threads"]) if "threads" in told else None
    sampler = CachedSampler(folder.resolve(), provider, threads, max_batch, device=int(args["model_instance_device_id"]))
    if sampler.manifest["plan_digest"] != told["plan_digest"]:
        raise TokenCacheError(
            f"{folder.resolve()} is not the artefact that this model was written for: write the repository again with "
            "`python export/to_triton.py`."
        )
    return sampler


def _response(made: Sequence[Answer | TokenCacheError], wanted: Sequence[str]) -> Any:
    """Of a request: the tensors that it wants, or the error of its first row that has one."""
    good = []
    for number, one in enumerate(made):
        if isinstance(one, TokenCacheError):
            return _refusal(number, len(made), one)
        good.append(one)
    tensors = [pb_utils.Tensor(name, value) for name, value in tensors_of(good).items() if name in wanted]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _refusal(number: int, rows: int, error: TokenCacheError) -> Any:
    """The response to a request of so many rows, of which one has an error: only what the row itself brought about is the request's."""
    match error:
        case GivenUpError():
            words, code = str(error), pb_utils.TritonError.CANCELLED
        case BadRowError() | RowError():
            words, code = str(error) if rows == 1 else f"row {number}: {error}", pb_utils.TritonError.INVALID_ARG
        case _:
            words, code = str(error), pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(words, code))
