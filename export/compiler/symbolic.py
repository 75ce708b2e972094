"""Symbolic values that write ONNX nodes, so that the exporter runs the very modules and functions that PyTorch runs.

A `Sym` stands where a tensor would: it has a type and a shape, and answers PyTorch's functions and methods by appending nodes to its
`Graph` (`export.compiler.torch_functions` says which, and how). A parameter is known by its identity, and becomes the name of a tensor
in the weights file. What has no answer is an error that names the operation and the module that called it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.overrides import resolve_name

from export.compiler.weights import TORCH_DTYPES, External
from tc_lightning.errors import TokenCacheError

OPSET = 23  # Attention as one node; TopK has no CUDA kernel from opset 24 on
CONTRIB = "com.microsoft"  # operators of ONNX Runtime's own
IR_VERSION = 11
ONNXRUNTIME = "1.24.2"  # the oldest that runs what is written here, from the same opset on, and from folders of symbolic links
DTYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
TORCH = TORCH_DTYPES | {"int64": torch.int64, "bool": torch.bool}
KINDS = {dtype: kind for kind, dtype in TORCH.items()}

Shape = tuple[int | None, ...]  # None: a size that is known at run time alone
Answers = Mapping[Any, Callable[..., Any]]  # PyTorch's function, or the name of a tensor's method -> what answers it


class ExportError(TokenCacheError):
    """A network does what has no ONNX form here."""


def _method(name: str) -> Callable[..., Any]:
    """A tensor's method, as a symbolic value answers it."""

    @functools.wraps(getattr(Tensor, name))
    def call(self: Sym, *args: Any, **kwargs: Any) -> Any:
        return self.graph.answer(getattr(Tensor, name), (self, *args), kwargs)

    return call


class Sym:
    """A value of a graph under construction.

    Args:
        graph: the graph.
        name: its name in it.
        kind: its type, a key of `DTYPES`.
        shape: its sizes.
        origin: what made it, where whatever comes next can make use of that (`export.compiler.torch_functions`).
    """

    def __init__(self, graph: Graph, name: str, kind: str, shape: Shape, origin: Any = None) -> None:
        self.graph, self.name, self.kind, self.shape, self.origin = graph, name, kind, shape, origin

    __add__, __radd__ = _method("__add__"), _method("__radd__")
    __sub__, __rsub__ = _method("__sub__"), _method("__rsub__")
    __mul__, __rmul__ = _method("__mul__"), _method("__rmul__")
    __truediv__, __rtruediv__ = _method("__truediv__"), _method("__rtruediv__")
    __neg__, __getitem__, __len__ = _method("__neg__"), _method("__getitem__"), _method("__len__")

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its type, as PyTorch calls it."""
        return TORCH[self.kind]

    @property
    def device(self) -> torch.device:
        """Where the tensors live that it may be combined with."""
        return torch.device("cpu")

    def cast(self, kind: str) -> Sym:
        """The value in another type (itself if it is of that one).

        Values that were only moved are cast before that: next to what computed them, where ONNX Runtime can do without rounding them.
        """
        if kind == self.kind:
            return self
        if isinstance(self.origin, Moved):
            return self.origin.move(self.origin.source.cast(kind))
        return self.graph.op("Cast", self, shape=self.shape, kind=kind, to=DTYPES[kind])

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return next(syms(args)).graph.answer(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"a symbolic value has no attribute {name!r}.")
        if not callable(getattr(Tensor, name)):
            raise self.graph.refusal(f"torch.Tensor.{name}")
        return _method(name).__get__(self)

    def __bool__(self) -> bool:
        raise self.graph.refusal("a decision that depends on a value")


for _operator in (
    "pow",
    "rpow",
    "matmul",
    "rmatmul",
    "floordiv",
    "mod",
    "abs",
    "lt",
    "le",
    "gt",
    "ge",
    "and",
    "or",
    "invert",
    "setitem",
    "iter",
):
    setattr(Sym, f"__{_operator}__", _method(f"__{_operator}__"))


class Moved(NamedTuple):
    """Origin of a value whose entries are those of another one, in another order or shape."""

    source: Sym
    move: Callable[[Sym], Sym]


def syms(values: Any) -> Iterator[Sym]:
    """The symbolic values among arguments, also in lists of them."""
    for value in values:
        if isinstance(value, Sym):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from syms(value)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The shared weights file as graphs see it.

    Args:
        file: its name.
        index: what is in it; views of it that graphs take are added.
        names: the parameters of the modules that are run, by identity, and their names in the file.
    """

    file: str
    index: dict[str, External]
    names: Mapping[int, str]


