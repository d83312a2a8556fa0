"""Find how an ONNX file expects its input: from its metadata, otherwise from its graph.

In this order:
- `model_input`, the JSON in this project's exports, or the older keys `mean`, `scale` and
  `color_order`: what the caller does outside the graph (0, 1 and RGB if the graph does it all);
- the values of the first operations: a subtraction of about 127.5 (or of the pixels' means) is for
  0 .. 255, one of about 0.5 for 0 .. 1, whatever the nodes are called;
- if these cannot be read, the names of the first eight nodes, as in insightface's Python package
  reads them: Sub or _minus and Mul or _mul normalize inside;
- otherwise (x - 127.5) / 127.5, RGB.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from arcface_jax.config.choices import ColorOrder
from arcface_jax.errors import UserError, install
from arcface_jax.evaluation.model_input import Layout
from arcface_jax.models import preprocess

METADATA_KEYS = ("mean", "scale", "color_order")
_INSTALL = install("onnx")
_NAMED_NODES = 8
_TO_CHANNELS_FIRST = [0, 3, 1, 2]
# Zero points, in the input's units, of graphs that take 0 .. 255 and 0 .. 1.
_BYTE_CENTER = (64, 192)
_UNIT_CENTER = (0.3, 0.7)
# A smaller factor without a subtraction maps bytes to about one.
_BYTE_FACTOR = 0.05
# Smallest difference of the channels' means, as a share of the range, that reveals their order.
_COLOR_LEAN = 0.04


class Preparation(NamedTuple):
    """What the caller does to an image before passing it to the graph: (x - mean) / scale."""

    mean: float = preprocess.MEAN
    scale: float = preprocess.SCALE
    color_order: ColorOrder = "RGB"
    guesses: tuple[str, ...] = ()
    """Values that metadata did not state, with the reason for each guess."""


def from_metadata(path: Path, metadata: Mapping[str, str]) -> Preparation | None:
    """Reads the older keys; returns None if one of them is missing.

    Raises:
      UserError: their values are invalid.
    """
    if not all(key in metadata for key in METADATA_KEYS):
        return None
    mean, scale, order = (metadata[key] for key in METADATA_KEYS)
    try:
        numbers = float(mean), float(scale)
    except ValueError:
        numbers = 0.0, 0.0
    if order not in ("RGB", "BGR") or not numbers[1] > 0 or not math.isfinite(sum(numbers)):
        raise UserError(
            f"{path}: the metadata has mean {mean!r}, scale {scale!r}, color_order {order!r}; "
            "expected two numbers, the second above 0, and RGB or BGR: export the model again"
        )
    return Preparation(*numbers, cast("ColorOrder", order))


def from_graph(graph: Any) -> Preparation:
    """Infers the preparation from the first operations of an `onnx.GraphProto`."""
    walked = _walk(graph)
    if walked.factor is not None:
        return _from_values(walked)
    names = [node.name for node in graph.node[:_NAMED_NODES]]
    inside = [
        any(name.startswith(begin) for name in names)
        for begin in (("Sub", "_minus"), ("Mul", "_mul"))
    ]
    if all(inside):
        why = "it takes 0 .. 255, as its first nodes are named Sub and Mul"
        return Preparation(0, 1, guesses=(why, _RGB))
    return Preparation(guesses=("it takes (x - 127.5) / 127.5, as nothing in it differs", _RGB))


def layout(graph: Any) -> Layout:
    """Returns NHWC if the input is first transposed to channels first; for ambiguous shapes."""
    for node in _consumers(graph, graph_input(graph)):
        for attribute in node.attribute:
            if node.op_type == "Transpose" and list(attribute.ints) == _TO_CHANNELS_FIRST:
                return "NHWC"
    return "NCHW"


def load_graph(path: Path) -> Any:
    """Loads the `onnx.GraphProto` of a file, without weights in external files.

    Raises:
      UserError: the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError(
            f"{path} carries no metadata on its input, and reading its first nodes needs the "
            f"package onnx: {_INSTALL}"
        ) from error
    try:
        return onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's and onnx's exceptions have no base class in common
        reason = (str(error) or repr(error)).partition("\n")[0][:200]
        raise UserError(f"{path} is not an ONNX file that can be read: {reason}") from error


def graph_input(graph: Any) -> str:
    """Returns the name of the first input that is not a weight."""
    weights = {tensor.name for tensor in graph.initializer}
    return next(value.name for value in graph.input if value.name not in weights)


_RGB = "RGB, as nothing in it tells"


class _Walked(NamedTuple):
    """The first operations as factor * x + offset, per channel; None if they cannot be read."""

    factor: np.ndarray | None
    offset: np.ndarray | None
    nodes: tuple[str, ...] = ()


