"""What an ONNX file declares, read without the onnx package: inputs, outputs, and the weights that it takes from another file.

An ONNX file is a Protocol Buffers message (`onnx.proto`): fields of a number and a value, the value an integer or bytes, which may be
a message themselves. Only what is asked for is looked at. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MODEL_GRAPH = 7
_GRAPH_INITIALISER, _GRAPH_INPUT, _GRAPH_OUTPUT = 5, 11, 12
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIM, _DIM_SIZE = 1, 2, 1, 1
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 2, 8, 13
_PAIR_KEY, _PAIR_VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Weight(NamedTuple):
    """A weight that is kept in another file: ONNX element type, shape, and where it is."""

    element_type: int
    shape: tuple[int, ...]
    location: str
    offset: int
    nbytes: int


class Header(NamedTuple):
    """Names of a graph's inputs and outputs, in order, their sizes (0 where known at run time alone), and external weights by name."""

    inputs: list[str]
    outputs: list[str]
    weights: dict[str, Weight]
    sizes: dict[str, tuple[int, ...]]


def read_header(path: Path) -> Header:
    """The header of an ONNX file.

    Raises:
        ValueError: if it is not one.
    """
    header = Header([], [], {}, {})
    try:
        graph = dict(_fields(memoryview(path.read_bytes())))[_MODEL_GRAPH]
        for number, value in _fields(_message(graph)):
            if number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
                name = _text(_message(value), _VALUE_NAME)
                (header.inputs if number == _GRAPH_INPUT else header.outputs).append(name)
                header.sizes[name] = tuple(_sizes(_message(value)))
            elif number == _GRAPH_INITIALISER:
                _add_weight(header.weights, _message(value))
    except (IndexError, KeyError) as error:
        raise ValueError("it is not an ONNX file, or it is cut short") from error
    return header


def _add_weight(weights: dict[str, Weight], tensor: memoryview) -> None:
    dims: list[int] = []
    kind, place = 0, {}
    for number, value in _fields(tensor):
        if number == _TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number == _TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif number == _TENSOR_EXTERNAL:
            place[_text(_message(value), _PAIR_KEY)] = _text(_message(value), _PAIR_VALUE)
    if place:
        name = _text(tensor, _TENSOR_NAME)
        weights[name] = Weight(kind, tuple(dims), place["location"], int(place["offset"]), int(place["length"]))


def _sizes(value: memoryview) -> Iterator[int]:
    """Sizes of an input or output."""
    for shape in _within(value, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE):
        for dim in _within(shape, _SHAPE_DIM):
            yield next((size for number, size in _fields(dim) if number == _DIM_SIZE and isinstance(size, int)), 0)


def _within(message: memoryview, *path: int) -> Iterator[memoryview]:
    """The messages that a path of fields leads to."""
    if not path:
        yield message
        return
    for number, value in _fields(message):
        if number == path[0]:
            yield from _within(_message(value), *path[1:])


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind, 0)
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif not size:
            raise ValueError(f"it has a field of the unknown kind {kind}")
        if at + size > len(message):
            raise IndexError(at)
        yield number, message[at : at + size]
        at += size


def _varints(packed: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        values.append(value)
    return values


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer, seven bits a byte and the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("it has a number where a message should be")
    return value


def _text(message: memoryview, wanted: int) -> str:
    return next((bytes(_message(value)).decode() for number, value in _fields(message) if number == wanted), "")
