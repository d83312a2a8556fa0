"""Convert an ONNX graph to another operator version, for older and newer runtimes.

`onnx.version_converter` supports few of the downgrades needed here. A network's graph has two dozen
operators: most differ only in the types they accept, and the others are rewritten.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from arcface_jax.convert.packages import require
from arcface_jax.errors import UserError

OLDEST = 13
IR_VERSIONS = 7, 8
"""The oldest file format that supports `OLDEST`, and the default."""
# Operators whose newer versions only accept more types, from 13 on.
_WIDENED = (
    *("Abs", "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant"),
    *("ConstantOfShape", "Conv", "DequantizeLinear", "Div", "Dropout", "Equal", "Erf", "Exp"),
    *("Expand", "Flatten", "Gather", "Gemm", "GlobalAveragePool", "GreaterOrEqual"),
    *("HardSigmoid", "HardSwish", "Identity", "LessOrEqual", "Log", "MatMul", "Max", "MaxPool"),
    *("Min", "Mul", "Neg", "Not", "PRelu", "Pow", "QuantizeLinear", "Range", "Reciprocal"),
    *("Relu", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Sqrt", "Squeeze", "Sub", "Tanh"),
    *("Transpose", "Unsqueeze", "Where"),
)
_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSumSquare")
Nodes = list[Any]


def newest() -> int:
    """Returns the newest version that the installed onnx package has."""
    return require("onnx").defs.onnx_opset_version()


def check(opset: int, ir_version: int) -> None:
    """Refuses versions that exports do not support.

    Raises:
      UserError: with the range of each.
    """
    newest_ir = int(require("onnx").IR_VERSION)
    if not OLDEST <= opset <= newest():
        raise UserError(f"--opset {opset}: expected {OLDEST} to {newest()}")
    if not IR_VERSIONS[0] <= ir_version <= newest_ir:
        raise UserError(f"--ir-version {ir_version}: expected {IR_VERSIONS[0]} to {newest_ir}")


def convert(model: Any, opset: int) -> None:
    """Changes the version of a model's operators, in place.

    Args:
      model: an `onnx.ModelProto` without control flow.
      opset: the version, at least 13.

    Raises:
      UserError: an operator is missing or has another meaning in that version.
    """
    (entry,) = (entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    before, entry.version = entry.version, opset
    graph, nodes = model.graph, []
    for node in graph.node:
        nodes += [node] if node.domain else _converted(graph, node, before, opset)
    del graph.node[:]
    graph.node.extend(nodes)
    names = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in names]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _converted(graph: Any, node: Any, before: int, after: int) -> Nodes:
    """Converts one operator to operators of another version."""
    for changed_at, operators, rewrite in _REWRITES:
        if node.op_type in operators and after < changed_at <= before:
            return rewrite(graph, node)
    if _since(node.op_type, before) != _since(node.op_type, after) and (
        node.op_type not in _WIDENED or _since(node.op_type, after) is None
    ):
        raise UserError(
            f"--opset {after}: {node.op_type} of the graph, written at {before}, has no known form "
            "there: choose a version nearer to that"
        )
    return [node]


def _since(operator: str, opset: int) -> int | None:
    """Returns the version that defined an operator's current meaning; None if it is missing."""
    onnx = require("onnx")
    try:
        return onnx.defs.get_schema(operator, opset).since_version
    except onnx.defs.SchemaError:
        return None


def _layer_normalization(graph: Any, node: Any) -> Nodes:
    """Expresses (x - mean) / sqrt(variance + epsilon) * scale + bias, over the last axis."""
    onnx = require("onnx")
    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if options.get("axis", -1) != -1 or len(node.output) > 1:
        raise UserError("LayerNormalization over several axes has no form below --opset 17")
    (x, *weights), out = node.input, node.output[0]
    epsilon = _constant(graph, f"{out}/epsilon", np.float32(options.get("epsilon", 1e-5)))
    nodes = [
        onnx.helper.make_node("ReduceMean", [x], [f"{out}/mean"], axes=[-1], keepdims=1),
        onnx.helper.make_node("Sub", [x, f"{out}/mean"], [f"{out}/centered"]),
        onnx.helper.make_node("Mul", [f"{out}/centered"] * 2, [f"{out}/square"]),
        onnx.helper.make_node(
            "ReduceMean", [f"{out}/square"], [f"{out}/variance"], axes=[-1], keepdims=1
        ),
        onnx.helper.make_node("Add", [f"{out}/variance", epsilon], [f"{out}/positive"]),
        onnx.helper.make_node("Sqrt", [f"{out}/positive"], [f"{out}/deviation"]),
        onnx.helper.make_node("Div", [f"{out}/centered", f"{out}/deviation"], [f"{out}/0"]),
    ]
    for number, (operator, weight) in enumerate(zip(("Mul", "Add"), weights, strict=False), 1):
        given = [f"{out}/{number - 1}", weight]
        nodes.append(onnx.helper.make_node(operator, given, [f"{out}/{number}"]))
    nodes[-1].output[0] = out
    return nodes


def _axes_as_attribute(graph: Any, node: Any) -> Nodes:
    axes = _values(graph, node.input[1]) if len(node.input) > 1 else None
    _drop(node, "noop_with_empty_axes")
    del node.input[1:]
    if axes is not None:
        node.attribute.append(require("onnx").helper.make_attribute("axes", axes))
    return [node]


def _split_evenly(graph: Any, node: Any) -> Nodes:
    _drop(node, "num_outputs")  # without sizes, older versions also split evenly
    return [node]


def _reshape_without_zero(graph: Any, node: Any) -> Nodes:
    _drop(node, "allowzero")  # no network has an axis of length 0
    return [node]


def _slice_of_shape(graph: Any, node: Any) -> Nodes:
    """Expresses Shape with `start` and `end` as Shape and Slice."""
    onnx = require("onnx")
    options = {a.name: a.i for a in node.attribute}
    _drop(node, *options)
    if not options:
        return [node]
    out = node.output[0]
    node.output[0] = f"{out}/whole"
    bounds = {"start": options.get("start", 0), "end": options.get("end", np.iinfo(np.int64).max)}
    names = [
        _constant(graph, f"{out}/{name}", np.array([value], np.int64))
        for name, value in bounds.items()
    ]
    return [node, onnx.helper.make_node("Slice", [node.output[0], *names], [out])]


_REWRITES: tuple[tuple[int, tuple[str, ...], Callable[[Any, Any], Nodes]], ...] = (
    (17, ("LayerNormalization",), _layer_normalization),
    (18, _REDUCTIONS, _axes_as_attribute),
    (18, ("Split",), _split_evenly),
    (14, ("Reshape",), _reshape_without_zero),
    (15, ("Shape",), _slice_of_shape),
)


def _constant(graph: Any, name: str, value: np.ndarray | np.generic) -> str:
    graph.initializer.append(require("onnx").numpy_helper.from_array(np.asarray(value), name))
    return name


def _values(graph: Any, name: str) -> list[int]:
    onnx = require("onnx")
    for tensor in graph.initializer:
        if tensor.name == name:
            return onnx.numpy_helper.to_array(tensor).astype(int).ravel().tolist()
    for node in graph.node:
        if name in node.output and node.op_type == "Constant":
            return onnx.numpy_helper.to_array(node.attribute[0].t).astype(int).ravel().tolist()
    raise UserError("axes that are computed have no form below --opset 18")


def _drop(node: Any, *names: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)
