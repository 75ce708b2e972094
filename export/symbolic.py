"""Symbolic values that write ONNX nodes, so that the exporter runs the very functions that define caching.

`Graph` collects nodes; a `Sym` is the name of a value in it and supports + - *; `OnnxOps` is `tc_lightning.cache.Ops` on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET = 23  # Attention as one node; TopK has no CUDA kernel from opset 24 on
CONTRIB = "com.microsoft"  # operators of ONNX Runtime's own
IR_VERSION = 11
# The oldest ONNX Runtime that runs what is written here, from the same opset on, and from folders of symbolic links.
ONNXRUNTIME = "1.24.2"
DTYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "int64": TensorProto.INT64}


class Sym:
    """A value of a graph under construction; `dtype` is a key of `DTYPES`."""

    def __init__(self, graph: Graph, name: str, dtype: str) -> None:
        self.graph, self.name, self.dtype = graph, name, dtype

    def __add__(self, other: Sym | float) -> Sym:
        return self.graph.binary("Add", self, other)

    def __sub__(self, other: Sym | float) -> Sym:
        return self.graph.binary("Sub", self, other)

    def __mul__(self, other: Sym | float) -> Sym:
        return self.graph.binary("Mul", self, other)

    def cast(self, dtype: str) -> Sym:
        """The value in another precision (itself if it is in that one)."""
        return self if dtype == self.dtype else self.graph.op("Cast", self, dtype=dtype, to=DTYPES[dtype])


class External(NamedTuple):
    """An initialiser that lives in the shared weights file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Graph:
    """An ONNX graph under construction."""

    def __init__(self, name: str, weights_file: str, index: dict[str, External]) -> None:
        self.name, self._weights_file, self._index = name, weights_file, index
        self._nodes: list[onnx.NodeProto] = []
        self._initialisers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._scope: list[str] = []
        self._renamed: dict[str, str] = {}
        self._counter = 0

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> Sym:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, DTYPES[dtype], list(shape)))
        return Sym(self, name, dtype)

    def output(self, name: str, value: Sym, shape: Sequence[int | str]) -> None:
        """Declare a graph output. The value itself takes the name: a node that renames it would copy it if others use it too."""
        if value.name in self._renamed or any(value.name == given.name for given in self._inputs):
            self._nodes.append(helper.make_node("Identity", [value.name], [name], name=f"output_{name}"))
        else:
            self._renamed[value.name] = name
        self._outputs.append(helper.make_tensor_value_info(name, DTYPES[value.dtype], list(shape)))

    def constant(self, value: np.ndarray | float | int, dtype: str) -> Sym:
        """A small constant, kept inside the graph file; equal constants are one."""
        array = np.asarray(value)
        key = f"const_{dtype}_{'x'.join(map(str, array.shape))}_{hashlib.sha256(array.tobytes()).hexdigest()[:12]}"
        if key not in self._initialisers:
            target = np.int64 if dtype == "int64" else np.float32
            tensor = helper.make_tensor(key, DTYPES[dtype], array.shape, array.astype(target).ravel().tolist())
            self._initialisers[key] = tensor
        return Sym(self, key, dtype)

    def weight(self, name: str) -> Sym:
        """A tensor of the shared weights file."""
        entry = self._index[name]
        if name not in self._initialisers:
            tensor = TensorProto(name=name, data_type=DTYPES[entry.dtype], dims=entry.shape)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": self._weights_file, "offset": entry.offset, "length": entry.nbytes}
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in place.items())
            self._initialisers[name] = tensor
        return Sym(self, name, entry.dtype)

    def op(self, op_type: str, *inputs: Sym | None, dtype: str | None = None, domain: str = "", **attributes: Any) -> Sym:
        """Append a node with one output; `dtype` is that of the first input unless given."""
        return self.multi(op_type, 1, *inputs, dtype=dtype, domain=domain, **attributes)[0]

    def multi(
        self, op_type: str, outputs: int, *inputs: Sym | None, dtype: str | None = None, domain: str = "", **attributes: Any
    ) -> list[Sym]:
        """Append a node with several outputs; None stands for an absent input."""
        self._counter += 1
        stem = "/".join([*self._scope, f"{op_type}_{self._counter}"])
        names = [stem if outputs == 1 else f"{stem}.{j}" for j in range(outputs)]
        given = ["" if value is None else value.name for value in inputs]
        self._nodes.append(helper.make_node(op_type, given, names, name=stem, domain=domain, **attributes))
        kind = dtype or next(value.dtype for value in inputs if value is not None)
        return [Sym(self, name, kind) for name in names]

    def binary(self, op_type: str, left: Sym, right: Sym | float) -> Sym:
        """Elementwise operation; a number takes the precision of the other operand."""
        other = right if isinstance(right, Sym) else self.constant(float(right), left.dtype)
        return self.op(op_type, left, other)

    def reshape(self, x: Sym, *shape: int) -> Sym:
        """Reshape; 0 keeps a dimension, -1 infers one."""
        return self.op("Reshape", x, self.constant(np.array(shape), "int64"))

    def scope(self, name: str) -> _Scope:
        """Context in which node names carry a prefix, for example `blocks.3`."""
        return _Scope(self._scope, name)

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        for node in self._nodes:
            node.input[:] = [self._renamed.get(name, name) for name in node.input]
            node.output[:] = [self._renamed.get(name, name) for name in node.output]
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._initialisers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="tc_lightning")


