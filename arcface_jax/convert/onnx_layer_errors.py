"""Measure the error of each layer of a quantized ONNX graph against the float graph."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arcface_jax.convert.onnx_runner import onnx_embedder
from arcface_jax.convert.packages import require

WEIGHTED = ("Conv", "Gemm", "MatMul")


class LayerError(NamedTuple):
    """Error of a layer's output in int8 against float."""

    layer: str
    """Name of its weight."""
    operator: str
    error: float
    """||a - b|| / ||b|| over all images, b in float; includes errors of earlier layers."""
    quantized: bool
    """False for layers that are kept in float."""


def weighted(graph: Any) -> list[Any]:
    """Returns the nodes with weights, from the input to the output."""
    weights = {tensor.name for tensor in graph.initializer}
    return [
        node for node in graph.node if node.op_type in WEIGHTED and weights.intersection(node.input)
    ]


def errors(
    reference: Path, quantized: Path, images: np.ndarray, *, kept: set[str]
) -> list[LayerError]:
    """Runs both graphs and compares the outputs of their layers.

    Args:
      reference: the float graph.
      quantized: the other, whose tensors have the same names.
      images: (n, 112, 112, 3) uint8 RGB.
      kept: names of the nodes of the reference that stay in float.

    Returns:
      One for each layer with weights, from the input to the output.
    """
    onnx = require("onnx")
    nodes = weighted(onnx.load(str(reference), load_external_data=False).graph)
    names = [node.output[0] for node in nodes]
    prepare = onnx_embedder(reference).prepare
    sessions = [_exposed(path, names) for path in (reference, quantized)]
    squares = np.zeros((2, len(names)))
    for image in images:  # one by one, because all activations are kept
        x = {sessions[0].get_inputs()[0].name: prepare(image[None])}
        for number, (b, a) in enumerate(zip(*(s.run(names, x) for s in sessions), strict=True)):
            squares[:, number] += np.sum(np.square(a - b)), np.sum(np.square(b))
    relative = np.sqrt(squares[0] / np.maximum(squares[1], np.finfo(float).tiny))
    return [
        LayerError(_weight(node), node.op_type, float(error), node.name not in kept)
        for node, error in zip(nodes, relative, strict=True)
    ]


def _weight(node: Any) -> str:
    """Returns a layer's name: its weight's name without the exporter's prefix and suffix."""
    return node.input[1].removeprefix("network.").removesuffix(".weight")


def _exposed(path: Path, names: list[str]) -> Any:
    """Opens a session whose outputs are these tensors."""
    onnx, onnxruntime = require("onnx"), require("onnxruntime")
    model = onnx.load(str(path))
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
