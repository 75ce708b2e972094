"""Symbolic values: every function they answer gives what PyTorch gives, and what they cannot answer is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from conftest import FULL, make_plan, make_teacher
from torch import Tensor, nn

from export.compiler.compile import export_artefact, write_unproved
from export.compiler.symbolic import ExportError, Graph, Weights
from export.compiler.torch_functions import ANSWERS
from export.compiler.torch_shapes import lookup
from export.compiler.traced import skeleton
from export.compiler.weights import place_weights, write_weights
from export.runtime.programs import lower
from tc_lightning.models.dit import DiT
from tc_lightning.models.lean import attend, put, take, time_features
from tc_lightning.plan.segments import skip

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
INDEX = torch.tensor([2, 0])
OWN = torch.tensor([[2, 0], [0, 1]])
BIAS_2NN = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(1))


def in_graph(function: Callable[..., Any], *tensors: Tensor, module: nn.Module | None = None, folder: Path = Path()) -> Any:
    """What a function returns when its nodes are run, with sizes of the first axis known at run time alone."""
    weights, held = Weights("weights.data", {}, {}), {}
    if module is not None:
        held = {name: tensor.detach() for name, tensor in module.state_dict().items()}
        twin, names = skeleton(module, "fp32")
        weights = Weights("weights.data", place_weights(held, "fp32"), names)
        write_weights(held, folder / "weights.data", weights.index)
    g = Graph("test", weights, ANSWERS)
    kinds = {torch.float32: "fp32", torch.int64: "int64"}
    given = [g.input(f"x{j}", kinds[x.dtype], ["rows", *x.shape[1:]]) for j, x in enumerate(tensors)]
    g.row_pairs = g.input("numbers", "int64", ["rows"])[:, None, None] * g.constant(np.array([1, 0]), "int64")
    out = function(*given) if module is None else function(twin, *given)
    g.output("out", out, [f"d{j}" if size is None else size for j, size in enumerate(out.shape)])
    path = folder / "graph.onnx"
    path.write_bytes(g.model().SerializeToString())
    session = ort.InferenceSession(str(path) if held else path.read_bytes(), providers=["CPUExecutionProvider"])
    feed = {f"x{j}": x.numpy() for j, x in enumerate(tensors)} | {"numbers": np.arange(len(X))}
    return torch.from_numpy(session.run(None, {v.name: feed[v.name] for v in session.get_inputs()})[0])


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "numbers on either side": lambda x: 1 + x * 2 - (3 - x) / 4 + 2 / (x * x + 1) - (-x),
    "a tensor that is no parameter": lambda x: torch.arange(8.0) * x + x * torch.ones(3, 1),
    "integers are promoted": lambda x: x + torch.arange(8),
    "activations": lambda x: F.silu(x) + F.gelu(x, approximate="tanh") + torch.tanh(x) * torch.sigmoid(x) + F.gelu(x),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-3),
    "rms norm": lambda x: F.rms_norm(x, (8,), eps=1e-3),
    "cat, chunk": lambda x: torch.cat([*x.chunk(2, -1), torch.zeros(1, 3, 4).expand(2, 3, 4), x], dim=-1),
    "halves of the batch": lambda x: x.chunk(2)[1] - torch.chunk(x, 2)[0],
    "topk": lambda x: x.topk(2, dim=1).values * torch.topk(x, 2, 1).values,
    "mean": lambda x: x.mean(1) + x.mean(-1, keepdim=True)[:, 0],
    "floor": lambda x: (x * 4).floor() + torch.floor(x),
    "indices": lambda x: x[:, 1:, None, ..., 2:5] + x[:, 1][:, None, None, :3],
    "features of a condition": lambda x: time_features(x * 100, 8, 0.0),
    "ranges of an axis of any size": lambda x: x[1:] * x[:1] + x[0:2],
    "index_select": lambda x: x.index_select(1, INDEX),
    "reshape": lambda x: x.reshape(-1, 3, 2, 2, 2).permute(0, 3, 1, 2, 4).flatten(2).transpose(1, 2),
    "flatten and back": lambda x: x.flatten(1).unflatten(-1, (3, -1)).unsqueeze(1).flatten(1, 2),
    "attention": lambda x: attend(x, x * 2, x + 1, 2),
    "attention to others": lambda x: attend(x, x[:, :2], x[:, :2] + 1, 2),
    "attention with a mask of keys": lambda x: attend(x, x * 2, x + 1, 2, bias=x[:, None, None, :, 0] * 9),
    "attention with a bias for all": lambda x: attend(x, x * 2, x + 1, 2, BIAS_2NN),
    "types": lambda x: x.to(torch.float32).float() + len(x[0, 0:1]) * x.ndim,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_those_of_torch(tmp_path: Path, name: str) -> None:
    function = FUNCTIONS[name]
    torch.testing.assert_close(in_graph(function, X, folder=tmp_path), function(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("index", [INDEX, OWN])
def test_tokens_are_taken_and_put_as_by_torch(tmp_path: Path, index: Tensor) -> None:
    """The same for every row, or each row's own: a tensor of two axes, whose first is known at run time alone."""

    def function(x: Any, *own: Any) -> Any:
        places = own[0] if own else INDEX
        return put(x, places, take(x, places) * 10)

    given = (X, OWN) if index is OWN else (X,)
    assert torch.equal(in_graph(function, *given, folder=tmp_path), function(*given))


