"""A backbone as an ONNX graph, in the form that insightface's clients expect."""

import contextlib
import gc
import logging
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from arcface_jax.config.choices import Normalization
from arcface_jax.convert import onnx_from_jax, twins, weights
from arcface_jax.convert.packages import require
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.models import preprocess
from arcface_jax.training.network import Network

OPSET = 18
INPUT, OUTPUT, BATCH = "input", "embedding", "batch"
# insightface's clients take an input of 0 .. 255 where names among the first eight nodes begin
# with Sub and Mul; otherwise they normalize. Other nodes have names that begin with neither.
NORMALIZERS = ("Sub", "Mul")
# A protocol buffer has less than 2 GiB; larger weights go to a file beside the graph.
_LARGEST_FILE = 1_900_000_000


class _FromPixels(torch.nn.Module):
    """A network that normalizes its input."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, 112, 112) of 0 .. 255, RGB, to (B, D)."""
        return self.network((pixels - preprocess.MEAN) * (1 / preprocess.SCALE))


def write(path: Path, model: Network, *, normalization: Normalization) -> None:
    """Writes the graph of a network, float32, and beside it its weights where these are large.

    Args:
      path: the file to write.
      model: to export.
      normalization: whether the graph takes [-1, 1] (outside, of it) or 0 .. 255 (inside).

    Raises:
      UserError: packages are missing, or a network without a torch twin has an operation that
        jax2onnx cannot translate.
    """
    inside = normalization == "inside"
    if twins.find(model.network):
        _write_twin(path, model, inside=inside)
    else:
        names = (INPUT, OUTPUT, BATCH)
        onnx_from_jax.write(path, model, inside=inside, names=names)
    gc.collect()  # what is checked next takes as much memory again
    metadata = {
        "network": model.network,
        "embedding_size": str(model.embedding_size),
        "color_order": "RGB",
        # What is left to the caller: (x - mean) / scale.
        "mean": str(preprocess.MEAN if normalization == "outside" else 0.0),
        "scale": str(preprocess.SCALE if normalization == "outside" else 1.0),
        "normalization": normalization,
        "precision": "float32",
    }
    finish(path, metadata)


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
    """Names the nodes so that clients see where normalization is done, and adds metadata.

    Also drops what the exporter noted of its source files.
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
            for node, name in zip(nodes, NORMALIZERS, strict=False):
                assert node.op_type == name, node.op_type
                node.name = name
        first = _with_ancestors(nodes, NORMALIZERS)  # as quantization may have put others first
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
    """The names, and those of all nodes whose outputs they need; nodes are in graph order."""
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
    """Without torch's deprecation warnings to itself, and its remark that torchvision is absent."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