class Graph:
    """An ONNX graph under construction. Equal nodes are one, and what no output needs is left out.

    Args:
        name: its name.
        weights: the weights file.
        answers: what answers PyTorch's functions.
    """

    def __init__(self, name: str, weights: Weights, answers: Answers) -> None:
        self.name, self.weights, self._answers = name, weights, answers
        self._nodes: dict[str, tuple[onnx.NodeProto, list[Sym]]] = {}  # by what they compute
        self._initialisers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._scope: list[str] = []
        self._renamed: dict[str, str] = {}
        self.row_pairs: Sym | None = None  # (row, 0) for each row of the batch [M, 1, 2], in graphs that put tokens into place

    def answer(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a function of PyTorch returns, in symbolic values.

        Raises:
            ExportError: if it has no ONNX form here.
        """
        name = getattr(function, "__name__", "")
        spoken = resolve_name(function) or name
        known = self._answers.get(function) or (self._answers.get(name) if getattr(Tensor, name, None) == function else None)
        if known is None:
            raise self.refusal(spoken)
        try:
            bound = inspect.signature(known).bind(*args, **kwargs)
        except TypeError as error:
            raise self.refusal(f"{spoken} with these arguments ({error})") from error
        return known(*bound.args, **bound.kwargs)

    def refusal(self, what: str) -> ExportError:
        """The error that says what cannot be written, and where it is called."""
        where = " of ".join(reversed(self._path())) or "the network itself"
        return ExportError(
            f"{what} has no ONNX form here; it is called in {where}. Write it with operations that have one "
            "(export/compiler/torch_functions.py), or as a function of its own that hands over (tc_lightning/models/lean.py)."
        )

    def input(self, name: str, kind: str, shape: Sequence[int | str]) -> Sym:
        """Declare a graph input; a size that is a name is known at run time alone."""
        self._inputs.append(helper.make_tensor_value_info(name, DTYPES[kind], list(shape)))
        return Sym(self, name, kind, tuple(None if isinstance(size, str) else size for size in shape))

    def output(self, name: str, value: Sym, shape: Sequence[int | str]) -> None:
        """Declare a graph output. The value itself takes the name: a node that renames it would copy it if others use it too."""
        if value.name in self._renamed or any(value.name == given.name for given in self._inputs):
            self.multi("Identity", [value.shape], value, label=f"output_{name}")
            self._renamed[f"output_{name}"] = name
        else:
            self._renamed[value.name] = name
        self._outputs.append(helper.make_tensor_value_info(name, DTYPES[value.kind], list(shape)))

    def constant(self, value: np.ndarray | float | int, kind: str) -> Sym:
        """A small constant, kept inside the graph file; equal constants are one."""
        array = np.asarray(value)
        key = f"const_{kind}_{'x'.join(map(str, array.shape))}_{hashlib.sha256(array.tobytes()).hexdigest()[:12]}"
        if key not in self._initialisers:
            target = np.int64 if kind == "int64" else np.float32
            tensor = helper.make_tensor(key, DTYPES[kind], array.shape, array.astype(target).ravel().tolist())
            self._initialisers[key] = tensor
        return Sym(self, key, kind, array.shape)

    def weight(self, name: str) -> Sym:
        """A tensor of the shared weights file."""
        entry = self.weights.index[name]
        if name not in self._initialisers:
            tensor = TensorProto(name=name, data_type=DTYPES[entry.dtype], dims=entry.shape)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": self.weights.file, "offset": entry.offset, "length": entry.nbytes}
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in place.items())
            self._initialisers[name] = tensor
        return Sym(self, name, entry.dtype, entry.shape)

    def view(self, name: str, view: str, shape: tuple[int, ...], part: int = 0, parts: int = 1) -> Sym:
        """One of the equal parts, along its first axis, of a tensor of the weights file, in another shape and by a name of its own."""
        whole = self.weights.index[name]
        nbytes = whole.nbytes // parts
        self.weights.index[view] = External(whole.dtype, shape, whole.offset + part * nbytes, nbytes)
        return self.weight(view)

    def op(self, op_type: str, *inputs: Sym | None, shape: Shape, kind: str | None = None, domain: str = "", **attributes: Any) -> Sym:
        """Append a node with one output; its type is that of the first input unless given."""
        return self.multi(op_type, [shape], *inputs, kind=kind, domain=domain, **attributes)[0]

    def multi(
        self,
        op_type: str,
        shapes: Sequence[Shape],
        *inputs: Sym | None,
        kind: str | None = None,
        domain: str = "",
        label: str = "",
        **attributes: Any,
    ) -> list[Sym]:
        """Append a node with an output of each shape; None stands for an absent input."""
        given = ["" if value is None else value.name for value in inputs]
        key = repr((op_type, domain, given, len(shapes), label, sorted(attributes.items())))
        if key not in self._nodes:
            stem = label or "/".join([*self._path(), f"{op_type}_{len(self._nodes) + 1}"])
            names = [stem] if len(shapes) == 1 else [f"{stem}.{j}" for j in range(len(shapes))]
            node = helper.make_node(op_type, given, names, name=stem, domain=domain, **attributes)
            kind = kind or next(value.kind for value in inputs if value is not None)
            self._nodes[key] = node, [Sym(self, name, kind, shape) for name, shape in zip(names, shapes, strict=True)]
        return [*self._nodes[key][1]]

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Context in which nodes bear the name of a module, for example `blocks.3`."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """A module begins to run."""
        self._scope.append(name)

    def leave(self) -> None:
        """It has ended."""
        self._scope.pop()

    def _path(self) -> list[str]:
        """The modules that are running, outermost first, each named within the one before."""
        outer = ["", *(f"{name}." for name in self._scope)]
        return [name.removeprefix(before) for before, name in zip(outer, self._scope, strict=False)]

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        needed = {*self._renamed}
        nodes = []
        for node, _ in reversed(self._nodes.values()):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        for node in nodes:
            node.input[:] = [self._renamed.get(name, name) for name in node.input]
            node.output[:] = [self._renamed.get(name, name) for name in node.output]
        held = [tensor for name, tensor in self._initialisers.items() if name in needed]
        graph = helper.make_graph(nodes[::-1], self.name, self._inputs, self._outputs, initializer=held)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="tc_lightning")