class Layers(nn.Module):
    """Everything that has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.plain = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.norm, self.table = nn.LayerNorm(8), nn.Embedding(5, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("shift", torch.randn(3, 8))

    def forward(self, x: Any, y: Any) -> Any:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return (self.scale * q + k * v) + self.plain(x) + self.table(y)[:, None] + self.shift


def test_layers_are_those_of_torch(tmp_path: Path) -> None:
    layers, y = Layers().eval(), torch.tensor([4, 1])
    found = in_graph(lambda twin, x, y: twin(x, y), X, y, module=layers, folder=tmp_path)
    torch.testing.assert_close(found, layers(X, y).detach(), rtol=1e-5, atol=1e-5)


def test_times_of_a_table_are_embedded_ahead(tmp_path: Path) -> None:
    times = [999.0, 500.5, 0.0]

    def function(index: Any) -> Any:
        return time_features(lookup(index.graph, np.array(times), index, "fp32"), 8, 1.0)

    found = in_graph(function, torch.tensor([2, 1]), folder=tmp_path)
    assert torch.equal(found, time_features(torch.tensor(times)[[2, 1]], 8, 1.0))


def test_equal_nodes_are_one_and_what_nobody_needs_goes() -> None:
    g = Graph("test", Weights("", {}, {}), ANSWERS)
    x = g.input("x", "fp32", ["rows", 8])
    x.cast("fp16")
    g.output("out", F.silu(x) * F.silu(x) + 0 * x, ["rows", 8])
    assert [node.op_type for node in g.model().graph.node] == ["Sigmoid", "Mul", "Mul", "Mul", "Add"]


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a function": (lambda x: torch.cumsum(x, 1), "torch.cumsum has no ONNX form"),
    "a method": (lambda x: x.cumsum(1), r"torch\.Tensor\.cumsum has"),
    "an operator": (lambda x: x**2, "pow"),
    "an argument": (lambda x: x.topk(1, out=None), "topk with these arguments.*out"),
    "a property": (lambda x: x.is_cuda, r"torch\.Tensor\.is_cuda"),
    "a decision": (lambda x: x if x.mean(1) else 0, "a decision that depends on a value"),
    "the batch size": (lambda x: len(x), "number of rows"),
    "a range of the batch": (lambda x: x[:-1], "the range None:-1 of an axis"),
    "unequal shapes": (lambda x: x + torch.zeros(3, 7), "elementwise operation on the shapes"),
    "unequal parts": (lambda x: x.chunk(3, 2), "parts of different sizes"),
    "two open sizes": (lambda x: x.transpose(0, 1).reshape(x.shape[0], -1, 8), "more than one size"),
    "another norm": (lambda x: F.layer_norm(x, x.shape[1:]), r"a norm over \(3, 8\)"),
    "a type": (lambda x: x * torch.zeros(8, dtype=torch.complex64), "complex64"),
    "other weights": (lambda x: F.linear(x, torch.zeros(8, 8)), "no parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_onnx_form_is_named(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(ExportError, match=message):
        in_graph(function, X)


class Sorting(nn.Module):
    """An operation without an ONNX form."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


@pytest.mark.parametrize(
    ("place", "where"),
    [("attn.proj", r"attn\.proj of blocks\.2\."), ("norm2", r"norm2 of blocks\.2\."), ("mlp.fc1", r"fc1 of mlp of blocks\.2\.")],
)
def test_operation_module_and_block_are_named_before_anything_is_written(tmp_path: Path, place: str, where: str) -> None:
    model: DiT = make_teacher()
    model.blocks[2].set_submodule(place, Sorting())
    plan, message = make_plan(model, (FULL, (skip(0, 4),))), rf"torch\.Tensor\.cumsum has no ONNX form here; it is called in {where}"
    with pytest.raises(ExportError, match=message) as caught:
        write_unproved(model, plan, lower(plan, "cpu"), tmp_path, "fp32")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ExportError, match=message):
        export_artefact(model, plan, tmp_path / "artefact", "fp32", "cpu", 1, lambda _: None)
    assert list(tmp_path.iterdir()) == []
