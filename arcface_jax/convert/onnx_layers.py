"""Read the layers of an ONNX graph from any exporter, with their weights.

BatchNorm nodes, BatchNorms folded into convolutions and matrix products, initializers among the
inputs (MXNet), LayerNorm as one node or as its parts, constants as nodes or initializers, and
weights in an external file are all supported. Quantized graphs and loops are refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from arcface_jax.convert import onnx_bounds
from arcface_jax.convert.layer_sequence import INPUT, Layer, LayerGraph, Place
from arcface_jax.errors import UserError, install

# Operations that read an image's data only through their first input; the others are shapes.
_FIRST_ONLY = (
    *("Cast", "Clip", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "Identity"),
    *("MaxPool", "Pow", "Reshape", "Resize", "Shape", "Slice", "Split", "Squeeze", "Tile"),
    *("Transpose", "Unsqueeze"),
)
_ACTIVATIONS = (
    *("Celu", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish"),
    *("Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"),
)
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")
_QUANTIZED = ("Quant", "Integer", "QLinear")
_LOOPS = ("If", "Loop", "Scan")


class BatchNormArrays(NamedTuple):
    """A BatchNorm in the file."""

    scale: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    epsilon: float


class OnnxLayers(NamedTuple):
    """Layers and preprocessing of a graph."""

    layers: list[Layer]
    mean: float
    scale: float
    """Before its first layer, the graph computes (x - mean) / scale."""
    is_float16: bool


class UnknownGraph(UserError):
    """Raised for a graph that is not a sequence of known layers."""


def read(path: Path) -> OnnxLayers:
    """Reads the layers of a file.

    Raises:
      UserError: it is not an ONNX file, it is quantized, or no network of this project has one of
        its operations.
    """
    model = _load(path)
    quantized = [n.op_type for n in model.graph.node if any(q in n.op_type for q in _QUANTIZED)]
    if quantized:
        raise UnknownGraph(
            f"{path} is quantized ({quantized[0]} and {len(quantized) - 1} such nodes more), and "
            "int8 weights cannot be trained: name the float model that it was made from"
        )
    return _Reader(path, model).read()


def _load(path: Path) -> Any:
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise UserError(f"reading {path} needs the package onnx: {install('onnx')}") from error
    if not path.is_file():
        raise UserError(f"no model at {path}: name an existing .onnx file")
    onnx_bounds.check(path)
    try:
        model = onnx.load(str(path))
        return onnx.inliner.inline_local_functions(model) if model.functions else model
    except Exception as error:
        # protobuf's and onnx's exceptions have no base class in common.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not an ONNX file that can be read: {first}") from error


class _Reader:
    """Processes the nodes once, in the order of the file, which has inputs before outputs."""

    def __init__(self, path: Path, model: Any):
        self._path, self._graph_proto = path, model.graph
        self._graph = LayerGraph()
        self._constants: dict[str, np.ndarray] = {}
        self._places: dict[str, Place] = {}
        self._zero, self._unit = 0.0, 1.0  # the pixels' normalization so far: (x - zero) / unit

    def read(self) -> OnnxLayers:
        from onnx import numpy_helper

        initializers = self._graph_proto.initializer
        for tensor in initializers:
            self._constants[tensor.name] = numpy_helper.to_array(tensor)
        images = [x.name for x in self._graph_proto.input if x.name not in self._constants]
        if len(images) != 1:
            raise self._unknown(f"has {len(images)} inputs ({', '.join(images)}), not one of faces")
        self._places[images[0]] = INPUT
        for node in self._graph_proto.node:
            self._read_node(node)
        outputs = [self._places.get(x.name) for x in self._graph_proto.output]
        found = [self._graph.sequence(place) for place in outputs if place is not None]
        if not found:
            raise self._unknown("has no output that depends on the image")
        layers = max(found, key=_embedding_width)  # for example of an embedding and its length
        types = {array.dtype for layer in layers for array in (layer.weight,) if array is not None}
        return OnnxLayers(layers, self._zero, self._unit, np.dtype(np.float16) in types)

    def _read_node(self, node: Any) -> None:
        constant = self._constant(node)
        if constant is not None:
            self._constants[node.output[0]] = constant
            return
        names = list(node.input[:1] if node.op_type in _FIRST_ONLY else node.input)
        reads = [self._places[name] for name in names if name in self._places]
        if not reads:  # reads shapes only
            return
        place = self._place(node, reads)
        for name in node.output:
            self._places[name] = place

    def _constant(self, node: Any) -> np.ndarray | None:
        """Evaluates a node that reads only constants, if a weight may pass through it."""
        if node.op_type == "Constant":
            from onnx import numpy_helper

            values = [a.t for a in node.attribute if a.name == "value"]
            numbers = [a.f if a.name == "value_float" else a.i for a in node.attribute]
            return numpy_helper.to_array(values[0]) if values else np.asarray(numbers[:1])
        given = [self._constants[name] for name in node.input if name in self._constants]
        compute = _ON_CONSTANTS.get(node.op_type)
        if compute is None or not given or len(given) < sum(map(bool, node.input)):
            return None
        return compute(given, _attributes(node))

    def _place(self, node: Any, reads: list[Place]) -> Place:
        """Returns where the result of a node on data is."""
        kind, first = node.op_type, reads[0]
        if kind in _LOOPS:
            raise self._unknown(f"has a {kind} at node {node.name or node.output[0]}")
        arrays = [self._constants[name] for name in node.input if name in self._constants]
        make = _LAYERS.get(kind)
        if make is not None and (arrays or kind != "MatMul"):
            if any(name and name not in self._constants for name in node.input[1:]):
                raise self._unknown(
                    f"computes the weights of the {kind} at node {node.name or node.output[0]}; "
                    "expected constants"
                )
            layers = make(arrays, _attributes(node))
            for layer in layers:
                first = self._graph.layer(layer._replace(where=node.name or node.output[0]), first)
            return first
        if kind in _ARITHMETIC and arrays:
            return self._arithmetic(node, first, np.asarray(arrays[0]))
        if kind in _ACTIVATIONS:
            layer = Layer("activation", (), (kind, *self._bounds(node)), where=node.name)
            return self._graph.layer(layer, first)
        if len(set(reads)) > 1 and kind != "Add":
            raise self._unknown(
                f"joins branches by {kind} at node {node.name or node.output[0]}, which no network "
                "that can be read from ONNX does. If it is an EdgeFace, import its .pth file"
            )
        return self._graph.addition(reads)

    def _arithmetic(self, node: Any, place: Place, array: np.ndarray) -> Place:
        """Handles data combined with a constant: normalization, a bias or scale, or a number."""
        kind, backwards = node.op_type, node.input[0] in self._constants
        if place == INPUT and np.unique(array).size == 1:
            if backwards and kind in ("Sub", "Div"):
                raise self._unknown(f"negates or inverts its pixels at node {node.name}")
            self._normalize(kind, float(array.ravel()[0]))
            return place
        if array.size == 1:  # part of attention or LayerNorm; parity is checked later
            return place
        shape = np.squeeze(array).shape
        values = array.reshape(shape if len(shape) == 1 else array.shape)
        name = node.name or node.output[0]
        if kind in ("Add", "Sub") and not (kind == "Sub" and backwards):
            values = values if kind == "Add" else -values
            return self._graph.layer(Layer("table", values.shape, weight=values, where=name), place)
        if kind == "Mul" and len(shape) == 1:
            return self._graph.layer(Layer("norm", shape, weight=values, where=name), place)
        raise self._unknown(f"has a {kind} by an array of {array.shape} at node {name}")

    def _normalize(self, kind: str, value: float) -> None:
        match kind:
            case "Sub":
                self._zero += value * self._unit
            case "Add":
                self._zero -= value * self._unit
            case "Mul":
                self._unit /= value
            case "Div":
                self._unit *= value

    def _bounds(self, node: Any) -> tuple[float, ...]:
        """Returns the bounds of a Clip, or the settings of another activation."""
        attributes = _attributes(node)
        if node.op_type != "Clip":
            return tuple(float(v) for v in attributes.values() if isinstance(v, int | float))
        limits = [float(attributes.get("min", -np.inf)), float(attributes.get("max", np.inf))]
        for position, name in enumerate(node.input[1:3]):
            if name in self._constants:
                limits[position] = float(self._constants[name])
        return tuple(limits)

    def _unknown(self, why: str) -> UnknownGraph:
        return UnknownGraph(f"{self._path} is not a network that can be trained here: it {why}")


def _embedding_width(layers: list[Layer]) -> int:
    return layers[-1].shape[0] if layers and layers[-1].kind in ("linear", "batchnorm") else 0


def _attributes(node: Any) -> dict[str, Any]:
    import onnx.helper

    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _convolution(arrays: list[np.ndarray], attributes: dict[str, Any]) -> list[Layer]:
    strides = tuple(attributes.get("strides", (1, 1)))
    padding = tuple(attributes.get("pads", (0, 0, 0, 0)))
    settings = (strides, padding, attributes.get("group", 1))
    if set(attributes.get("dilations", (1, 1))) != {1}:
        settings += (f"dilations {tuple(attributes['dilations'])}",)
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        settings += (attributes["auto_pad"].decode(),)
    return [Layer("conv", arrays[0].shape, settings, arrays[0], _second(arrays))]


def _product(arrays: list[np.ndarray], attributes: dict[str, Any]) -> list[Layer]:
    weight = arrays[0] if attributes.get("transB") else arrays[0].T
    weight = weight * np.float32(attributes.get("alpha", 1))
    bias = _second(arrays)
    if bias is not None:
        bias = bias.ravel() * np.float32(attributes.get("beta", 1))
    return [Layer("linear", weight.shape, (), weight, bias)]


def _matrix_product(arrays: list[np.ndarray], attributes: dict[str, Any]) -> list[Layer]:
    return [Layer("linear", arrays[0].T.shape, (), arrays[0].T)]


def _batch_norm(arrays: list[np.ndarray], attributes: dict[str, Any]) -> list[Layer]:
    scale, bias, mean, var = arrays
    norm = BatchNormArrays(scale, bias, mean, var, float(attributes.get("epsilon", 1e-5)))
    return [Layer("batchnorm", scale.shape, batchnorm=norm)]


def _layer_norm(arrays: list[np.ndarray], attributes: dict[str, Any]) -> list[Layer]:
    return [Layer("norm", arrays[0].shape, (), arrays[0], _second(arrays))]


def _prelu(arrays: list[np.ndarray], attributes: dict[str, Any]) -> list[Layer]:
    return [Layer("prelu", (arrays[0].size,), (), arrays[0].ravel())]


def _second(arrays: list[np.ndarray]) -> np.ndarray | None:
    return arrays[1] if len(arrays) > 1 else None


_Make = Callable[[list[np.ndarray], dict[str, Any]], list[Layer]]
_LAYERS: dict[str, _Make] = {
    "Conv": _convolution,
    "Gemm": _product,
    "MatMul": _matrix_product,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "PRelu": _prelu,
}


def _transposed(given: list[np.ndarray], attributes: dict[str, Any]) -> np.ndarray:
    return given[0].transpose(cast("list[int] | None", attributes.get("perm")))


_ON_CONSTANTS: dict[str, Callable[[list[np.ndarray], dict[str, Any]], np.ndarray]] = {
    "Identity": lambda given, _: given[0],
    "Cast": lambda given, _: given[0],
    "Transpose": _transposed,
    "Squeeze": lambda given, _: np.squeeze(given[0]),
    "Unsqueeze": lambda given, _: given[0],  # a bias or a slope; its axes do not matter
    "Reshape": lambda given, _: given[0],
}
