"""A graph that torch's exporter traced at one image, made to take any number of them, and the memory that it needs for one.

The trace holds shapes as numbers, or as nodes that compute them from a tensor's own. All of them are worked out here, so that no node
computes a shape at run time, and the first entry of every new shape, the number of images, is taken from the tensor that is reshaped.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from export.compiler.symbolic import ExportError

BATCH, SEVERAL = "images", 3
_VIEWS = ("Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten")  # no new values


def for_any_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with a free first dimension of its inputs and outputs.

    Args:
        model: traced at one image; the first dimension of every activation counts images.

    Raises:
        ExportError: if some node keeps the shape of one image.
    """
    sizes = static_shapes(model)
    model = _without_constants(model, sizes)
    for node in model.graph.node:
        if node.op_type == "Reshape":
            _free_first(model.graph, node, sizes)
    read = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    _require_free(model, sizes)
    return model


def static_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of all values whose shape is known; a free dimension counts as 1, one image."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    shapes = {v.name: tuple(d.dim_value or 1 for d in v.type.tensor_type.shape.dim) for v in values}
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}


def live_bytes(model: onnx.ModelProto) -> int:
    """Bytes of activations that are held at once while one image runs, each from the node that writes it to the last that reads it.

    Inputs and outputs count, weights do not; what only looks at another value's numbers in another shape takes none.
    """
    sizes, graph = static_shapes(model), model.graph
    weights = {tensor.name for tensor in graph.initializer}
    source: dict[str, str] = {}
    last = {value.name: len(graph.node) for value in graph.output}
    for place, node in enumerate(graph.node):
        if node.op_type in _VIEWS:
            source[node.output[0]] = source.get(node.input[0], node.input[0])
        for name in (source.get(name, name) for name in (*node.input, *node.output)):
            last[name] = max(last.get(name, 0), place)
    for value in graph.output:
        last[source.get(value.name, value.name)] = len(graph.node)
    held = {value.name for value in graph.input}
    most = 0
    for place, node in enumerate(graph.node):
        held |= {source.get(name, name) for name in node.output}
        most = max(most, sum(4 * math.prod(sizes[name]) for name in held - weights))
        held = {name for name in held if last[name] > place}
    return most


def _without_constants(model: onnx.ModelProto, sizes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """The graph with everything worked out that depends on weights and shapes alone."""
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    stay = []
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0] in sizes:
            known[node.output[0]] = np.array(sizes[node.input[0]], np.int64)
        elif all(name in known for name in node.input if name):
            alone = onnx.helper.make_graph([node], "one", [_free(name) for name in node.input if name], list(map(_free, node.output)))
            runner = ReferenceEvaluator(onnx.helper.make_model(alone, opset_imports=model.opset_import))
            given = {name: known[name] for name in node.input if name}
            known |= dict(zip(node.output, map(np.asarray, runner.run(None, given)), strict=True))
        else:
            stay.append(node)
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    read = {name for node in stay for name in node.input}
    del folded.graph.node[:], folded.graph.initializer[:], folded.graph.value_info[:]
    folded.graph.node.extend(stay)
    folded.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in known.items() if name in read)
    return folded


def _free(name: str) -> onnx.ValueInfoProto:
    return onnx.helper.make_empty_tensor_value_info(name)


def _free_first(graph: onnx.GraphProto, node: onnx.NodeProto, sizes: dict[str, tuple[int, ...]]) -> None:
    """Let a Reshape take its first dimension, one image, from what it reshapes: 0 means so."""
    target = next((numpy_helper.to_array(t) for t in graph.initializer if t.name == node.input[1]), None)
    if target is None or target[0] not in (0, 1) or sizes[node.input[0]][0] != 1:
        raise ExportError(f"the decoder reshapes {node.input[0]} so that images cannot be told apart from the rest of its numbers.")
    name = f"{node.output[0]}.shape"
    graph.initializer.append(numpy_helper.from_array(np.concatenate([[0], target[1:]]).astype(np.int64), name))
    node.input[1] = name


def _require_free(model: onnx.ModelProto, sizes: dict[str, tuple[int, ...]]) -> None:
    """As many images come out as go in, because the nodes say so, not because it is declared."""
    several = onnx.ModelProto()
    several.CopyFrom(model)
    for value in several.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = SEVERAL
    for value in several.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in onnx.shape_inference.infer_shapes(several, strict_mode=True, data_prop=True).graph.output:
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if dims != [SEVERAL, *sizes[value.name][1:]]:
            raise ExportError(
                f"of {SEVERAL} images the decoder's {value.name} came out as {dims}: a node keeps the shape of one image."
            )
