"""Asks a Triton server by HTTP, tensors as bytes (the KServe v2 protocol with Triton's binary extension). numpy alone.

One `Client` is one connection, for one thread.
"""

from __future__ import annotations

import http.client
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tc_lightning.errors import TokenCacheError

DATATYPES = {"INT64": "<i8", "FP32": "<f4", "BOOL": "|b1"}
NAMES = {dtype: name for name, dtype in DATATYPES.items()}
HEADER = "Inference-Header-Content-Length"


class RequestFailedError(TokenCacheError):
    """The server's answer to a request that it could not or would not carry out.

    Args:
        status: of HTTP.
        message: what the server said.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A connection to a server.

    Args:
        address: host and port.
        timeout: seconds that an answer may take.
    """

    def __init__(self, address: str, timeout: float = 120.0) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the next request makes another."""
        self._connection.close()

    def infer(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Make images.

        Args:
            model: its name.
            inputs: by name, [rows, ...] each: int64, float32 or bool.
            outputs: those that are wanted; none: all that there are.

        Returns:
            The outputs by name, [rows, ...] each; texts as objects.

        Raises:
            RequestFailedError: if the server refuses the request, or it fails.
            OSError: if there is no connection.
            http.client.HTTPException: if it ends before the answer has come.
        """
        arrays = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        asked: dict[str, Any] = {"inputs": [_described(name, value) for name, value in arrays.items()]}
        asked |= {"outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs]} if outputs else {}
        header = json.dumps(asked | {"parameters": {"binary_data_output": True}}).encode()
        body = b"".join([header, *(value.tobytes() for value in arrays.values())])
        answer, size = self._ask("POST", f"/v2/models/{model}/infer", body, {HEADER: str(len(header))})
        return _tensors(answer, len(answer) if size is None else int(size))

    def get(self, path: str) -> Any:
        """The server's JSON at a path; None where it says nothing.

        Raises:
            RequestFailedError: if it is an error.
            OSError: if there is no connection.
        """
        return _json(self._ask("GET", path)[0])

    def post(self, path: str) -> Any:
        """The server's JSON at a path that is posted to; raises as `get` does."""
        return _json(self._ask("POST", path)[0])

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, str | None]:
        try:
            self._connection.request(method, path, body, dict(headers or {}))
            response = self._connection.getresponse()
            answer = response.read()
        except BaseException:
            self._connection.close()
            raise
        if response.status != http.client.OK:
            raise RequestFailedError(response.status, _said(answer))
        return answer, response.getheader(HEADER)


def _described(name: str, value: np.ndarray) -> dict[str, Any]:
    return {
        "name": name,
        "datatype": NAMES[value.dtype.str],
        "shape": list(value.shape),
        "parameters": {"binary_data_size": value.nbytes},
    }


def _json(answer: bytes) -> Any:
    return json.loads(answer) if answer else None


def _said(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return answer.decode(errors="replace") or "no reason was given"


def _tensors(answer: bytes, header: int) -> dict[str, np.ndarray]:
    """Outputs of an answer: JSON of so many bytes, then the tensors one after the other."""
    found: dict[str, np.ndarray] = {}
    place = header
    for output in json.loads(answer[:header])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        data = answer[place : place + size]
        place += size
        values: np.ndarray = _texts(data) if output["datatype"] == "BYTES" else np.frombuffer(data, DATATYPES[output["datatype"]])
        found[output["name"]] = values.reshape(output["shape"])
    return found


def _texts(data: bytes) -> np.ndarray:
    """Texts, each behind its length in four bytes."""
    texts, place = [], 0
    while place < len(data):
        (size,) = struct.unpack_from("<I", data, place)
        texts.append(data[place + 4 : place + 4 + size].decode())
        place += 4 + size
    return np.array(texts, dtype=object)
