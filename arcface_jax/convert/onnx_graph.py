"""Write a backbone as an ONNX graph, in the form that insightface's clients expect."""

import contextlib
import dataclasses
import gc
import logging
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arcface_jax.config.choices import GraphInput, Normalization
from arcface_jax.convert import onnx_from_jax, onnx_opset, twins, weights
from arcface_jax.convert.packages import require
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.errors import UserError
from arcface_jax.evaluation import model_input
from arcface_jax.models import preprocess
from arcface_jax.training.network import Network

OPSET = 18
"""Version requested from torch's exporter; `onnx_opset` converts to others."""
INPUT, OUTPUT, BATCH = "input", "embedding", "batch"
# insightface's clients take an input of 0 .. 255 where names among the first eight nodes begin
# with Sub and Mul; otherwise they normalize. Other nodes have names that begin with neither.
NORMALIZERS = ("Sub", "Mul")
# A protocol buffer is limited to 2 GiB; larger weights go to a file next to the graph.
_LARGEST_FILE = 1_900_000_000


class _FromPixels(torch.nn.Module):
    """A network that normalizes its own input."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Maps (B, 3, 112, 112) of 0 .. 255, RGB, to (B, D)."""
        return self.network((pixels - preprocess.MEAN) * (1 / preprocess.SCALE))


@dataclass(frozen=True, kw_only=True)
class Form:
    """Format of a float32 graph, as required by the runtimes and code that will run it."""

    input: GraphInput = "float"
    normalization: Normalization | None = None
    """Where to normalize; by default outside, except in a graph that takes uint8."""
    opset: int | None = None
    """Version of the operators; by default the exporter's: 18, or 23 for jax2onnx."""
    ir_version: int = onnx_opset.IR_VERSIONS[1]
    """Version of the file format."""

    @property
    def inside(self) -> bool:
        """Whether the graph normalizes."""
        return self.input == "uint8-nhwc" or self.normalization == "inside"

    def check(self) -> None:
        """Refuses parts of a graph that contradict each other or refer to something missing.

        Raises:
          UserError: with the supported values.
        """
        onnx_opset.check(self.opset or OPSET, self.ir_version)
        if self.input == "uint8-nhwc" and self.normalization == "outside":
            raise UserError(
                "--input uint8-nhwc normalizes in the graph: leave out --normalization outside"
            )


def write(path: Path, model: Network, form: Form) -> None:
    """Writes the float32 graph of a network; large weights go to a file next to it.

    Args:
      path: the file to write.
      model: the network to export.
      form: form of the graph.

    Raises:
      UserError: packages are missing, or a network without a torch twin has an operation that
        jax2onnx cannot translate, or an operator has no form at the opset.
    """
    if twins.find(model.network):
        _write_twin(path, model, inside=form.inside)
    else:
        names = (INPUT, OUTPUT, BATCH)
        onnx_from_jax.write(path, model, inside=form.inside, names=names)
    gc.collect()  # the next check needs as much memory again
    _reshape(path, form)
    wants = model.input
    if form.inside:
        wants = dataclasses.replace(wants, mean=0.0, scale=1.0)
    if form.input == "uint8-nhwc":
        wants = dataclasses.replace(wants, layout="NHWC", dtype="uint8")
    wants = dataclasses.replace(wants, output=OUTPUT)
    metadata = {
        "network": model.network,
        "embedding_size": str(model.embedding_size),
        "color_order": "RGB",
        # Left to the caller: (x - mean) / scale.
        "mean": str(wants.mean),
        "scale": str(wants.scale),
        "normalization": "inside" if form.inside else "outside",
        "precision": "float32",
        model_input.METADATA_KEY: wants.to_json(),
    }
    finish(path, metadata)


def disown(path: Path) -> None:
    """Removes the run's digest from a file whose embeddings differ from the run's.

    A calibration of the run is then refused for it; its own calibration uses its SHA-256.
    """
    onnx = require("onnx")
    model = onnx.load(path, load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == model_input.METADATA_KEY:
            wants = model_input.from_json(entry.value, source=str(path))
            entry.value = dataclasses.replace(wants, digest="").to_json()
    onnx.save(model, path)


def _reshape(path: Path, form: Form) -> None:
    """Converts the exporters' output to the requested versions and input."""
    onnx = require("onnx")
    model = onnx.load(path, load_external_data=False)
    model.ir_version = form.ir_version
    if form.opset is not None:
        onnx_opset.convert(model, form.opset)
    if form.input == "uint8-nhwc":
        _take_pixels(model.graph)
    onnx.save(model, path)


def _take_pixels(graph: Any) -> None:
    """Makes a graph that takes (batch, 3, 112, 112) of 0 .. 255 take images as they are decoded."""
    onnx = require("onnx")
    (given,) = graph.input
    planes = f"{INPUT}/planes"
    for node in graph.node:
        node.input[:] = [planes if name == given.name else name for name in node.input]
    shape = [BATCH, IMAGE_SIZE, IMAGE_SIZE, 3]
    pixels = onnx.helper.make_tensor_value_info(given.name, onnx.TensorProto.UINT8, shape)
    given.CopyFrom(pixels)
    nodes = [
        onnx.helper.make_node("Cast", [INPUT], [f"{INPUT}/float"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Transpose", [f"{INPUT}/float"], [planes], perm=[0, 3, 1, 2]),
        *graph.node,
    ]
    del graph.node[:]
    graph.node.extend(nodes)


def _write_twin(path: Path, model: Network, *, inside: bool) -> None:
    state = weights.to_state_dict(model.params, model.batch_stats)
    module = twins.load(model.network, state, embedding_size=model.embedding_size)
    if inside:
        module = _FromPixels(module)
    large = sum(tensor.nbytes for tensor in state.values()) > _LARGEST_FILE
    with _quiet():
        program = _export(module.eval())
        program.save(path, external_data=large)


def finish(path: Path, metadata: dict[str, str]) -> None:
    """Names the nodes so that clients detect where normalization happens, and adds metadata.

    Also drops the exporter's references to source files.
    """
    onnx = require("onnx")
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    known = {entry.key: entry.value for entry in model.metadata_props} | metadata
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, known)
    nodes = list(graph.node)
    if known["normalization"] == "inside":
        if not any(node.name in NORMALIZERS for node in nodes):
            for name in NORMALIZERS:  # the first of their kind, at most after a transposition
                next(node for node in nodes if node.op_type == name).name = name
        first = _with_ancestors(nodes, NORMALIZERS)  # quantization may have put others first
        nodes.sort(key=lambda node: node.name not in first)
    for number, node in enumerate(nodes):
        if node.name not in NORMALIZERS or known["normalization"] == "outside":
            node.name = f"node_{number}"
        node.doc_string = ""
        del node.metadata_props[:]
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del value.metadata_props[:]
    del graph.metadata_props[:]
    graph.name = known["network"]
    onnx.save(model, path)
    onnx.checker.check_model(path)


def _with_ancestors(nodes: list[Any], names: Collection[str]) -> set[str]:
    """Returns the names with all nodes whose outputs they need; nodes are in graph order."""
    wanted = set(names)
    inputs: set[str] = set()
    for node in reversed(nodes):
        if node.name in wanted or inputs & {*node.output}:
            wanted.add(node.name)
            inputs |= {*node.input}
    return wanted


def _export(module: torch.nn.Module) -> Any:
    require("onnxscript")
    return torch.onnx.export(
        module,
        (torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE),),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim(BATCH)},),
        verbose=False,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch's deprecation warnings about itself, and its remark about torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