def _from_values(walked: _Walked) -> Preparation:
    factor, offset = np.asarray(walked.factor), np.asarray(walked.offset)
    zero = -offset / factor  # in the input's units
    middle, steps = float(np.mean(zero)), " and ".join(walked.nodes)
    if not walked.nodes:
        why = "it takes (x - 127.5) / 127.5, as it does not normalize before its first layer"
        return Preparation(guesses=(why, _RGB))
    if _BYTE_CENTER[0] < middle < _BYTE_CENTER[1]:
        lean = (zero[0] - zero[-1]) / 255
        why = f"it takes 0 .. 255, as its {steps} subtract {middle:.4g}"
        return Preparation(0, 1, *_color_order(lean, why))
    if _UNIT_CENTER[0] < middle < _UNIT_CENTER[1]:
        why = f"it takes 0 .. 1, as its {steps} subtract {middle:.4g}"
        return Preparation(0, 255, *_color_order(zero[0] - zero[-1], why))
    if abs(float(np.mean(factor))) < _BYTE_FACTOR:
        why = f"it takes 0 .. 255, as its {steps} divide by {1 / float(np.mean(factor)):.4g}"
        return Preparation(0, 1, guesses=(why, _RGB))
    why = f"it takes (x - 127.5) / 127.5, as its {steps} subtract {middle:.4g}"
    return Preparation(guesses=(why, _RGB))


def _color_order(lean: float, why: str) -> tuple[ColorOrder, tuple[str, ...]]:
    """Infers the order from the first and last channel's means: photographs are redder than blue.

    Args:
      lean: how much more is subtracted from the first channel, as a share of the range.
      why: the reason for mean and scale; precedes the reason for the order.
    """
    if abs(lean) < _COLOR_LEAN:
        return "RGB", (why, _RGB)
    order: ColorOrder = "RGB" if lean > 0 else "BGR"
    which = "more" if lean > 0 else "less"
    return order, (why, f"{order}, as {which} is subtracted from its first channel than its last")


def _walk(graph: Any) -> _Walked:
    """Follows the input through operations with constants, to the first one with weights."""
    constants = _Constants(graph)
    name, nodes = graph_input(graph), []
    factor, offset = np.ones(3), np.zeros(3)
    while True:
        following = [n for n in _consumers(graph, name) if n.op_type != "Shape"]
        if len(following) != 1:
            return _Walked(None, None)
        node = following[0]
        if node.op_type in ("Identity", "Cast", "Transpose"):
            name = node.output[0]
            continue
        step = _step(node, name, constants)
        if step is None:
            break
        factor, offset = factor * step[0], offset * step[0] + step[1]
        nodes.append(node.op_type)
        name = node.output[0]
    if not nodes and node.op_type not in ("Conv", "Gemm", "MatMul", "Pad"):
        return _Walked(None, None)
    if not (np.isfinite(factor).all() and np.isfinite(offset).all() and factor.all()):
        return _Walked(None, None)
    return _Walked(factor, offset, tuple(nodes))


def _step(node: Any, name: str, constants: "_Constants") -> tuple[np.ndarray, np.ndarray] | None:
    """Returns an operation as factor and offset, per channel; None for other operations."""
    ones, zeros = np.ones(3), np.zeros(3)
    if node.op_type == "BatchNormalization":
        values = [constants.of(given) for given in node.input[1:]]
        if any(value is None for value in values):
            return None
        scale, bias, mean, variance = (cast("np.ndarray", value) for value in values)
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        return factor, bias - mean * factor
    if node.op_type not in ("Sub", "Add", "Mul", "Div"):
        return None
    second = node.input[0] != name
    value = constants.of(node.input[0 if second else 1])
    if value is None or (second and node.op_type == "Div"):
        return None
    if node.op_type == "Sub":
        return (-ones, value) if second else (ones, -value)
    if node.op_type == "Add":
        return ones, value
    return (value, zeros) if node.op_type == "Mul" else (1 / value, zeros)


class _Constants:
    """The small constants of a graph, broadcast to three channels."""

    def __init__(self, graph: Any):
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self._tensors[node.output[0]] = attribute.t

    def of(self, name: str) -> np.ndarray | None:
        """Returns (3,) float64, or None if it is not a constant of one or three numbers."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.data_location or math.prod(tensor.dims) not in (1, 3):
            return None
        import onnx.numpy_helper

        values = onnx.numpy_helper.to_array(tensor).astype(np.float64).ravel()
        return np.broadcast_to(values, (3,))


def _consumers(graph: Any, name: str) -> Sequence[Any]:
    return [node for node in graph.node if name in node.input]