class _Scope:
    def __init__(self, stack: list[str], name: str) -> None:
        self._stack, self._name = stack, name

    def __enter__(self) -> None:
        self._stack.append(self._name)

    def __exit__(self, *_: object) -> None:
        self._stack.pop()


class OnnxOps:
    """`tc_lightning.cache.Ops` on symbolic values."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._places: dict[str, Sym] = {}
        self._row_M12: Sym | None = None
        self._own: dict[str, Sym] = {}

    def register(self, kept_K: Sym, places_MK2: Sym) -> Sym:
        """Remember, for `put`, where the tokens `kept_K` are in a tensor [M, N, D]: pairs of row and token."""
        self._places[kept_K.name] = places_MK2
        return kept_K

    def number_rows(self, row_M12: Sym) -> None:
        """Say which row is which, as pairs (row, 0), for tokens of which each row has its own."""
        self._row_M12 = row_M12

    def take(self, x_BND: Sym, index: Sym) -> Sym:
        """See `Ops`."""
        if index.name in self._places:
            return self._graph.op("Gather", x_BND, index, axis=1)
        return self._graph.op("GatherND", x_BND, self._own_places(index))

    def put(self, x_BND: Sym, index: Sym, rows_BKD: Sym) -> Sym:
        """See `Ops`. ONNX Runtime scatters in place where it may, and where input and output are bound to one buffer."""
        return self._graph.op("ScatterND", x_BND, self._places.get(index.name) or self._own_places(index), rows_BKD)

    def _own_places(self, index_MK: Sym) -> Sym:
        """Pairs of row and token [M, K, 2]."""
        assert self._row_M12 is not None, "number_rows comes first"
        if index_MK.name not in self._own:
            token_MK1 = self._graph.op("Unsqueeze", index_MK, self._graph.constant(np.array([2]), "int64"))
            self._own[index_MK.name] = self._row_M12 + token_MK1 * self._graph.constant(np.array([0, 1]), "int64")
        return self._own[index_MK.name]

    def block_mean(self, a_BLN: Sym, start: int, stop: int) -> Sym:
        """See `Ops`."""
        if stop == start + 1:
            return self._graph.op("Gather", a_BLN, self._graph.constant(start, "int64"), axis=1)
        axis = self._graph.constant(np.array([1]), "int64")
        return self._graph.op("ReduceMean", self._slice(a_BLN, start, stop), axis, keepdims=0)

    def floor(self, x: Sym) -> Sym:
        """See `Ops`."""
        return self._graph.op("Floor", x)

    def constant(self, values: np.ndarray, like: Sym) -> Sym:
        """See `Ops`."""
        return self._graph.constant(values, like.dtype)

    def top(self, x_BN: Sym, keep: int) -> Sym:
        """See `Ops`."""
        count = self._graph.constant(np.array([keep]), "int64")
        _, index_BK = self._graph.multi("TopK", 2, x_BN, count, axis=1, largest=1, sorted=0)
        return Sym(self._graph, index_BK.name, "int64")

    def concat(self, parts: Sequence[Sym], axis: int) -> Sym:
        """See `Ops`."""
        return self._graph.op("Concat", *parts, axis=axis)

    def halves(self, x: Sym) -> tuple[Sym, Sym]:
        """See `Ops`."""
        first, second = self._graph.multi("Split", 2, x, axis=0, num_outputs=2)
        return first, second

    def channels(self, x_BCHW: Sym, start: int, stop: int) -> Sym:
        """See `Ops`."""
        return self._slice(x_BCHW, start, stop)

    def _slice(self, x: Sym, start: int, stop: int) -> Sym:
        """A range of axis 1."""
        bounds = [self._graph.constant(np.array([value]), "int64") for value in (start, stop, 1)]
        return self._graph.op("Slice", x, *bounds)
